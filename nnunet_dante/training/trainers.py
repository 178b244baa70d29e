"""The trainers, one class a method: `nnUNetv2_train DATASET CONFIGURATION FOLD -p nnUNetDantePlans -tr NAME`."""

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
    """Low-rank factors on all convs, transposed convs and linears; norms, biases, stem and heads in full."""

    method = LoRA()


class nnUNetTrainerLoRADecoder(DanteMixin, nnUNetTrainer):
    """The same on the decoder alone: the encoder is frozen with its norms, backward stops at the bottleneck."""

    method = LoRA(encoder=False)


class nnUNetTrainerLoRAFlat(DanteMixin, nnUNetTrainer):
    """LoRA as for linear layers, each kernel as one matrix: fewer factors, and the form of Hugging Face PEFT."""

    method = LoRA(factorisation="flat")


class nnUNetTrainerDoRA(DanteMixin, nnUNetTrainer):
    """LoRA of the weights' directions, and a magnitude an output channel."""

    method = DoRA()


class nnUNetTrainerLPFT(DanteMixin, nnUNetTrainer):
    """The heads alone for a fifth of the epochs, then LoRA."""

    method = LPFT()


class nnUNetTrainerConvAdapter(DanteMixin, nnUNetTrainer):
    """A parallel 1x1 convolution a convolution, merged into the kernel's centre; and the heads."""

    method = ConvAdapter()


class nnUNetTrainerBitFit(DanteMixin, nnUNetTrainer):
    """All biases, and the heads."""

    method = BitFit()


class nnUNetTrainerNormAffine(DanteMixin, nnUNetTrainer):
    """Scale and shift of all norms, and the heads."""

    method = NormAffine()


class nnUNetTrainerGradualUnfreezing(DanteMixin, nnUNetTrainer):
    """Head, decoder from the output inwards, bottleneck, encoder from deep to shallow; all open at half time."""

    method = GradualUnfreezing()


class nnUNetTrainerGradualUnfreezingDante(DanteMixin, nnUNetTrainer):
    """Dante's schedule and fractions, norms always trained."""

    method = DanteGradualUnfreezing()


class nnUNetTrainerFineTune(DanteMixin, nnUNetTrainer):
    """All weights, with a learning rate that falls towards the input."""

    method = FineTune()


class nnUNetTrainerDecoderOnly(DanteMixin, nnUNetTrainer):
    """Decoder and heads on a frozen encoder."""

    method = DecoderOnly()


class nnUNetTrainerHeadOnly(DanteMixin, nnUNetTrainer):
    """The segmentation heads alone (linear probe)."""

    method = HeadOnly()


class nnUNetTrainerFromScratch(DanteMixin, nnUNetTrainer):
    """Random start, same budget, optimiser and schedule as the others."""

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
    """Two convolutions on the features that enter the head, and the heads; prediction needs this trainer."""

    method = SpatialAdapter()


class nnUNetTrainerAdaptFormer(AddedModulesMixin, nnUNetTrainer):
    """A parallel bottleneck a block, and the heads; prediction needs this trainer."""

    method = AdaptFormer()
