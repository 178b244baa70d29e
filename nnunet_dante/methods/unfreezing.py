"""Methods that train a growing part of the network, in stages."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from .base import COUNT, FLAG, SHARE, Method, one_of
from .groups import Group
from .plan import TrainingPlan, trained_groups, without_encoder
from .schedule import DIRECTIONS, Schedule, Stage, dante_fractions, gradual_unfreezing


@dataclass(frozen=True, kw_only=True)
class GradualUnfreezing(Method):
    """Open the network in stages (ULMFiT, Howard 2018; for U-Nets Amiri 2020 and Dante).

    The norms of a group are frozen and opened with it.

    Args:
        direction: order in which groups open. "output_first": head, decoder from the output inwards, bottleneck,
            encoder. "input_first": head, encoder from the input inwards, bottleneck, decoder.
        max_stages: most stages.
        open_by: share of the epochs after which everything is open.
        full_decoder: the whole decoder is open from the first epoch on, and only the encoder opens in stages.
    """

    LIMITS = {"direction": one_of(*DIRECTIONS), "max_stages": COUNT, "open_by": SHARE, "full_decoder": FLAG}

    direction: str = "output_first"
    max_stages: int = 7
    open_by: float = 0.5
    full_decoder: bool = False

    def plan(self, network: nn.Module) -> TrainingPlan:
        """Return at most `max_stages` stages over all groups."""
        groups = trained_groups(network)
        schedule = gradual_unfreezing([g.name for g in groups], epochs=self.epochs, direction=self.direction,
                                      max_stages=self.max_stages, open_by=self.open_by,
                                      first=len(without_encoder(groups)) if self.full_decoder else 1)
        return TrainingPlan(groups=groups, lr_scales=(1.0,) * len(groups), schedule=schedule)


@dataclass(frozen=True, kw_only=True)
class DanteGradualUnfreezing(Method):
    """Dante's own schedule: after every tenth of the epochs a larger share of the blocks is trained.

    A block is a module that owns parameters, and the block that is registered last opens first. Norms count as blocks,
    but are always trained. Source: dante-trainer 1.0.3b3, arXiv 2605.03602.

    fraction: share of the blocks that is frozen at first. It is not a share of the weights: half of the blocks of a
    default network hold nearly three quarters of its weights. full_decoder: blocks of the decoder are always trained.
    """

    LIMITS = {"fraction": SHARE, "full_decoder": FLAG}

    fraction: float = 0.5
    full_decoder: bool = False

    def plan(self, network: nn.Module) -> TrainingPlan:
        """Return one group per stage: the blocks that open together."""
        decoder = {id(p) for group in without_encoder(trained_groups(network)) for _, p in group.parameters
                   } if self.full_decoder else set()
        blocks = [(always or any(id(p) in decoder for _, p in own), own) for always, own in _blocks(network)]
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
    """Return (whether it is a norm, own parameters) of each module that owns parameters, in the order registered."""
    blocks = []
    for prefix, module in network.named_modules():
        own = [(f"{prefix}.{name}".lstrip("."), p) for name, p in module.named_parameters(recurse=False)]
        if own:
            blocks.append((isinstance(module, _NormBase | nn.GroupNorm | nn.LayerNorm), own))
    return blocks
