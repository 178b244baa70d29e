"""Methods that train small nonlinear modules on a frozen network; the modules stay in it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..peft.added_modules import add_behind, add_beside, added_modules
from .base import Method
from .groups import Group, blocks, features_of_head, head_modules
from .plan import TrainingPlan, constant_plan, trained_groups


@dataclass(frozen=True, kw_only=True)
class SpatialAdapter(Method):
    """Train two convolutions on the features that enter the full-resolution head, and the heads: FSEFT's black box.

    The network's own weights are untouched, and backward stops at its features. The heads are trained too, as in FSEFT,
    where a linear head that starts as the donor's rows follows the adapter. Learning rate and decay are FSEFT's.
    """

    lr: float = 1e-4
    weight_decay: float = 0.0

    def adapt(self, network: nn.Module) -> None:
        """Add the convolutions; a network that was built with them is left as it is."""
        if not added_modules(network):
            head: Any = head_modules(network)[-1]
            add_behind(network, features_of_head(network), dimension=head.weight.ndim - 2, channels=head.in_channels)

    def plan(self, network: nn.Module) -> TrainingPlan:
        """Return one stage: the added convolutions and the heads."""
        return constant_plan(_added_and_heads(network))


@dataclass(frozen=True, kw_only=True)
class AdaptFormer(Method):
    """Train a parallel bottleneck a block, and the heads (Chen 2022; width, scale, rate and decay of FSEFT).

    FSEFT puts it parallel to the MLP of a transformer block, which is where it stands in a Primus. In a U-Net it stands
    beside each convolution with its norm and activation, and beside each residual block as a whole. Width and scale
    belong to the class and are no options: prediction rebuilds the network from the trainer's class alone.
    """

    width: ClassVar[int] = 16
    scale: ClassVar[float] = 0.1
    lr: float = 1e-2
    weight_decay: float = 0.0

    def adapt(self, network: nn.Module) -> None:
        """Add the bottlenecks; a network that was built with them is left as it is."""
        if not added_modules(network):
            add_beside(network, blocks(network), width=self.width, scale=self.scale)

    def plan(self, network: nn.Module) -> TrainingPlan:
        """Return one stage: the bottlenecks and the heads."""
        return constant_plan(_added_and_heads(network))


def _added_and_heads(network: nn.Module) -> tuple[Group, ...]:
    """Return the network's groups with their added parameters alone, and the head in full; empty ones are left out."""
    added = {id(p) for module in added_modules(network).values() for p in module.parameters()}
    groups = (Group(g.name, tuple((n, p) for n, p in g.parameters if g.name == "head" or id(p) in added))
              for g in trained_groups(network))
    return tuple(group for group in groups if group.parameters)


ADDING_TRAINERS: dict[str, Method] = {"nnUNetTrainerSpatialAdapter": SpatialAdapter(),
                                      "nnUNetTrainerAdaptFormer": AdaptFormer()}
"""Trainer name -> the method whose modules its networks have. Who builds such a network needs no trainer for it."""


def added_by(trainer_name: str) -> dict[str, Any]:
    """Return what a trainer adds to its network: the name of the modules, and the numbers that shape them.

    {"adaptformer": {"width": 16, "scale": 0.1}}, {"spatial_adapter": True}, or {} for every other trainer.
    """
    method = ADDING_TRAINERS.get(trainer_name)
    if isinstance(method, AdaptFormer):
        return {"adaptformer": {"width": method.width, "scale": method.scale}}
    return {"spatial_adapter": True} if isinstance(method, SpatialAdapter) else {}
