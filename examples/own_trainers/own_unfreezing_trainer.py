"""A trainer with a schedule of its own: the encoder opens first, and after a third of 60 epochs everything is open.

Let nnU-Net find it together with the others, then train with `-tr nnUNetTrainerInputFirst`:

    export nnUNet_extTrainer="/path/to/examples/own_trainers"
    eval "$(nnunet-dante env)"
"""

from nnunet_dante import GradualUnfreezing
from nnunet_dante.training.trainers import nnUNetTrainerGradualUnfreezing


class nnUNetTrainerInputFirst(nnUNetTrainerGradualUnfreezing):
    method = GradualUnfreezing(direction="input_first", open_by=1 / 3, epochs=60)
