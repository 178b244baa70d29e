"""Methods that train small nonlinear modules in a frozen network. The modules stay in the network."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from ..peft.added_modules import add_behind, add_beside, added_modules
from .base import Method
from .groups import blocks, features_of_head, head_modules
from .plan import TrainingPlan, constant_plan, heads_and


@dataclass(frozen=True, kw_only=True)
class _WithAddedModules(Method):
    needs_decoder: ClassVar[bool] = True

    weight_decay: float = 0.0

    def plan(self, network: nn.Module) -> TrainingPlan:
        """Return one stage: the added modules and the heads."""
        added = {id(p) for module in added_modules(network).values() for p in module.parameters()}
        return constant_plan(heads_and(network, lambda _, parameter: id(parameter) in added))


@dataclass(frozen=True, kw_only=True)
class SpatialAdapter(_WithAddedModules):
    """Train two convolutions on the features that the full-resolution head reads, and the heads (FSEFT's "black box").

    The other weights of the network are not changed, and the backward pass ends at its features. The heads are trained
    as in FSEFT, where a linear head that starts as the donor's follows the adapter. Learning rate and weight decay are
    FSEFT's.
    """

    lr: float = 1e-4

    def adapt(self, network: nn.Module) -> None:
        """Add the convolutions, unless the network was built with them."""
        if not added_modules(network):
            head: Any = head_modules(network)[-1]
            add_behind(network, features_of_head(network), dimension=head.weight.ndim - 2, channels=head.in_channels)


@dataclass(frozen=True, kw_only=True)
class AdaptFormer(_WithAddedModules):
    """Train one parallel bottleneck per block, and the heads (Chen 2022; width, scale, rate and decay of FSEFT).

    In a transformer such as Primus, the bottleneck is parallel to the MLP of each block, as in FSEFT. In a U-Net it is
    parallel to each convolution with its norm and activation, or to each residual block as a whole.

    Width and scale are attributes of the class, not options, because prediction builds the network from the trainer's
    class alone.
    """

    width: ClassVar[int] = 16
    scale: ClassVar[float] = 0.1
    lr: float = 1e-2

    def adapt(self, network: nn.Module) -> None:
        """Add the bottlenecks, unless the network was built with them."""
        if not added_modules(network):
            add_beside(network, blocks(network), width=self.width, scale=self.scale)


ADDING_TRAINERS: dict[str, Method] = {"nnUNetTrainerSpatialAdapter": SpatialAdapter(),
                                      "nnUNetTrainerAdaptFormer": AdaptFormer()}
"""Trainer name -> the method that adds modules to its networks. With it a network is built without the trainer."""


def added_by(trainer_name: str) -> dict[str, Any]:
    """Return the name of the modules that a trainer adds to its network, with the numbers that shape them.

    The result is {"adaptformer": {"width": 16, "scale": 0.1}}, {"spatial_adapter": True}, or {} for other trainers.
    """
    method = ADDING_TRAINERS.get(trainer_name)
    if isinstance(method, AdaptFormer):
        return {"adaptformer": {"width": method.width, "scale": method.scale}}
    return {"spatial_adapter": True} if isinstance(method, SpatialAdapter) else {}
