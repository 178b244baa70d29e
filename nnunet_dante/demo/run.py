"""The demo: pretrain a network on a CT, and adapt it to an MR with `nnunet-dante adapt`."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import nibabel
import numpy as np

from ..adaptation.run import AdaptResult, adapt
from ..adaptation.steps import Steps
from ..errors import ConfigurationError
from ..training.launch import best_device
from .dafne import APPLY, install_dafne
from .data import CT, MR, DemoDataError, fetch_images, writable_cache, write_dataset, write_split

CONFIGURATION, DONOR_PLANS = "3d_fullres", "nnUNetDemoPlans"
PRETRAIN_TRAINER = "nnUNetTrainer_1epoch"
# The learning rate is ten times the default: a small network and 192 steps instead of 25,000.
OPTIONS = {"epochs": 6, "iterations": 32, "val_iterations": 5, "lr": 0.01}
CAVEAT = ("There is one person per modality, and both halves of a spine belong to the same person. So the demo shows "
          "that everything runs, but not how good a method is.")
_MARK = ".nnunet_dante_demo"  # a file with this name shows that a demo wrote this folder and may replace it
_OURS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "logs", "predictions", "images", "cache", "adapt.json")


def run_demo(out: Path, *, data: Path | None = None) -> AdaptResult:
    """Run the demo in the folder `out`; the result is that of `adapt`. An earlier demo in `out` is replaced.

    data: a folder with the images, instead of downloading them (see `data.fetch_images`).

    Raises:
        DemoDataError: the images cannot be found or downloaded.
        ConfigurationError: `out` holds nnU-Net folders that were not written by a demo.
        DanteError: a command failed; the message names its log.
    """
    out = out.resolve()
    _clear(out)
    steps, device = Steps(out, total=4), best_device()
    print(CAVEAT, file=sys.stderr)
    steps.announce("Get a CT and an MR of a spine, cut each into a left and a right case")
    files = fetch_images(out / "images", data=data)
    for modality in (CT, MR):
        write_dataset(out / "nnUNet_raw", modality, files)
    donor = _pretrain(steps, device)
    source = out / "nnUNet_raw" / MR.dataset
    steps.announce(f"Adapt it to the MR: nnunet-dante adapt {donor.relative_to(out)} {source.relative_to(out)} -o .")
    with steps.nnunet_folders():
        result = adapt(donor, source, out, overrides=OPTIONS, device=device)
    _segment_in_dafne(steps, result)
    return result


def _clear(out: Path) -> None:
    """Remove what an earlier demo wrote; all other files in `out` stay.

    Raises:
        ConfigurationError: `out` holds files or folders of the same names that were not written by a demo.
    """
    found = [out / name for name in _OURS if (out / name).exists()]
    if found and not (out / _MARK).exists():
        raise ConfigurationError(f"--out {out} holds {', '.join(path.name for path in found)}, which were not written "
                                 "by a demo and are not overwritten; choose a new folder.")
    for path in found:
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARK).touch()


def _pretrain(steps: Steps, device: str) -> Path:
    """Return the folder of a model that stock nnU-Net has trained on the left half of the CT."""
    steps.announce("Pretrain a small network on the CT with stock nnU-Net, 250 steps")
    steps.run("nnUNetv2_plan_and_preprocess", "-d", 801, "-c", CONFIGURATION, "-npfp", 1, "--no_pp")
    write_split(steps.out / "nnUNet_preprocessed", CT)
    folder = steps.out / "nnUNet_preprocessed" / CT.dataset
    plans = small_plans(json.loads((folder / "nnUNetPlans.json").read_text()))
    (folder / f"{DONOR_PLANS}.json").write_text(json.dumps(plans, indent=2))
    steps.run("nnUNetv2_preprocess", "-d", 801, "-plans_name", DONOR_PLANS, "-c", CONFIGURATION, "-np", 1)
    steps.run("nnUNetv2_train", 801, CONFIGURATION, 0, "-p", DONOR_PLANS, "-tr", PRETRAIN_TRAINER, "-device", device,
              epochs=1)
    return steps.folder("nnUNet_results", CT.dataset, f"{PRETRAIN_TRAINER}__{DONOR_PLANS}__{CONFIGURATION}")


def small_plans(plans: dict) -> dict:
    """Return the plans with a network and patch so small that two CPU cores train it in a minute or two."""
    configuration = plans["configurations"][CONFIGURATION] | {"patch_size": [32, 32, 32], "batch_size": 2,
                                                              "data_identifier": f"{DONOR_PLANS}_{CONFIGURATION}"}
    network = configuration["architecture"]["arch_kwargs"]
    network |= {"n_stages": 3, "features_per_stage": [8, 16, 32], "n_conv_per_stage": [1, 1, 1],
                "n_conv_per_stage_decoder": [1, 1], "strides": [[1] * 3, [2] * 3, [2] * 3],
                "kernel_sizes": [[3] * 3] * 3}
    return plans | {"plans_name": DONOR_PLANS, "configurations": {CONFIGURATION: configuration}}


def _segment_in_dafne(steps: Steps, result: AdaptResult) -> None:
    """Let dafne-dl alone segment with the exported model, and say how far it agrees; if it cannot be had, say why."""
    if result.dafne is None:
        return
    steps.announce("Segment the right half with dafne-dl, where neither nnunet_dante nor nnU-Net can be imported")
    out, name = steps.out, f"{MR.check}.nii.gz"
    try:
        packages = install_dafne(writable_cache(out / "cache"))
    except DemoDataError as error:
        print(error, file=sys.stderr)
        return
    masks = out / "predictions" / "dafne"
    masks.mkdir()
    image = out / "nnUNet_raw" / MR.dataset / "imagesTr" / f"{MR.check}_0000.nii.gz"
    steps.python(APPLY, packages, out / "cache" / "home", result.dafne, image, ",".join(MR.structures), masks / name,
                 name="dafne-dl")
    for file in out.glob(f"nnUNet_results/{MR.dataset}/*/fold_all/validation/{name}"):
        ours, theirs = (np.asanyarray(nibabel.load(path).dataobj) for path in (file, masks / name))
        print(f"      {(ours == theirs).mean():.2%} of the voxels are as nnU-Net labels them (which averages over "
              "mirrored images).", file=sys.stderr)
