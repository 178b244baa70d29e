"""Share only what you trained: write the adapter, and rebuild the model from base and adapter.

    python examples/share_an_adapter.py FOLD_FOLDER START_WEIGHTS OUTPUT_FOLDER

FOLD_FOLDER holds checkpoint_final.pth of a LoRA training. START_WEIGHTS is the file that `transfer` wrote beside the
plans; your colleague gets the same file by the same transfer of the same donor.
"""

import sys
from pathlib import Path

import torch

from nnunet_dante.adapters.adapter import apply, extract, info


def main(fold_folder: str, start_weights: str, output_folder: str) -> None:
    trained, output = Path(fold_folder, "checkpoint_final.pth"), Path(output_folder)
    extract(trained, output / "adapter.safetensors")
    print(info(output / "adapter.safetensors"))
    apply(start_weights, output / "adapter.safetensors", output / "rebuilt.pth")

    before, after = (torch.load(f, weights_only=False)["network_weights"] for f in (trained, output / "rebuilt.pth"))
    difference = max((before[k] - after[k]).abs().max().item() for k in before)
    size = (output / "adapter.safetensors").stat().st_size / 2**20
    print(f"adapter: {size:.2f} MiB; largest difference of a rebuilt weight: {difference:g}")


if __name__ == "__main__":
    main(*sys.argv[1:])
