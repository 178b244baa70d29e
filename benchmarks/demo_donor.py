"""The donor of `nnunet-dante demo`: stock nnU-Net trains a small network on one half of the demo's CT, 1,250 steps.

    python benchmarks/demo_donor.py OUT      # writes nnunet_dante/demo/donor; OUT keeps nnU-Net's folders; minutes

nnU-Net draws patches without a seed, so each run gives another donor of about the same Dice.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch

from nnunet_dante.adaptation.steps import Steps
from nnunet_dante.demo.data import CT, fetch_images, write_dataset
from nnunet_dante.demo.run import DONOR
from nnunet_dante.training.launch import best_device

TRAINER, PLANS, CONFIGURATION = DONOR.name.split("__")
KEPT = ("network_weights", "init_args", "trainer_name", "inference_allowed_mirroring_axes")


def small_plans(plans: dict) -> dict:
    """Return the plans with a network and patch so small that two CPU cores train it in a minute or two."""
    configuration = plans["configurations"][CONFIGURATION] | {"patch_size": [32, 32, 32], "batch_size": 2,
                                                              "data_identifier": f"{PLANS}_{CONFIGURATION}"}
    network = configuration["architecture"]["arch_kwargs"]
    network |= {"n_stages": 3, "features_per_stage": [8, 16, 32], "n_conv_per_stage": [1, 1, 1],
                "n_conv_per_stage_decoder": [1, 1], "strides": [[1] * 3, [2] * 3, [2] * 3],
                "kernel_sizes": [[3] * 3] * 3}
    return plans | {"plans_name": PLANS, "configurations": {CONFIGURATION: configuration}}


def pretrain(steps: Steps) -> Path:
    """Return the folder of the model."""
    write_dataset(steps.out / "nnUNet_raw", CT, fetch_images(steps.out / "images"))
    steps.run("nnUNetv2_plan_and_preprocess", "-d", 801, "-c", CONFIGURATION, "-npfp", 1, "--no_pp")
    folder = steps.out / "nnUNet_preprocessed" / CT.dataset
    (folder / "splits_final.json").write_text(json.dumps([{"train": [CT.train], "val": [CT.check]}]))
    plans = small_plans(json.loads((folder / "nnUNetPlans.json").read_text()))
    (folder / f"{PLANS}.json").write_text(json.dumps(plans, indent=2))
    steps.run("nnUNetv2_preprocess", "-d", 801, "-plans_name", PLANS, "-c", CONFIGURATION, "-np", 1)
    steps.run("nnUNetv2_train", 801, CONFIGURATION, 0, "-p", PLANS, "-tr", TRAINER, "-device", best_device(), epochs=5)
    return steps.folder("nnUNet_results", CT.dataset, DONOR.name)


def write_donor(model: Path) -> None:
    """Write what the demo needs of a model folder: plans, dataset.json, and the weights without the optimiser."""
    shutil.rmtree(DONOR, ignore_errors=True)
    (DONOR / "fold_0").mkdir(parents=True)
    for name in ("plans.json", "dataset.json"):
        shutil.copy(model / name, DONOR)
    content = torch.load(model / "fold_0" / "checkpoint_final.pth", map_location="cpu", weights_only=False)
    torch.save({key: content[key] for key in KEPT}, DONOR / "fold_0" / "checkpoint_final.pth")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    write_donor(pretrain(Steps(parser.parse_args().out.resolve(), total=1)))


if __name__ == "__main__":
    main()
