"""Fine-tuning methods as frozen data: what is trained, from which epoch on, and how fast.

A method never touches nnU-Net. The trainer asks it for the modules to adapt (`low_rank_modules`) and, once these
are adapted, for a `TrainingPlan`. Learning rates and budgets follow the sources named in each class.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .errors import ConfigurationError
from .freezing.groups import Group, low_rank_targets, parameter_groups
from .freezing.schedule import Schedule, Stage, constant, dante_fractions, gradual_unfreezing
from .peft.inject import adapted, original


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
        """Let exactly the parameters of all groups of `network` require gradients, whatever their epoch."""
        trained = {id(p) for group in self.groups for _, p in group.parameters}
        for parameter in network.parameters():
            parameter.requires_grad_(id(parameter) in trained)

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

    def low_rank_modules(self, network: nn.Module) -> Iterable[nn.Module]:
        """Return the modules whose weight gets low-rank factors instead of being trained itself."""
        return ()

    def plan(self, network: nn.Module) -> TrainingPlan:
        """Return what to train in `network`, whose low-rank modules have been adapted already."""
        return self._constant_plan(trained_groups(network))

    def _constant_plan(self, groups: tuple[Group, ...]) -> TrainingPlan:
        return TrainingPlan(groups=groups, lr_scales=(1.0,) * len(groups), schedule=constant([g.name for g in groups]))


def trained_groups(network: nn.Module) -> tuple[Group, ...]:
    """Return the network's groups without the frozen originals of adapted weights."""
    frozen = {id(original(module)) for module in adapted(network).values()}
    return tuple(Group(g.name, tuple((n, p) for n, p in g.parameters if id(p) not in frozen))
                 for g in parameter_groups(network))


def _without_encoder(groups: tuple[Group, ...]) -> tuple[Group, ...]:
    decoder = tuple(g for g in groups if g.name == "head" or g.name.startswith("decoder"))
    if len(decoder) < 2:
        raise ConfigurationError("this network has no decoder apart from its head, so nothing separates encoder from "
                                 "decoder; use nnUNetTrainerLoRA, nnUNetTrainerHeadOnly or nnUNetTrainerFineTune.")
    return decoder


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
        trained = {id(p) for g in _without_encoder(parameter_groups(network)) for _, p in g.parameters}
        return tuple(m for m in targets if id(m.weight) in trained)

    def plan(self, network: nn.Module) -> TrainingPlan:
        """Return one stage: factors and small tensors of all groups, or of head and decoder."""
        groups = trained_groups(network)
        return self._constant_plan(groups if self.encoder else _without_encoder(groups))


@dataclass(frozen=True, kw_only=True)
class GradualUnfreezing(Method):
    """Open the network in stages (ULMFiT; for U-Nets Dante and Amiri 2020); a closed group closes its norms too.

    direction: "output_first" opens head, decoder from the output inwards, bottleneck, encoder; "input_first" opens
    head, encoder from the input inwards, bottleneck, decoder. open_by: share of the epochs after which all is open.
    """

    direction: str = "output_first"
    max_stages: int = 7
    open_by: float = 0.5

    def plan(self, network: nn.Module) -> TrainingPlan:
        """Return at most `max_stages` stages over all groups."""
        groups = trained_groups(network)
        schedule = gradual_unfreezing([g.name for g in groups], epochs=self.epochs, direction=self.direction,
                                      max_stages=self.max_stages, open_by=self.open_by)
        return TrainingPlan(groups=groups, lr_scales=(1.0,) * len(groups), schedule=schedule)


@dataclass(frozen=True, kw_only=True)
class DanteGradualUnfreezing(Method):
    """Dante's own schedule: every tenth of the epochs a larger share of the blocks, last registered block first.

    A block is a module that owns parameters; norms count as blocks but are always trained. fraction: share of blocks
    frozen at first. Shares of blocks are not shares of weights (half the blocks of a default network hold nearly three
    quarters of them). Source: dante-trainer 1.0.3b3, arXiv 2605.03602.
    """

    fraction: float = 0.5

    def plan(self, network: nn.Module) -> TrainingPlan:
        """Return one group a stage: the blocks that open together."""
        blocks = _blocks(network)
        first_open = len(blocks)
        names: list[str] = []
        groups, stages = [], []
        for first_epoch, share in dante_fractions(epochs=self.epochs, fraction=self.fraction):
            n = len(blocks)
            opens = int(n * self.fraction) if first_epoch == 0 else n - int(n * share)
            new = [entry for i, (norm, own) in enumerate(blocks) for entry in own
                   if (norm and not names) or (not norm and opens <= i < first_open)]
            first_open = opens
            if new:
                names.append(f"opens at epoch {first_epoch}")
                groups.append(Group(names[-1], tuple(new)))
                stages.append(Stage(first_epoch, tuple(names)))
        return TrainingPlan(groups=tuple(groups), lr_scales=(1.0,) * len(groups), schedule=Schedule(tuple(stages)))


def _blocks(network: nn.Module) -> list[tuple[bool, list[tuple[str, nn.Parameter]]]]:
    """Return (is a norm, own parameters) of every module that owns parameters, once each, in registration order."""
    blocks = []
    for prefix, module in network.named_modules():
        own = [(f"{prefix}.{name}".lstrip("."), p) for name, p in module.named_parameters(recurse=False)]
        if own:
            blocks.append((isinstance(module, _NormBase | nn.GroupNorm | nn.LayerNorm), own))
    return blocks


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
        return self._constant_plan(_without_encoder(trained_groups(network)))


@dataclass(frozen=True, kw_only=True)
class HeadOnly(Method):
    """Train the segmentation heads alone: FSEFT's linear probe, and its learning rate."""

    lr: float = 1e-2
    weight_decay: float = 0.0

    def plan(self, network: nn.Module) -> TrainingPlan:
        """Return one stage: the heads."""
        return self._constant_plan(tuple(g for g in trained_groups(network) if g.name == "head"))


@dataclass(frozen=True, kw_only=True)
class FromScratch(Method):
    """Train all weights from a random start with the same budget and schedule: the fair baseline."""

    uses_start_weights: bool = False
