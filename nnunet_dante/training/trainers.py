"""The trainers, one class a method: `nnUNetv2_train DATASET CONFIGURATION FOLD -p nnUNetDantePlans -tr NAME`."""

from __future__ import annotations

from ..versions import refuse_unsupported

refuse_unsupported()  # before the imports that fail in other versions of nnU-Net, and do not say why

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

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
from .added import AddedModulesMixin
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


class nnUNetTrainerSpatialAdapter(AddedModulesMixin, nnUNetTrainer):
    """Two convolutions on the features that enter the head, and the heads; prediction needs this trainer."""

    method = SpatialAdapter()


class nnUNetTrainerAdaptFormer(AddedModulesMixin, nnUNetTrainer):
    """A parallel bottleneck a block, and the heads; prediction needs this trainer."""

    method = AdaptFormer()
