"""Methods that train a part of the network's own weights, or all of them at several speeds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..errors import ConfigurationError
from ..peft.convolution import CONVS
from ..peft.inject import adapted, attach, update
from ..peft.update import PointwiseDelta, has_centre
from .base import FLAG, POSITIVE, Method, ParameterEfficient
from .groups import low_rank_targets, stem_modules
from .plan import Choice, TrainingPlan, constant_plan, heads_and, outside_decoder, trained_groups, without_encoder
from .schedule import constant


@dataclass(frozen=True, kw_only=True)
class FineTune(Method):
    """Train all weights, slower towards the input.

    The factor of the learning rate falls linearly from 1 at the head to `input_lr_scale` at the input (Dante: 0.1).
    full_decoder: the factor is 1 in the whole decoder, and falls in the encoder alone.
    """

    LIMITS = {"input_lr_scale": POSITIVE, "full_decoder": FLAG}

    input_lr_scale: float = 0.1
    full_decoder: bool = False

    def plan(self, network: nn.Module) -> TrainingPlan:
        """Return one stage, with a factor of the learning rate for each group."""
        groups = trained_groups(network)
        full = len(without_encoder(groups)) if self.full_decoder else 1
        step = (1 - self.input_lr_scale) / max(1, len(groups) - full)
        return TrainingPlan(groups=groups, lr_scales=tuple(1 - max(0, i + 1 - full) * step for i in range(len(groups))),
                            schedule=constant([g.name for g in groups]))


@dataclass(frozen=True, kw_only=True)
class DecoderOnly(Method):
    """Train decoder and heads on a frozen encoder: a strong baseline (Karimi 2021)."""

    def plan(self, network: nn.Module) -> TrainingPlan:
        """Return one stage: head and decoder."""
        return constant_plan(without_encoder(trained_groups(network)))


@dataclass(frozen=True, kw_only=True)
class HeadOnly(ParameterEfficient):
    """Train only the segmentation heads: FSEFT's linear probe, with its learning rate."""

    needs_decoder: ClassVar[bool] = True

    lr: float = 1e-2

    def plan(self, network: nn.Module) -> TrainingPlan:
        """Return one stage: the heads."""
        return constant_plan(tuple(g for g in trained_groups(network) if g.name == "head"))


@dataclass(frozen=True, kw_only=True)
class FromScratch(Method):
    """Train all weights from a random start, with the epochs and the optimiser of the other methods: the baseline."""

    uses_start_weights: bool = False


@dataclass(frozen=True, kw_only=True)
class _ChosenAndHeads(ParameterEfficient):
    """Train a choice of parameters, and the heads in full. The learning rate is that of FSEFT for such methods.

    full_decoder: train the whole decoder as well (FSEFT does so for new organs, with a learning rate of 1e-4).
    """

    LIMITS = {"full_decoder": FLAG}

    lr: float = 1e-2
    full_decoder: bool = False

    def _choice(self, network: nn.Module) -> Choice:
        raise NotImplementedError

    def plan(self, network: nn.Module) -> TrainingPlan:
        """Return one stage: the chosen parameters, and the heads or the decoder."""
        return constant_plan(heads_and(network, self._choice(network), full_decoder=self.full_decoder))


@dataclass(frozen=True, kw_only=True)
class BitFit(_ChosenAndHeads):
    """Train all biases, and the heads in full (Ben Zaken 2022, arXiv 2106.10199; "Bias" in FSEFT).

    The bias of a convolution in front of an instance norm has no effect, because the norm subtracts it. What changes
    the output of an nnU-Net are the biases of its norms, transposed convolutions and heads.
    """

    def _choice(self, network: nn.Module) -> Choice:
        return lambda name, _: name.endswith("bias")


@dataclass(frozen=True, kw_only=True)
class NormAffine(_ChosenAndHeads):
    """Train scale and shift of all norms, and the heads in full ("Affine" in FSEFT; AC-Norm)."""

    def _choice(self, network: nn.Module) -> Choice:
        # By the class's name: norms of architectures, such as LayerNormNd of Primus, have no base class in common.
        ids = {id(p) for m in network.modules() if "Norm" in type(m).__name__ for p in m.parameters(recurse=False)}
        return lambda _, parameter: id(parameter) in ids


@dataclass(frozen=True, kw_only=True)
class ConvAdapter(_ChosenAndHeads):
    """Train one parallel 1x1 convolution per convolution, and the heads in full ("AdapterCNN" in FSEFT).

    The parallel convolutions start as zero. They are linear, so they are trained as updates of the kernels' centres and
    are merged into the weights afterwards. Convolutions with an even kernel size have no centre, and the source has
    no such module for transposed convolutions: both stay frozen. A decoder that is trained in full gets no updates.
    """

    def adapt(self, network: nn.Module) -> None:
        """Add the updates; the weights under them are frozen."""
        layers: tuple[Any, ...] = (*stem_modules(network), *low_rank_targets(network))
        layers = outside_decoder(network, layers) if self.full_decoder else layers
        convs = [m for m in layers if isinstance(m, CONVS) and has_centre(m.weight.shape)]
        if not convs:
            raise ConfigurationError(f"this {type(network).__name__} has no convolutions whose kernel sizes are all "
                                     f"odd, so it cannot have parallel 1x1 convolutions; use nnUNetTrainerLoRA.")
        attach(network, {conv: PointwiseDelta(conv.weight.shape, device=conv.weight.device) for conv in convs})

    def _choice(self, network: nn.Module) -> Choice:
        ids = {id(p) for module in adapted(network).values() for p in update(module).factors().values()}
        return lambda _, parameter: id(parameter) in ids
