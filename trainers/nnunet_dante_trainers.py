"""nnU-Net finds the trainers here: `nnUNet_extTrainer` points at this folder (see `nnunet-dante env`).

nnU-Net drops this module from memory after its search, so the classes themselves live in the installed package.
"""

from nnunet_dante.training.trainers import *  # noqa: F403
