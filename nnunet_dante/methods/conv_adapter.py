"""A method that trains a small convolution parallel to each convolution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import ConfigurationError
from ..peft.convolution import CONVS
from ..peft.inject import attach
from ..peft.pointwise import PointwiseDelta, has_centre
from .efficient import ParameterEfficient, heads_and, is_factor, outside_decoder
from .groups import low_rank_targets, stem_modules
from .plan import TrainingPlan, constant_plan


@dataclass(frozen=True, kw_only=True)
class ConvAdapter(ParameterEfficient):
    """Train a parallel 1x1 convolution a convolution, zero at first, and the heads in full (FSEFT's "AdapterCNN").

    It is linear, so it is trained as an update of the kernel's centre and is gone after training. Convolutions with an
    even kernel size have no centre, and transposed convolutions are none of the source's: both stay frozen.

    full_decoder: train the decoder in full instead (FSEFT does so for organs that are new, at a rate of 1e-4).
    """

    lr: float = 1e-2
    full_decoder: bool = False

    def adapt(self, network: nn.Module) -> None:
        """Add the updates; the weights under them are frozen."""
        layers: tuple[Any, ...] = (*stem_modules(network), *low_rank_targets(network))
        layers = outside_decoder(network, layers) if self.full_decoder else layers
        convs = [m for m in layers if isinstance(m, CONVS) and has_centre(m.weight.shape)]
        if not convs:
            raise ConfigurationError(f"this {type(network).__name__} has no convolutions whose kernel sizes are all "
                                     f"odd, so none can have a parallel 1x1 convolution; use nnUNetTrainerLoRA.")
        attach(network, {conv: PointwiseDelta(conv.weight.shape, device=conv.weight.device) for conv in convs})

    def plan(self, network: nn.Module) -> TrainingPlan:
        """Return one stage: updates and heads."""
        return constant_plan(heads_and(network, is_factor(network), full_decoder=self.full_decoder))
