"""Fine-tuning methods as frozen data: what is trained, from which epoch on, and how fast.

A method never touches nnU-Net. The trainer lets it adapt the network (`Method.adapt`) and then asks for a
`TrainingPlan`. Learning rates and budgets follow the sources named in each class.
"""

from .base import Method
from .bottleneck import AdaptFormer, SpatialAdapter
from .low_rank import LoRA
from .plan import TrainingPlan
from .selective import DecoderOnly, FineTune, FromScratch, HeadOnly
from .unfreezing import DanteGradualUnfreezing, GradualUnfreezing

__all__ = ["AdaptFormer", "DanteGradualUnfreezing", "DecoderOnly", "FineTune", "FromScratch", "GradualUnfreezing",
           "HeadOnly", "LoRA", "Method", "SpatialAdapter", "TrainingPlan"]
