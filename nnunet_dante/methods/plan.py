"""What to train in one network: parameter groups, their learning rates, and the epochs at which they open."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..errors import ConfigurationError
from ..peft.convolution import spare_gradients
from ..peft.inject import adapted, original
from .groups import Group, parameter_groups
from .schedule import Schedule, constant


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """Parameter groups (head first), their learning-rate factors, and the epochs at which they open."""

    groups: tuple[Group, ...]
    lr_scales: tuple[float, ...]
    schedule: Schedule

    def optimiser_groups(self) -> list[dict]:
        """Return the `params` argument of an optimiser: every group that is ever trained, head first."""
        return [{"params": [p for _, p in group.parameters], "name": group.name, "lr_scale": scale}
                for group, scale in zip(self.groups, self.lr_scales)]

    def restrict(self, network: nn.Module) -> None:
        """Let exactly the parameters of all groups of `network` require gradients, whatever their epoch.

        Its convolutions make no other gradients from now on, nor those that `set_stage` switches off.
        """
        trained = {id(p) for group in self.groups for _, p in group.parameters}
        for parameter in network.parameters():
            parameter.requires_grad_(id(parameter) in trained)
        spare_gradients(network)

    def set_stage(self, epoch: int) -> bool:
        """Let the groups that are open at `epoch` require gradients; return whether anything changed."""
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
        """Return the groups with sizes, learning-rate factors and opening epochs, one line each."""
        lines = [f"{'group':<24}{'parameters':>12}{'lr x':>8}  trained from epoch"]
        for group, scale in zip(self.groups, self.lr_scales):
            first = next(s.first_epoch for s in self.schedule.stages if group.name in s.trainable)
            lines.append(f"{group.name:<24}{group.size:>12,}{scale:>8.3g}  {first}")
        return "\n".join(lines)


def constant_plan(groups: tuple[Group, ...]) -> TrainingPlan:
    """Return one stage that trains all of `groups` at one learning rate."""
    return TrainingPlan(groups=groups, lr_scales=(1.0,) * len(groups), schedule=constant([g.name for g in groups]))


def trained_groups(network: nn.Module) -> tuple[Group, ...]:
    """Return the network's groups without the frozen originals of adapted weights."""
    frozen = {id(original(module)) for module in adapted(network).values()}
    return tuple(Group(g.name, tuple((n, p) for n, p in g.parameters if id(p) not in frozen))
                 for g in parameter_groups(network))


def without_encoder(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    """Return head and decoder groups.

    Raises:
        ConfigurationError: the network has no decoder apart from its head.
    """
    decoder = tuple(g for g in groups if g.name == "head" or g.name.startswith("decoder"))
    if len(decoder) < 2:
        raise ConfigurationError("this network has no decoder apart from its head, so nothing separates encoder from "
                                 "decoder; use nnUNetTrainerLoRA, nnUNetTrainerHeadOnly or nnUNetTrainerFineTune.")
    return decoder
