"""Methods that train a low-rank difference of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import ConfigurationError
from ..freezing.groups import low_rank_targets, parameter_groups
from ..freezing.schedule import Schedule, Stage
from ..peft.decomposed import DecomposedLowRank
from ..peft.inject import attach, checked_layers
from ..peft.low_rank import LowRankDelta, capped_rank
from .efficient import ParameterEfficient
from .plan import TrainingPlan, constant_plan, trained_groups, without_encoder

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, kw_only=True)
class LoRA(ParameterEfficient):
    """Low-rank adaptation of convolutions, transposed convolutions and linear layers (Hu 2021; Dante, 2605.03602).

    Norm affine, biases, stem and heads are trained in full: together they cost little, and norm affine carries the
    domain (AC-Norm). encoder=False freezes the encoder with its norms, so that backward stops at the bottleneck.
    """

    rank: int = 8
    alpha: float = 16.0
    factorisation: str = "channel"
    encoder: bool = True

    def low_rank_modules(self, network: nn.Module) -> Iterable[nn.Module]:
        """Return all convs, transposed convs and linears except stem and heads (of the decoder, without encoder)."""
        targets = low_rank_targets(network)
        if self.encoder:
            return targets
        trained = {id(p) for g in without_encoder(parameter_groups(network)) for _, p in g.parameters}
        return tuple(m for m in targets if id(m.weight) in trained)

    def adapt(self, network: nn.Module) -> None:
        """Add the factors; the weights under them are frozen, and layers that factors cannot spare are left in full."""
        modules: Any = checked_layers(network, self.low_rank_modules(network))
        attach(network, {m: self._update(m) for m in modules
                         if capped_rank(m.weight.shape, self.rank, factorisation=self.factorisation)})

    def _update(self, module: Any) -> LowRankDelta:
        return LowRankDelta(module.weight.shape, **self._options(module))

    def _options(self, module: Any) -> dict[str, Any]:
        return {"rank": self.rank, "alpha": self.alpha, "factorisation": self.factorisation,
                "device": module.weight.device}

    def plan(self, network: nn.Module) -> TrainingPlan:
        """Return one stage: factors and small tensors of all groups, or of head and decoder."""
        groups = trained_groups(network)
        return constant_plan(groups if self.encoder else without_encoder(groups))


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """LoRA of each weight's direction, and a magnitude an output channel (Liu 2024, arXiv 2402.09353).

    A norm right behind a convolution takes the magnitude out again, so in an nnU-Net the magnitudes act in transposed
    convolutions; elsewhere the affine scale of the norm, which LoRA trains too, has their part.
    """

    def _update(self, module: Any) -> LowRankDelta:
        return DecomposedLowRank(module.weight.shape, groups=getattr(module, "groups", 1),
                                 transposed=isinstance(module, _TRANSPOSED), **self._options(module))


@dataclass(frozen=True, kw_only=True)
class LPFT(LoRA):
    """Heads alone first, then LoRA: new heads do not distort good features (LP-FT, Kumar 2022, arXiv 2202.10054).

    head_share: share of the epochs that train the heads alone; backward stops at the features meanwhile.
    """

    head_share: float = 0.2

    def __post_init__(self):
        super().__post_init__()
        if not 0 <= self.head_share < 1:
            raise ConfigurationError(f"LPFT: head_share is {self.head_share!r}; give a share of the epochs from 0 to "
                                     f"below 1.")

    def plan(self, network: nn.Module) -> TrainingPlan:
        """Return two stages: the heads, then everything that LoRA trains."""
        groups = super().plan(network).groups
        names = tuple(group.name for group in groups)
        switch = min(math.ceil(self.head_share * self.epochs), self.epochs - 1)
        stages = (Stage(0, names[:1]), Stage(switch, names)) if switch else (Stage(0, names),)
        return TrainingPlan(groups=groups, lr_scales=(1.0,) * len(groups), schedule=Schedule(stages))
