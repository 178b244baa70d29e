"""The mixin for methods whose modules stay in the network: nnU-Net must build the network with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..methods import AdaptFormer, SpatialAdapter
from ..peft.added_modules import is_added
from .trainer import DanteMixin


class AddedModulesMixin(DanteMixin):
    """Fine-tune with a method that leaves modules in the network; otherwise as `DanteMixin`.

    The other methods adapt a network that nnU-Net has built. These modules cannot be merged into stock weights, so
    training and prediction must build the network with them: checkpoints name this very trainer, and whoever predicts
    needs it in `nnUNet_extTrainer`. What shapes the network comes from the class alone, not from the plans' overrides:
    prediction sees the class.
    """

    @classmethod
    def build_network_architecture(cls, plans_manager: Any, configuration_manager: Any, num_input_channels: int,
                                   num_output_channels: int, enable_deep_supervision: bool = True) -> nn.Module:
        """Return the stock trainer's network with the method's modules, which do nothing yet."""
        network = super().build_network_architecture(plans_manager, configuration_manager, num_input_channels,
                                                     num_output_channels, enable_deep_supervision)
        cls.method.adapt(network)
        return network

    @property
    def stock_trainer_name(self) -> str:
        """The name of this trainer: no stock trainer builds this network."""
        return type(self).__name__

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        """Until training starts, show stock keys only: `-pretrained_weights` demands every key it sees of its file."""
        optimizer, scheduler = super().configure_optimizers()
        self._hidden = self.bare_network.register_state_dict_post_hook(_hide)
        return optimizer, scheduler

    def on_train_start(self) -> None:
        """Show all keys again, then start."""
        self._show_all_keys()
        self.print_to_log_file(f"What {type(self).__name__} adds to the network cannot be merged into its weights: "
                               f"nnUNetv2_predict needs this trainer, too (`nnunet-dante env`).")
        super().on_train_start()

    def load_checkpoint(self, filename_or_checkpoint: str) -> None:
        """Load a checkpoint of this trainer, all of its keys."""
        self._show_all_keys()
        super().load_checkpoint(filename_or_checkpoint)

    def _show_all_keys(self) -> None:
        if not self.was_initialized:
            self.initialize()
        self._hidden.remove()


def _hide(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    for key in [key for key in state if is_added(key)]:
        del state[key]


def added_by(trainer_name: str) -> dict[str, Any]:
    """Return what a trainer of this package adds, by the name of the modules and with the numbers that shape them.

    {"adaptformer": {"width": 16, "scale": 0.1}}, {"spatial_adapter": True}, or {} for every other trainer.
    """
    from . import trainers  # they import this module

    method = getattr(getattr(trainers, trainer_name, None), "method", None)
    if isinstance(method, AdaptFormer):
        return {"adaptformer": {"width": method.width, "scale": method.scale}}
    return {"spatial_adapter": True} if isinstance(method, SpatialAdapter) else {}
