"""The base of all methods, and what their options may be."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..errors import ConfigurationError
from .plan import TrainingPlan, constant_plan, trained_groups


@dataclass(frozen=True)
class Limit:
    """Which values an option may have. `text` completes a message: "give a number above 0"."""

    text: str
    allows: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


COUNT = Limit("a whole number of at least 1", lambda v: _is_whole(v) and v >= 1)
COUNT_OR_OFF = Limit("0, which switches it off, or a whole number above", lambda v: _is_whole(v) and v >= 0)
POSITIVE = Limit("a number above 0", lambda v: _is_number(v) and v > 0)
POSITIVE_OR_OFF = Limit("0, which switches it off, or a number above", lambda v: _is_number(v) and v >= 0)
SHARE = Limit("a share from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1)
SHARE_BELOW_1 = Limit("a share of at least 0 and below 1", lambda v: _is_number(v) and 0 <= v < 1)
FLAG = Limit("true or false", lambda v: isinstance(v, bool))


def one_of(*names: str) -> Limit:
    """Return the limit of an option that is one of these words."""
    return Limit(f"one of {', '.join(names)}", lambda v: v in names)


@dataclass(frozen=True, kw_only=True)
class Method:
    """Train every weight at one learning rate: the base of all methods.

    A method with options of its own names their allowed values in LIMITS; those of its bases hold, too.

    Args:
        epochs: each of nnU-Net's `num_iterations_per_epoch` steps.
        lr: learning rate of AdamW.
        weight_decay: of AdamW.
        warmup_epochs: linear warm-up before nnU-Net's polynomial decay; at most a tenth of the epochs is used.
        uses_start_weights: False for a training that starts from random weights.
        l2_sp: strength of the pull towards the start weights (Li 2018, arXiv 1802.01483); replaces the weight decay.
        ewc: the same, stronger for weights on which the start network's prediction depends more (Kirkpatrick 2017,
            arXiv 1612.00796). Both are in peft.regularisation; 0 switches them off.
        size_prior: weight of the expected organ sizes, which unlabelled images should have in the second half of the
            epochs (FSEFT, arXiv 2303.17051, there 0.1); 0 switches it off.
        size_margin: share by which a size may differ from the expected one without a penalty (FSEFT: 0.3).
        size_images: folder of the unlabelled images; absolute, or below nnUNet_raw/DATASET.
        stop_patience: stop when the training loss has not improved for so many epochs (FSEFT: 20); 0 never stops.
        recompute: keep few features for the backward pass, and compute the others again (gradient checkpointing,
            peft.recompute): the same training with less memory and in more time.
        strength: how much of what was learned is kept at the end, from 0 (the start weights) to 1 (all of it); None
            ("auto") chooses it on the validation cases (WiSE-FT, Wortsman 2022, arXiv 2109.01903).

    Raises:
        ConfigurationError: an option has a value outside its limits.
    """

    LIMITS: ClassVar[Mapping[str, Limit]] = {
        "epochs": COUNT, "lr": POSITIVE, "weight_decay": POSITIVE_OR_OFF, "warmup_epochs": COUNT_OR_OFF,
        "uses_start_weights": FLAG, "l2_sp": POSITIVE_OR_OFF, "ewc": POSITIVE_OR_OFF, "size_prior": POSITIVE_OR_OFF,
        "size_margin": SHARE_BELOW_1, "size_images": Limit("a folder", lambda v: isinstance(v, str) and v != ""),
        "stop_patience": COUNT_OR_OFF, "recompute": FLAG,
        "strength": Limit("auto, or a number of at least 0", lambda v: v is None or _is_number(v) and v >= 0)}

    needs_decoder: ClassVar[bool] = False  # whether the method makes no sense with a decoder that starts at random

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
    recompute: bool = False
    strength: float | None = None

    def __post_init__(self):
        for name in self.limits():
            self.check(name, getattr(self, name))
        if not self.uses_start_weights and (self.l2_sp or self.ewc):
            raise ConfigurationError(f"{type(self).__name__} starts from random weights, and l2_sp={self.l2_sp!r}, "
                                     f"ewc={self.ewc!r} would hold it there; leave both 0.")

    def __str__(self) -> str:
        """Return the method with its options, as a user writes them."""
        return repr(self).replace("strength=None", "strength=auto")

    @classmethod
    def limits(cls) -> dict[str, Limit]:
        """Return option -> allowed values, of this method and of its bases."""
        found: dict[str, Limit] = {}
        for base in reversed(cls.__mro__):
            found |= vars(base).get("LIMITS", {})
        return found

    @classmethod
    def check(cls, name: str, value: Any) -> None:
        """Refuse a value that the option `name` may not have.

        Raises:
            ConfigurationError: the value is outside the option's limits.
        """
        limit = cls.limits().get(name)
        if limit is not None and not limit.allows(value):
            raise ConfigurationError(f"{cls.__name__}: {name} is {value!r}; give {limit.text}.")

    def known_overrides(self) -> set[str]:
        """Return the options that overrides in the plans can set here; start weights mean nothing to a random start."""
        known = {field.name for field in dataclasses.fields(self) if field.init}
        return known - {"uses_start_weights"} - (set() if self.uses_start_weights else {"l2_sp", "ewc", "strength"})

    def with_overrides(self, overrides: dict) -> Method:
        """Return the method with those of `overrides` that it knows; the block in the plans serves all trainers."""
        known = self.known_overrides()
        return dataclasses.replace(self, **{k: v for k, v in overrides.items() if k in known})

    def for_new_decoder(self) -> Method:
        """Return the method for start weights that are an encoder alone, so that the decoder starts at random.

        The whole decoder is then trained from the first epoch on, by the option full_decoder of methods that have one.

        Raises:
            ConfigurationError: the method trains too little for that.
        """
        if self.needs_decoder:
            raise ConfigurationError(f"{type(self).__name__} trains no whole decoder, but the donor is an encoder "
                                     "without one: the decoder would stay random. Use nnUNetTrainerFineTune, "
                                     "nnUNetTrainerLoRA, nnUNetTrainerGradualUnfreezing or nnUNetTrainerDecoderOnly.")
        return self.with_overrides({"full_decoder": True})

    def adapt(self, network: nn.Module) -> None:
        """Add to `network`, in place, what the method trains besides the network's own weights; here nothing."""

    def plan(self, network: nn.Module) -> TrainingPlan:
        """Return what to train in `network`, which `adapt` has prepared."""
        return constant_plan(trained_groups(network))


@dataclass(frozen=True, kw_only=True)
class ParameterEfficient(Method):
    """Train few parameters, without weight decay; a training also leaves what it trained as an adapter file."""

    weight_decay: float = 0.0
