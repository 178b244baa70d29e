"""Methods that choose which of the network's own weights to train, and how fast."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..freezing.schedule import constant
from .base import Method
from .plan import TrainingPlan, constant_plan, trained_groups, without_encoder


@dataclass(frozen=True, kw_only=True)
class FineTune(Method):
    """Train all weights, slower towards the input: factors fall linearly from 1 at the head (Dante's 0.1x to 1x)."""

    input_lr_scale: float = 0.1

    def plan(self, network: nn.Module) -> TrainingPlan:
        """Return one stage with a learning-rate factor a group."""
        groups = trained_groups(network)
        step = (1 - self.input_lr_scale) / max(1, len(groups) - 1)
        return TrainingPlan(groups=groups, lr_scales=tuple(1 - i * step for i in range(len(groups))),
                            schedule=constant([g.name for g in groups]))


@dataclass(frozen=True, kw_only=True)
class DecoderOnly(Method):
    """Train decoder and heads on a frozen encoder: the strong baseline of Karimi 2021."""

    def plan(self, network: nn.Module) -> TrainingPlan:
        """Return one stage: head and decoder."""
        return constant_plan(without_encoder(trained_groups(network)))


@dataclass(frozen=True, kw_only=True)
class HeadOnly(Method):
    """Train the segmentation heads alone: FSEFT's linear probe, and its learning rate."""

    lr: float = 1e-2
    weight_decay: float = 0.0

    def plan(self, network: nn.Module) -> TrainingPlan:
        """Return one stage: the heads."""
        return constant_plan(tuple(g for g in trained_groups(network) if g.name == "head"))


@dataclass(frozen=True, kw_only=True)
class FromScratch(Method):
    """Train all weights from a random start with the same budget and schedule: the fair baseline."""

    uses_start_weights: bool = False
