"""The base of the methods that train few numbers, and ways to choose these numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from ..errors import ConfigurationError
from ..peft.inject import adapted, update
from .base import Method
from .groups import Group, parameter_groups
from .plan import trained_groups, without_encoder

Choice = Callable[[str, nn.Parameter], bool]


@dataclass(frozen=True, kw_only=True)
class ParameterEfficient(Method):
    """Train few numbers, without weight decay; what was trained is also left as an adapter file."""

    weight_decay: float = 0.0


def heads_and(network: nn.Module, choice: Choice, *, full_decoder: bool = False) -> tuple[Group, ...]:
    """Return the network's groups: head in full, of the others what `choice` takes, or all of the decoder.

    Raises:
        ConfigurationError: there is nothing to choose, or full_decoder, and the network has no decoder.
    """
    groups = trained_groups(network)
    full = {g.name for g in without_encoder(groups)} if full_decoder else {"head"}
    chosen = (Group(g.name, tuple((n, p) for n, p in g.parameters if g.name in full or choice(n, p))) for g in groups)
    found = tuple(group for group in chosen if group.parameters)
    if not any(choice(n, p) for g in groups for n, p in g.parameters):
        raise ConfigurationError(f"this {type(network).__name__} has nothing that this method trains besides the head; "
                                 f"use nnUNetTrainerHeadOnly or nnUNetTrainerLoRA.")
    return found


def outside_decoder(network: nn.Module, modules: Iterable[nn.Module]) -> tuple[nn.Module, ...]:
    """Return those of `modules` that are no part of head and decoder.

    Raises:
        ConfigurationError: the network has no decoder apart from its head.
    """
    decoder = {id(p) for g in without_encoder(parameter_groups(network)) for _, p in g.parameters}
    return tuple(m for m in modules if not any(id(p) in decoder for p in m.parameters()))


def is_factor(network: nn.Module) -> Choice:
    """Return the choice of all factors of mergeable updates."""
    ids = {id(p) for module in adapted(network).values() for p in update(module).factors().values()}
    return lambda _, parameter: id(parameter) in ids
