"""Methods that train a low-rank difference of the weights."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from ..freezing.groups import low_rank_targets, parameter_groups
from ..peft.inject import inject
from .base import Method
from .plan import TrainingPlan, constant_plan, trained_groups, without_encoder


@dataclass(frozen=True, kw_only=True)
class LoRA(Method):
    """Low-rank adaptation of convolutions, transposed convolutions and linear layers (Hu 2021; Dante, 2605.03602).

    Norm affine, biases, stem and heads are trained in full: together they cost little, and norm affine carries the
    domain (AC-Norm). encoder=False freezes the encoder with its norms, so that backward stops at the bottleneck.
    """

    weight_decay: float = 0.0
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
        """Add the factors; the weights under them are frozen."""
        inject(network, self.low_rank_modules(network), rank=self.rank, alpha=self.alpha,
               factorisation=self.factorisation)

    def plan(self, network: nn.Module) -> TrainingPlan:
        """Return one stage: factors and small tensors of all groups, or of head and decoder."""
        groups = trained_groups(network)
        return constant_plan(groups if self.encoder else without_encoder(groups))
