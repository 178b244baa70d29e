"""The trainers, one class per method: `nnUNetv2_train DATASET CONFIGURATION FOLD -p nnUNetDantePlans -tr NAME`."""

from __future__ import annotations

from ..versions import refuse_unsupported

refuse_unsupported()  # before the imports that fail in other versions of nnU-Net, and do not say why

from typing import Any

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from torch import nn

from ..errors import ConfigurationError
from ..methods import (
    LPFT,
    AdaptFormer,
    BitFit,
    ConvAdapter,
    DanteGradualUnfreezing,
    DecoderOnly,
    DoRA,
    FineTune,
    FromScratch,
    GradualUnfreezing,
    HeadOnly,
    LoRA,
    NormAffine,
    SpatialAdapter,
)
from ..peft.added_modules import is_added
from .trainer import DanteMixin


class nnUNetTrainerLoRA(DanteMixin, nnUNetTrainer):
    """Train low-rank factors of all convolutions and linear layers; norms, biases, stem and heads in full."""

    method = LoRA()


class nnUNetTrainerLoRADecoder(DanteMixin, nnUNetTrainer):
    """LoRA in the decoder only: the encoder and its norms are frozen, and no gradient goes beyond the bottleneck."""

    method = LoRA(encoder=False)


class nnUNetTrainerLoRAFlat(DanteMixin, nnUNetTrainer):
    """LoRA with each kernel as one matrix: fewer factors, which Hugging Face PEFT can read."""

    method = LoRA(factorisation="flat")


class nnUNetTrainerDoRA(DanteMixin, nnUNetTrainer):
    """LoRA of the directions of the weights, and one trained magnitude per output channel."""

    method = DoRA()


class nnUNetTrainerLPFT(DanteMixin, nnUNetTrainer):
    """Train only the heads for a fifth of the epochs, then everything as LoRA does."""

    method = LPFT()


class nnUNetTrainerConvAdapter(DanteMixin, nnUNetTrainer):
    """Train a parallel 1x1 convolution per convolution, merged into the centre of its kernel; and the heads."""

    method = ConvAdapter()


class nnUNetTrainerBitFit(DanteMixin, nnUNetTrainer):
    """Train all biases, and the heads."""

    method = BitFit()


class nnUNetTrainerNormAffine(DanteMixin, nnUNetTrainer):
    """Train scale and shift of all norms, and the heads."""

    method = NormAffine()


class nnUNetTrainerGradualUnfreezing(DanteMixin, nnUNetTrainer):
    """Open the head, then the decoder from the output inwards, then the encoder; all is open after half the epochs."""

    method = GradualUnfreezing()


class nnUNetTrainerGradualUnfreezingDante(DanteMixin, nnUNetTrainer):
    """Unfreeze with the schedule and the fractions of the Dante paper; norms are always trained."""

    method = DanteGradualUnfreezing()


class nnUNetTrainerFineTune(DanteMixin, nnUNetTrainer):
    """Train all weights, with a learning rate that becomes smaller towards the input."""

    method = FineTune()


class nnUNetTrainerDecoderOnly(DanteMixin, nnUNetTrainer):
    """Train decoder and heads; the encoder is frozen."""

    method = DecoderOnly()


class nnUNetTrainerHeadOnly(DanteMixin, nnUNetTrainer):
    """Train only the segmentation heads (linear probe)."""

    method = HeadOnly()


class nnUNetTrainerFromScratch(DanteMixin, nnUNetTrainer):
    """Train from random weights, with the budget, optimiser and schedule of the others."""

    method = FromScratch()


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
        if not self.was_initialized:
            self.initialize()
        self._hidden.remove()
        self.print_to_log_file(f"What {type(self).__name__} adds to the network cannot be merged into its weights: "
                               f"nnUNetv2_predict needs this trainer, too (`nnunet-dante env`).")
        super().on_train_start()

    def load_checkpoint(self, file: str, /) -> None:
        """Load a checkpoint of this trainer, all of its keys."""
        self.initialize_for_checkpoint()
        self._hidden.remove()
        super().load_checkpoint(file)

    @classmethod
    def built_by(cls, builder: type[nnUNetTrainer]) -> type[DanteMixin]:
        """Refuse: prediction builds this network from the class alone, which does not know the donor's trainer."""
        raise ConfigurationError(f"{cls.__name__} adds modules to the network of the plans, but the donor's network is "
                                 f"built by its trainer {builder.__name__}. Choose another -tr, such as "
                                 f"nnUNetTrainerLoRA.")


def _hide(_: nn.Module, state: dict[str, Any], prefix: str, *__: Any) -> None:
    for key in [key for key in state if is_added(key)]:
        del state[key]


class nnUNetTrainerSpatialAdapter(AddedModulesMixin, nnUNetTrainer):
    """Train two added convolutions in front of the head, and the heads; prediction needs this trainer."""

    method = SpatialAdapter()


class nnUNetTrainerAdaptFormer(AddedModulesMixin, nnUNetTrainer):
    """Train one added parallel bottleneck per block, and the heads; prediction needs this trainer."""

    method = AdaptFormer()
