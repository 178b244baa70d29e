"""The base of all methods: train every weight at one learning rate."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from torch import nn

from ..errors import ConfigurationError
from .plan import TrainingPlan, constant_plan, trained_groups


@dataclass(frozen=True, kw_only=True)
class Method:
    """Train every weight at one learning rate: the base of all methods.

    epochs: each of nnU-Net's `num_iterations_per_epoch` steps. lr, weight_decay: AdamW's. warmup_epochs: linear
    warm-up before nnU-Net's polynomial decay; at most a tenth of the epochs is used.
    """

    epochs: int = 100
    lr: float = 1e-3
    weight_decay: float = 1e-4
    warmup_epochs: int = 5
    uses_start_weights: bool = True

    def __post_init__(self):
        for name in ("epochs", "lr"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{type(self).__name__}: {name} is {getattr(self, name)!r}; give a number "
                                         f"above 0.")

    def with_overrides(self, overrides: dict) -> Method:
        """Return the method with those of `overrides` that it knows; the block in the plans serves all trainers."""
        known = {field.name for field in dataclasses.fields(self)}
        return dataclasses.replace(self, **{k: v for k, v in overrides.items() if k in known})

    def adapt(self, network: nn.Module) -> None:
        """Add what the method trains besides the network's own weights, in place; here nothing."""

    def plan(self, network: nn.Module) -> TrainingPlan:
        """Return what to train in `network`, whose low-rank modules have been adapted already."""
        return constant_plan(trained_groups(network))
