"""LoRA on your data set, from Python: transfer a donor, look at the report, train.

    python examples/lora_on_your_data.py MODEL DATASET [CONFIGURATION] [nnU-Net's other training options]

MODEL is a model folder, an exported zip or a checkpoint. DATASET is the number or name of a data set in nnUNet_raw.
"""

import sys

from nnunet_dante import transfer
from nnunet_dante.training.launch import train


def main(model: str, dataset: str, configuration: str = "3d_fullres", *options: str) -> None:
    report = transfer(model, dataset, configuration=configuration, preprocess=True)
    print(report)
    train([dataset, configuration, "0", "-p", "nnUNetDantePlans", "-tr", "nnUNetTrainerLoRA", *options])


if __name__ == "__main__":  # nnU-Net starts processes that import this file again
    main(*sys.argv[1:])
