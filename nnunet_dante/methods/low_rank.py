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

    Norms, biases, stem and heads are trained in full. They have few parameters, and the norms carry much of the
    difference between domains (AC-Norm).

    Args:
        rank: of the factors; `LowRankDelta` explains this and the next four.
        alpha: strength of the update, which is scaled by alpha / rank.
        factorisation: "channel" or "flat".
        rank_stabilised: scale by alpha / sqrt(rank) instead.
        dropout: probability with which a rank-one part is left out in training.
        encoder: False freezes the encoder with its norms, so that the backward pass ends at the bottleneck.
        full_decoder: train the whole decoder instead of low-rank factors.
        lr_ratio: learning rate of lora_B, which starts as zero, divided by that of everything else. LoRA+ (Hayou 2024,
            arXiv 2402.12354) trains the matrix on the output side faster; that is lora_A here, so a ratio below 1.
        ranks: pattern of weight names -> rank, such as {"decoder.*": 16, "encoder.stages.0*": 4}. The first pattern
            that matches counts; other weights get `rank`.
        targets: patterns of the names of the weights to adapt; other weights stay frozen.
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
        """Return weight name -> layer of what can be adapted, which is all but stem and heads, in the chosen part."""
        modules = low_rank_targets(network)
        if not self.encoder or self.full_decoder:
            outside = outside_decoder(network, modules)
            modules = outside if self.full_decoder else tuple(m for m in modules if m not in outside)
        return weight_names(network, modules)

    def low_rank_modules(self, network: nn.Module) -> dict[nn.Module, int]:
        """Return layer -> wanted rank, also for layers that stay in full because factors would not be smaller.

        Raises:
            ConfigurationError: a pattern in targets or ranks matches no weight.
        """
        candidates = self._candidates(network)
        chosen = matching(candidates, dict.fromkeys(self.targets, True), option="targets")
        ranks = dict.fromkeys(chosen, self.rank) | matching(chosen, self.ranks or {}, option="ranks")
        return {candidates[name]: ranks[name] for name in chosen}

    def adapt(self, network: nn.Module) -> None:
        """Add factors and freeze the weights under them; a layer whose factors would not be smaller stays in full."""
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
        """Return one stage: the factors, and what is trained in full, of the whole network or of head and decoder."""
        groups = trained_groups(network)
        groups = groups if self.encoder else without_encoder(groups)
        adapted = self.low_rank_modules(network)
        frozen = {id(m.weight) for m in self._candidates(network).values() if m not in adapted}
        groups = tuple(Group(g.name, tuple((n, p) for n, p in g.parameters if id(p) not in frozen)) for g in groups)
        return self._with_ratio(groups)

    def _with_ratio(self, groups: tuple[Group, ...]) -> TrainingPlan:
        """Return one stage of the groups. Where lora_B has its own learning rate, it has groups of its own."""
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
    """LoRA of each weight's direction, and one magnitude per output channel (Liu 2024, arXiv 2402.09353).

    A norm behind a convolution removes its magnitude again. So in an nnU-Net the magnitudes have an effect in
    transposed convolutions only; elsewhere the scale of the norm, which LoRA trains as well, does the same.
    """

    def _update(self, module: Any, rank: int) -> LowRankDelta:
        return DecomposedLowRank(module.weight.shape, groups=getattr(module, "groups", 1),
                                 transposed=isinstance(module, _TRANSPOSED), **self._options(module, rank))


@dataclass(frozen=True, kw_only=True)
class LPFT(LoRA):
    """Only the heads first, then LoRA, so that new heads do not distort good features (LP-FT, Kumar 2022, 2202.10054).

    head_share: share of the epochs in which only the heads are trained (with full_decoder, heads and decoder); the
    backward pass then ends at the features.
    """

    LIMITS = {"head_share": SHARE_BELOW_1}

    head_share: float = 0.2

    def plan(self, network: nn.Module) -> TrainingPlan:
        """Return two stages: the heads, then all that LoRA trains."""
        plan = super().plan(network)
        names = tuple(group.name for group in plan.groups)
        switch = min(math.ceil(self.head_share * self.epochs), self.epochs - 1)
        full = ("head", "decoder") if self.full_decoder else ("head",)
        first = tuple(name for name in names if name.startswith(full))
        stages = (Stage(0, first), Stage(switch, names)) if switch else (Stage(0, names),)
        return dataclasses.replace(plan, schedule=Schedule(stages))


def weight_names(network: nn.Module, modules: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """Return weight name -> module, for `modules`. The name is that under which a module was registered first."""
    wanted = {id(module) for module in modules}
    return {f"{name}.weight".lstrip("."): m for name, m in network.named_modules() if id(m) in wanted}


def matching(names: Iterable[str], patterns: Mapping[str, Value], *, option: str) -> dict[str, Value]:
    """Return name -> value of the first pattern that matches it, without the names that no pattern matches.

    Args:
        names: of weights.
        patterns: shell pattern, such as `decoder.*` or `*.transpconvs.*` -> value.
        option: name of the option that holds the patterns, for the message.

    Raises:
        ConfigurationError: a pattern matches no name.
    """
    names = tuple(names)
    if idle := [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]:
        shown = names if len(names) < 7 else (*names[:3], "...", *names[-3:])
        raise ConfigurationError(f"{option}: {idle[0]!r} matches none of the {len(names)} weights that can be adapted "
                                 f"here: {', '.join(shown) or 'none'}.")
    found: dict[str, Value] = {}
    for name in names:
        for pattern, value in patterns.items():
            if fnmatchcase(name, pattern):
                found[name] = value
                break
    return found
