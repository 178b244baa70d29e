"""What to train in one network: parameter groups, their learning rates, and the epochs from which they are trained."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from torch import nn

from ..errors import ConfigurationError
from ..peft.convolution import spare_gradients
from ..peft.inject import adapted, original
from .groups import Group, parameter_groups
from .schedule import Schedule, constant

Choice = Callable[[str, nn.Parameter], bool]


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """What to train in one network.

    groups: parameter groups, head first. lr_scales: factor of the learning rate of each group. schedule: which groups
    are trained in which epoch.
    """

    groups: tuple[Group, ...]
    lr_scales: tuple[float, ...]
    schedule: Schedule

    def optimiser_groups(self) -> list[dict]:
        """Return the `params` argument of an optimiser: all groups that are trained at some time, head first."""
        return [{"params": [p for _, p in group.parameters], "name": group.name, "lr_scale": scale}
                for group, scale in zip(self.groups, self.lr_scales)]

    def restrict(self, network: nn.Module) -> None:
        """Freeze everything in `network` that is in no group, and let the rest require gradients.

        From then on the network's convolutions compute no gradient that is not used (`spare_gradients`).
        """
        trained = {id(p) for group in self.groups for _, p in group.parameters}
        for parameter in network.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        spare_gradients(network)

    def set_stage(self, epoch: int) -> bool:
        """Freeze the groups that are not trained at `epoch` (0-based), open the others; return whether any changed."""
        open_groups = self.schedule.stage(epoch).trainable
        changed = False
        for group in self.groups:
            trainable = group.name in open_groups
            for _, parameter in group.parameters:
                changed |= parameter.requires_grad != trainable
                parameter.requires_grad_(trainable)
                if not trainable:
                    parameter.grad = None
        return changed

    def table(self) -> str:
        """Return one line per group: size, factor of the learning rate, and first epoch."""
        lines = [f"{'group':<24}{'parameters':>12}{'lr x':>8}  trained from epoch"]
        for group, scale in zip(self.groups, self.lr_scales):
            first = next(s.first_epoch for s in self.schedule.stages if group.name in s.trainable)
            lines.append(f"{group.name:<24}{group.size:>12,}{scale:>8.3g}  {first}")
        return "\n".join(lines)


def constant_plan(groups: tuple[Group, ...]) -> TrainingPlan:
    """Return the plan that trains all of `groups` at one learning rate from the first epoch on."""
    return TrainingPlan(groups=groups, lr_scales=(1.0,) * len(groups), schedule=constant([g.name for g in groups]))


def trained_groups(network: nn.Module) -> tuple[Group, ...]:
    """Return the network's groups, without the frozen originals of adapted weights."""
    frozen = {id(original(module)) for module in adapted(network).values()}
    return tuple(Group(g.name, tuple((n, p) for n, p in g.parameters if id(p) not in frozen))
                 for g in parameter_groups(network))


def without_encoder(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """Return the groups of head and decoder.

    Raises:
        ConfigurationError: the network has no decoder apart from its head.
    """
    decoder = tuple(g for g in groups if g.name == "head" or g.name.startswith("decoder"))
    if len(decoder) < 2:
        raise ConfigurationError("this network has no decoder apart from its head, so nothing separates encoder from "
                                 "decoder; use nnUNetTrainerLoRA, nnUNetTrainerHeadOnly or nnUNetTrainerFineTune.")
    return decoder


def heads_and(network: nn.Module, choice: Choice, *, full_decoder: bool = False) -> tuple[Group, ...]:
    """Return the groups with the whole head and, of the rest, only the parameters that are chosen.

    Args:
        network: adapted already, if the method adapts it.
        choice: called with (name, parameter); returns whether to train it.
        full_decoder: train the whole decoder as well.

    Raises:
        ConfigurationError: nothing is chosen, or full_decoder is set and the network has no decoder.
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
    """Return those of `modules` that lie outside head and decoder.

    Raises:
        ConfigurationError: the network has no decoder apart from its head.
    """
    decoder = {id(p) for g in without_encoder(parameter_groups(network)) for _, p in g.parameters}
    return tuple(m for m in modules if not any(id(p) in decoder for p in m.parameters()))
