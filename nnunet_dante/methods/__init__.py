"""Fine-tuning methods as frozen data: what is trained, from which epoch on, and how fast.

A method never touches nnU-Net. The trainer lets it adapt the network (`Method.adapt`) and then asks for a
`TrainingPlan`. Learning rates and budgets follow the sources named in each class.
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
