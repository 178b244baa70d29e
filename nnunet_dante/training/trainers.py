"""The trainers, one class per method: `nnUNetv2_train DATASET CONFIGURATION FOLD -p nnUNetDantePlans -tr NAME`."""

from __future__ import annotations

from ..versions import refuse_unsupported

refuse_unsupported()  # comes before imports that fail in other versions of nnU-Net with an unclear message

from typing import Any

import torch
from batchgenerators.dataloading.multi_threaded_augmenter import MultiThreadedAugmenter
from batchgenerators.dataloading.nondet_multi_threaded_augmenter import NonDetMultiThreadedAugmenter
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name
from torch import nn

from .. import methods
from ..errors import ConfigurationError
from ..peft.added_modules import is_added
from .trainer import DanteMixin


class nnUNetTrainerLoRA(DanteMixin, nnUNetTrainer):
    """Train low-rank factors of all convolutions and linear layers; norms, biases, stem and heads in full."""

    method = methods.LoRA()


class nnUNetTrainerLoRADecoder(DanteMixin, nnUNetTrainer):
    """Train low-rank factors in the decoder only; the encoder and its norms are frozen and receive no gradient."""

    method = methods.LoRA(encoder=False)


class nnUNetTrainerLoRAFlat(DanteMixin, nnUNetTrainer):
    """LoRA that factorises each kernel as one matrix: fewer numbers, in a form that Hugging Face PEFT can read."""

    method = methods.LoRA(factorisation="flat")


class nnUNetTrainerDoRA(DanteMixin, nnUNetTrainer):
    """Train low-rank factors for the directions of the weights, and one magnitude per output channel."""

    method = methods.DoRA()


class nnUNetTrainerLPFT(DanteMixin, nnUNetTrainer):
    """Train only the heads for a fifth of the epochs, then everything as LoRA does."""

    method = methods.LPFT()


class nnUNetTrainerConvAdapter(DanteMixin, nnUNetTrainer):
    """Train the heads, and a 1x1 convolution parallel to each convolution, merged into the centre of its kernel."""

    method = methods.ConvAdapter()


class nnUNetTrainerBitFit(DanteMixin, nnUNetTrainer):
    """Train all biases, and the heads."""

    method = methods.BitFit()


class nnUNetTrainerNormAffine(DanteMixin, nnUNetTrainer):
    """Train scale and shift of all norms, and the heads."""

    method = methods.NormAffine()


class nnUNetTrainerGradualUnfreezing(DanteMixin, nnUNetTrainer):
    """Train the heads, then also the decoder, from the output inwards, then the encoder; all after half the epochs."""

    method = methods.GradualUnfreezing()


class nnUNetTrainerGradualUnfreezingDante(DanteMixin, nnUNetTrainer):
    """Unfreeze with the schedule and the fractions of the Dante paper; norms are always trained."""

    method = methods.DanteGradualUnfreezing()


class nnUNetTrainerFineTune(DanteMixin, nnUNetTrainer):
    """Train all weights, with a learning rate that becomes smaller towards the input."""

    method = methods.FineTune()


class nnUNetTrainerDecoderOnly(DanteMixin, nnUNetTrainer):
    """Train decoder and heads; the encoder is frozen."""

    method = methods.DecoderOnly()


class nnUNetTrainerHeadOnly(DanteMixin, nnUNetTrainer):
    """Train only the segmentation heads (linear probe)."""

    method = methods.HeadOnly()


class nnUNetTrainerFromScratch(DanteMixin, nnUNetTrainer):
    """Train from random weights, with the budget, optimiser and schedule of the others."""

    method = methods.FromScratch()


class AddedModulesMixin(DanteMixin):
    """Fine-tune with a method that adds modules to the network; otherwise like `DanteMixin`.

    The modules cannot be merged into stock weights, so training and prediction must build the network with them. That
    is why checkpoints name this trainer, and prediction needs it in `nnUNet_extTrainer`. The shape of the network
    depends only on the class, not on overrides in the plans, because prediction knows only the class.
    """

    @classmethod
    def build_network_architecture(cls, plans_manager: Any, configuration_manager: Any, num_input_channels: int,
                                   num_output_channels: int, enable_deep_supervision: bool = True) -> nn.Module:
        """Return the stock trainer's network with the method's modules, which at first do not change its output."""
        network = super().build_network_architecture(plans_manager, configuration_manager, num_input_channels,
                                                     num_output_channels, enable_deep_supervision)
        cls.method.adapt(network)
        return network

    @property
    def stock_trainer_name(self) -> str:
        """The name of this trainer, because no stock trainer builds this network."""
        return type(self).__name__

    def configure_optimizers(self) -> tuple[torch.optim.Optimizer, Any]:
        """Hide the keys of the added modules until the training starts: a file for -pretrained_weights lacks them."""
        optimizer, scheduler = super().configure_optimizers()
        self._hidden = self.bare_network.register_state_dict_post_hook(_hide)
        return optimizer, scheduler

    def on_train_start(self) -> None:
        """Show all keys again, and start the training."""
        if not self.was_initialized:
            self.initialize()
        self._hidden.remove()
        self.print_to_log_file(f"What {type(self).__name__} adds to the network cannot be merged into its weights: "
                               f"nnUNetv2_predict needs this trainer, too (`nnunet-dante env`).")
        super().on_train_start()

    def load_checkpoint(self, file: str, /) -> None:
        """Load a checkpoint of this trainer with all keys."""
        self.initialize_for_checkpoint()
        self._hidden.remove()
        super().load_checkpoint(file)

    @classmethod
    def built_by(cls, builder: type[nnUNetTrainer]) -> type[DanteMixin]:
        """Refuse, because prediction builds the network from this class alone, without the donor's trainer."""
        raise ConfigurationError(f"{cls.__name__} adds modules to the network of the plans, but the donor's network is "
                                 f"built by its trainer {builder.__name__}. Choose another -tr, such as "
                                 f"nnUNetTrainerLoRA.")


def _hide(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    for key in [key for key in state if is_added(key)]:
        del state[key]


class nnUNetTrainerSpatialAdapter(AddedModulesMixin, nnUNetTrainer):
    """Train two added convolutions in front of the head, and the heads; prediction needs this trainer."""

    method = methods.SpatialAdapter()


class nnUNetTrainerAdaptFormer(AddedModulesMixin, nnUNetTrainer):
    """Train one added parallel bottleneck per block, and the heads; prediction needs this trainer."""

    method = methods.AdaptFormer()


TRAINERS: dict[str, Any] = {name: value for name, value in [*globals().items()]
                            if name.startswith("nnUNetTrainer") and value is not nnUNetTrainer}


def end_loaders(trainer: nnUNetTrainer) -> None:
    """End the workers that load data for a trainer whose training does not run to its end, as nnU-Net ends them."""
    for loader in (trainer.dataloader_train, trainer.dataloader_val):
        if isinstance(loader, (NonDetMultiThreadedAugmenter, MultiThreadedAugmenter)):
            loader._finish()


def find_trainer(name: str) -> Any:
    """Return a trainer class, as nnU-Net's search does; this package's own ones without that search.

    The search takes a second or more: it imports all of nnU-Net's trainers before it looks into nnUNet_extTrainer.

    Raises:
        RuntimeError, AssertionError: there is no such trainer.
    """
    return TRAINERS.get(name) or recursive_find_trainer_class_by_name(name)
