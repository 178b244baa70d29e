"""Methods that train a low-rank difference of the weights."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import nn

from ..errors import ConfigurationError
from ..peft.inject import attach, checked_layers
from ..peft.low_rank import FACTORISATIONS, DecomposedLowRank, LowRankDelta, capped_rank
from .base import COUNT, FLAG, POSITIVE, SHARE_BELOW_1, Limit, ParameterEfficient, one_of
from .groups import Group, low_rank_targets
from .plan import TrainingPlan, outside_decoder, trained_groups, without_encoder
from .schedule import Schedule, Stage, constant

Value = TypeVar("Value")

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _are_ranks(value: Any) -> bool:
    return value is None or isinstance(value, Mapping) and all(COUNT.allows(rank) for rank in value.values())


def _are_patterns(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and all(isinstance(part, str) for part in value)


@dataclass(frozen=True, kw_only=True)
class LoRA(ParameterEfficient):
    """Low-rank adaptation of convolutions, transposed convolutions and linear layers (Hu 2021; Dante, 2605.03602).

    Norm affine, biases, stem and heads are trained in full: together they cost little, and norm affine carries the
    domain (AC-Norm). encoder=False freezes the encoder with its norms, so that backward stops at the bottleneck;
    full_decoder trains the decoder in full instead of low-rank.

    rank, alpha, factorisation, rank_stabilised, dropout: see `LowRankDelta`. ranks: pattern of weight names -> rank,
    the first that matches counts, others have `rank`; as {"decoder.*": 16, "encoder.stages.0*": 4}. targets: patterns
    of the weights to adapt; of those that are left out the weights stay frozen.
    lr_ratio: learning rate of lora_B, which starts as zero, over that of everything else (LoRA+, Hayou 2024, arXiv
    2402.12354). There the matrix on the output side is the faster one, here that is lora_A: LoRA+ is a ratio below 1.
    """

    LIMITS = {
        "rank": COUNT, "alpha": POSITIVE, "factorisation": one_of(*FACTORISATIONS), "encoder": FLAG,
        "full_decoder": FLAG, "rank_stabilised": FLAG, "dropout": SHARE_BELOW_1, "lr_ratio": POSITIVE,
        "ranks": Limit('patterns with ranks of at least 1, such as {"decoder.*": 16}', _are_ranks),
        "targets": Limit('a list of patterns, such as ["decoder.*"]', _are_patterns)}

    rank: int = 8
    alpha: float = 16.0
    factorisation: str = "channel"
    encoder: bool = True
    full_decoder: bool = False
    rank_stabilised: bool = False
    dropout: float = 0.0
    lr_ratio: float = 1.0
    ranks: dict[str, int] | None = None
    targets: tuple[str, ...] = ("*",)

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "targets", tuple(self.targets))
        if self.full_decoder and not self.encoder:
            raise ConfigurationError(f"{type(self).__name__}: full_decoder=True with encoder=False leaves nothing to "
                                     f"adapt; use nnUNetTrainerDecoderOnly.")

    def _candidates(self, network: nn.Module) -> dict[str, nn.Module]:
        """Return weight name -> layer of what can be adapted: all but stem and heads, of encoder or decoder alone."""
        modules = low_rank_targets(network)
        if not self.encoder or self.full_decoder:
            outside = outside_decoder(network, modules)
            modules = outside if self.full_decoder else tuple(m for m in modules if m not in outside)
        return weight_names(network, modules)

    def low_rank_modules(self, network: nn.Module) -> dict[nn.Module, int]:
        """Return layer -> wanted rank of all that is adapted, layers whose factors would cost too much included.

        Raises:
            ConfigurationError: a pattern in targets or ranks matches no weight.
        """
        candidates = self._candidates(network)
        chosen = matching(candidates, dict.fromkeys(self.targets, True), option="targets")
        ranks = dict.fromkeys(chosen, self.rank) | matching(chosen, self.ranks or {}, option="ranks")
        return {candidates[name]: ranks[name] for name in chosen}

    def adapt(self, network: nn.Module) -> None:
        """Add the factors; the weights under them are frozen, and layers that factors cannot spare are left in full."""
        ranks = self.low_rank_modules(network)
        modules: Any = checked_layers(network, ranks)
        attach(network, {m: self._update(m, ranks[m]) for m in modules
                         if capped_rank(m.weight.shape, ranks[m], factorisation=self.factorisation)})

    def _update(self, module: Any, rank: int) -> LowRankDelta:
        return LowRankDelta(module.weight.shape, **self._options(module, rank))

    def _options(self, module: Any, rank: int) -> dict[str, Any]:
        return {"rank": rank, "alpha": self.alpha, "factorisation": self.factorisation, "dropout": self.dropout,
                "rank_stabilised": self.rank_stabilised, "device": module.weight.device}

    def plan(self, network: nn.Module) -> TrainingPlan:
        """Return one stage: factors and small tensors of all groups, or of head and decoder."""
        groups = trained_groups(network)
        groups = groups if self.encoder else without_encoder(groups)
        adapted = self.low_rank_modules(network)
        frozen = {id(m.weight) for m in self._candidates(network).values() if m not in adapted}
        groups = tuple(Group(g.name, tuple((n, p) for n, p in g.parameters if id(p) not in frozen)) for g in groups)
        return self._with_ratio(groups)

    def _with_ratio(self, groups: tuple[Group, ...]) -> TrainingPlan:
        """Return one stage of the groups, in which lora_B has groups of its own where it has its own rate."""
        split, scales = [], []
        for group in groups:
            own = tuple(entry for entry in group.parameters if self.lr_ratio != 1 and entry[0].endswith(".lora_B"))
            rest = tuple(entry for entry in group.parameters if entry not in own)
            for name, part, scale in ((group.name, rest, 1.0), (f"{group.name} lora_B", own, self.lr_ratio)):
                if part:
                    split.append(Group(name, part))
                    scales.append(scale)
        return TrainingPlan(groups=tuple(split), lr_scales=tuple(scales), schedule=constant([g.name for g in split]))


@dataclass(frozen=True, kw_only=True)
class DoRA(LoRA):
    """LoRA of each weight's direction, and a magnitude an output channel (Liu 2024, arXiv 2402.09353).

    A norm right behind a convolution takes the magnitude out again, so in an nnU-Net the magnitudes act in transposed
    convolutions; elsewhere the affine scale of the norm, which LoRA trains too, has their part.
    """

    def _update(self, module: Any, rank: int) -> LowRankDelta:
        return DecomposedLowRank(module.weight.shape, groups=getattr(module, "groups", 1),
                                 transposed=isinstance(module, _TRANSPOSED), **self._options(module, rank))


@dataclass(frozen=True, kw_only=True)
class LPFT(LoRA):
    """Heads alone first, then LoRA: new heads do not distort good features (LP-FT, Kumar 2022, arXiv 2202.10054).

    head_share: share of the epochs that train the heads alone; backward stops at the features meanwhile.
    """

    LIMITS = {"head_share": SHARE_BELOW_1}

    head_share: float = 0.2

    def plan(self, network: nn.Module) -> TrainingPlan:
        """Return two stages: the heads, then everything that LoRA trains."""
        plan = super().plan(network)
        names = tuple(group.name for group in plan.groups)
        switch = min(math.ceil(self.head_share * self.epochs), self.epochs - 1)
        stages = (Stage(0, names[:1]), Stage(switch, names)) if switch else (Stage(0, names),)
        return dataclasses.replace(plan, schedule=Schedule(stages))


def weight_names(network: nn.Module, modules: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """Return canonical weight name -> module; canonical is the name under which the module was registered first."""
    wanted = {id(module) for module in modules}
    return {f"{name}.weight".lstrip("."): m for name, m in network.named_modules() if id(m) in wanted}


def matching(names: Iterable[str], patterns: Mapping[str, Value], *, option: str) -> dict[str, Value]:
    """Return name -> value of the first pattern that matches it; names that none matches are left out.

    option: what the patterns are called where they come from, for the message.

    Raises:
        ConfigurationError: a pattern matches no name.
    """
    names = tuple(names)
    if idle := [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]:
        shown = names if len(names) < 7 else (*names[:3], "...", *names[-3:])
        raise ConfigurationError(f"{option}: {idle[0]!r} matches none of the {len(names)} weights that can be adapted "
                                 f"here: {', '.join(shown) or 'none'}.")
    found = ((name, next((v for p, v in patterns.items() if fnmatchcase(name, p)), None)) for name in names)
    return {name: value for name, value in found if value is not None}
