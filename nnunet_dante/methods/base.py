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

    Off at 0, for any method:
    l2_sp: pull towards the start weights (Li 2018, arXiv 1802.01483); replaces the weight decay. ewc: the same, harder
    where the start network's prediction depends on a weight (Kirkpatrick 2017, arXiv 1612.00796). Both: peft.penalty.
    size_prior: weight of the expected organ size on the unlabelled images of the folder size_images (absolute, or below
    nnUNet_raw/DATASET) in the second half of the epochs; sizes may depart by the share size_margin without a penalty
    (FSEFT, arXiv 2303.17051; there 0.1 and 0.3). stop_patience: stop when the training loss has not improved for so
    many epochs (FSEFT: 20).
    """

    epochs: int = 100
    lr: float = 1e-3
    weight_decay: float = 1e-4
    warmup_epochs: int = 5
    uses_start_weights: bool = True
    l2_sp: float = 0.0
    ewc: float = 0.0
    size_prior: float = 0.0
    size_margin: float = 0.3
    size_images: str = "imagesTs"
    stop_patience: int = 0

    def __post_init__(self):
        for name in ("epochs", "lr"):
            if not getattr(self, name) > 0:
                raise ConfigurationError(f"{type(self).__name__}: {name} is {getattr(self, name)!r}; give a number "
                                         f"above 0.")
        for name in ("l2_sp", "ewc", "size_prior", "stop_patience"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ConfigurationError(f"{type(self).__name__}: {name} is {getattr(self, name)!r}; give 0, which "
                                         f"switches it off, or a number above.")
        if not 0 <= self.size_margin < 1:
            raise ConfigurationError(f"{type(self).__name__}: size_margin is {self.size_margin!r}; give a share of the "
                                     f"expected size, at least 0 and below 1.")
        if not self.uses_start_weights and (self.l2_sp or self.ewc):
            raise ConfigurationError(f"{type(self).__name__} starts from random weights, and l2_sp={self.l2_sp!r}, "
                                     f"ewc={self.ewc!r} would hold it there; leave both 0.")

    def known_overrides(self) -> set[str]:
        """Return the options that overrides in the plans can set here; start weights mean nothing to a random start."""
        known = {field.name for field in dataclasses.fields(self)}
        return known - {"uses_start_weights"} - (set() if self.uses_start_weights else {"l2_sp", "ewc"})

    def with_overrides(self, overrides: dict) -> Method:
        """Return the method with those of `overrides` that it knows; the block in the plans serves all trainers."""
        known = self.known_overrides()
        return dataclasses.replace(self, **{k: v for k, v in overrides.items() if k in known})

    def adapt(self, network: nn.Module) -> None:
        """Add what the method trains besides the network's own weights, in place; here nothing."""

    def plan(self, network: nn.Module) -> TrainingPlan:
        """Return what to train in `network`, whose low-rank modules have been adapted already."""
        return constant_plan(trained_groups(network))


@dataclass(frozen=True, kw_only=True)
class ParameterEfficient(Method):
    """Train few numbers, without weight decay; what was trained is also left as an adapter file."""

    weight_decay: float = 0.0
