"""Fine-tuning methods: what is trained, from which epoch on, and how fast. Each is a frozen dataclass of options.

A method does not know nnU-Net. The trainer lets it change the network (`Method.adapt`) and then asks what to train
(`Method.plan`). Learning rates and numbers of epochs follow the sources that each class names.
"""

from .base import Method, ParameterEfficient
from .low_rank import LPFT, DoRA, LoRA
from .nonlinear import AdaptFormer, SpatialAdapter
from .plan import TrainingPlan
from .selective import BitFit, ConvAdapter, DecoderOnly, FineTune, FromScratch, HeadOnly, NormAffine
from .unfreezing import DanteGradualUnfreezing, GradualUnfreezing

__all__ = ["AdaptFormer", "BitFit", "ConvAdapter", "DanteGradualUnfreezing", "DecoderOnly", "DoRA", "FineTune",
           "FromScratch", "GradualUnfreezing", "HeadOnly", "LPFT", "LoRA", "Method", "NormAffine", "ParameterEfficient",
           "SpatialAdapter", "TrainingPlan"]
