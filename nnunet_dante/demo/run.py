"""The demo: pretrain on CT, transfer to MR, fine-tune in three ways, predict with stock nnU-Net, write a report."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import nibabel
import numpy as np
import torch

from ..adaptation.steps import Steps
from ..adapters.adapter import remove
from ..compare.report import Block, Code, Heading, Text, write_report
from ..compare.sources import Source, read_fold, score_masks
from ..compare.tables import Table
from ..errors import ConfigurationError
from .dafne import APPLY, install_dafne
from .data import CT, MR, DemoDataError, fetch_images, writable_cache, write_dataset, write_split

CONFIGURATION, FOLD, PLANS, DONOR_PLANS = "3d_fullres", "0", "nnUNetDantePlans", "nnUNetDemoPlans"
PRETRAIN_TRAINER, PRETRAIN_EPOCHS = "nnUNetTrainer_5epochs", 5
EPOCHS, ITERATIONS, VAL_ITERATIONS = 12, 16, 5
LEARNING_RATE = 0.01  # ten times the default: a small network and 192 steps instead of 25,000
METHODS = {"LoRA": "nnUNetTrainerLoRA", "gradual unfreezing": "nnUNetTrainerGradualUnfreezing",
           "from scratch": "nnUNetTrainerFromScratch"}
BEFORE, IN_DAFNE = "before training", "LoRA in Dafne"
CAVEAT = ("There is one person per modality, and both halves of a spine belong to the same person. So the demo shows "
          "that everything runs, but not how good a method is.")
_MARK = ".nnunet_dante_demo"  # a file with this name shows that a demo wrote this folder and may replace it


def run_demo(out: Path, *, data: Path | None = None) -> Path:
    """Run the demo in the folder `out`, and return the path of report.md. An earlier demo in `out` is replaced.

    data: a folder with the images, instead of downloading them (see `data.fetch_images`).

    Raises:
        DemoDataError: the images cannot be found or downloaded.
        ConfigurationError: `out` holds nnU-Net folders that were not written by a demo.
        DanteError: a command failed; the message names its log.
    """
    out = out.resolve()
    _clear(out)
    steps = Steps(out, total=8)
    print(CAVEAT, file=sys.stderr)
    _prepare(steps, data)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _pretrain(steps, device)
    _transfer(steps)
    for name, trainer in METHODS.items():
        steps.announce(f"Fine-tune on MR: {name}, {EPOCHS} epochs of {ITERATIONS} steps")
        steps.run("nnunet-dante", "train", 802, CONFIGURATION, FOLD, "-p", PLANS, "-tr", trainer, "-device", device,
                  epochs=EPOCHS)
    steps.announce("Predict the check case with stock nnUNetv2_predict, where nnunet_dante cannot be imported")
    predictions = _predictions()
    _predict(steps, predictions, device)
    steps.announce("Export the LoRA model to Dafne, segment the check case with dafne-dl alone; write the report")
    if _segment_in_dafne(steps):
        predictions |= {IN_DAFNE: Path("predictions", IN_DAFNE.replace(" ", "_"))}
    return _report(steps, predictions)


def _clear(out: Path) -> None:
    """Remove the folders of an earlier demo; all other files in `out` stay.

    Raises:
        ConfigurationError: `out` holds folders of the same names that were not written by a demo.
    """
    ours = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "logs", "predictions", "images", "cache")
    found = [name for name in ours if (out / name).exists()]
    if found and not (out / _MARK).exists():
        raise ConfigurationError(f"--out {out} holds {', '.join(found)}, which were not written by a demo and are not "
                                 f"overwritten; choose a new folder.")
    for name in found:
        shutil.rmtree(out / name)
    out.mkdir(parents=True, exist_ok=True)
    (out / _MARK).touch()


def _prepare(steps: Steps, data: Path | None) -> None:
    steps.announce("Get a CT and an MR of a spine, cut each into a left and a right case")
    files = fetch_images(steps.out / "images", data=data)
    for modality in (CT, MR):
        write_dataset(steps.out / "nnUNet_raw", modality, files)
        write_split(steps.out / "nnUNet_preprocessed", modality)


def _pretrain(steps: Steps, device: str) -> None:
    steps.announce(f"Pretrain a small network on CT with stock nnU-Net, {PRETRAIN_EPOCHS} epochs of 250 steps")
    steps.run("nnUNetv2_plan_and_preprocess", "-d", 801, "-c", CONFIGURATION, "-npfp", 1, "--no_pp")
    folder = steps.out / "nnUNet_preprocessed" / CT.dataset
    plans = _small(json.loads((folder / "nnUNetPlans.json").read_text()))
    (folder / f"{DONOR_PLANS}.json").write_text(json.dumps(plans, indent=2))
    steps.run("nnUNetv2_preprocess", "-d", 801, "-plans_name", DONOR_PLANS, "-c", CONFIGURATION, "-np", 1)
    steps.run("nnUNetv2_train", 801, CONFIGURATION, FOLD, "-p", DONOR_PLANS, "-tr", PRETRAIN_TRAINER, "-device", device,
              epochs=PRETRAIN_EPOCHS)


def _small(plans: dict) -> dict:
    """Return the plans with a network and patch so small that two CPU cores train it in a minute or two."""
    configuration = plans["configurations"][CONFIGURATION] | {"patch_size": [32, 32, 32], "batch_size": 2,
                                                              "data_identifier": f"{DONOR_PLANS}_{CONFIGURATION}"}
    network = configuration["architecture"]["arch_kwargs"]
    network |= {"n_stages": 3, "features_per_stage": [8, 16, 32], "n_conv_per_stage": [1, 1, 1],
                "n_conv_per_stage_decoder": [1, 1], "strides": [[1] * 3, [2] * 3, [2] * 3],
                "kernel_sizes": [[3] * 3] * 3}
    return plans | {"plans_name": DONOR_PLANS, "configurations": {CONFIGURATION: configuration}}


def _donor(out: Path) -> Path:
    return out / "nnUNet_results" / CT.dataset / f"{PRETRAIN_TRAINER}__{DONOR_PLANS}__{CONFIGURATION}"


def _fold(out: Path, trainer: str) -> Path:
    return out / "nnUNet_results" / MR.dataset / f"{trainer}__{PLANS}__{CONFIGURATION}" / f"fold_{FOLD}"


def _predictions() -> dict[str, Path]:
    return {name: Path("predictions", name.replace(" ", "_")) for name in (BEFORE, *METHODS)}


def _transfer(steps: Steps) -> None:
    steps.announce("Transfer the CT network to the MR data")
    donor = _donor(steps.out).relative_to(steps.out)
    steps.run("nnunet-dante", "transfer", donor, "-d", 802, "--preprocess", "--epochs", EPOCHS, "--iterations",
                     ITERATIONS, "--val-iterations", VAL_ITERATIONS, "--lr", LEARNING_RATE)


def _predict(steps: Steps, predictions: dict[str, Path], device: str) -> None:
    """Predict with the final weights of each method, and with the start weights, taken from LoRA's checkpoint."""
    lora = _fold(steps.out, METHODS["LoRA"])
    remove(lora / "checkpoint_final.pth", lora / "checkpoint_start.pth")
    common = ["-i", Path("nnUNet_raw", MR.dataset, "imagesTs"), "-d", 802, "-c", CONFIGURATION, "-f", FOLD, "-p", PLANS,
              "-device", device, "-npp", 0, "-nps", 0, "--disable_progress_bar"]
    weights = {BEFORE: (METHODS["LoRA"], "checkpoint_start.pth"),
               **{name: (trainer, "checkpoint_final.pth") for name, trainer in METHODS.items()}}
    steps.predict_without_this_package(
        [[*common, "-o", folder, "-tr", weights[name][0], "-chk", weights[name][1]]
         for name, folder in predictions.items()])


def _segment_in_dafne(steps: Steps) -> bool:
    """Export the model and let dafne-dl segment with it; print why and return False if dafne-dl is not available."""
    out, model, folder = steps.out, Path("SpineMR.model"), Path("predictions", IN_DAFNE.replace(" ", "_"))
    steps.run("nnunet-dante", "export", _fold(out, METHODS["LoRA"]).parent.relative_to(out), "-o", model, "--mirroring")
    try:
        packages = install_dafne(writable_cache(out / "cache"))
    except DemoDataError as error:
        print(error, file=sys.stderr)
        return False
    (out / folder).mkdir(parents=True)
    image = Path("nnUNet_raw", MR.dataset, "imagesTs", f"{MR.check}_0000.nii.gz")
    steps.python(APPLY, packages, out / "cache" / "home", model, image, ",".join(MR.structures),
                 folder / f"{MR.check}.nii.gz", name="dafne-dl")
    return True


def _report(steps: Steps, predictions: dict[str, Path]) -> Path:
    """Score all predictions, write the report of `compare` on them into the demo's folder, and print the scores."""
    with steps.nnunet_folders():
        sources = _sources(steps.out, predictions)
        minutes = (time.monotonic() - steps.begun) / 60
        report = write_report(sources, steps.out, title="nnunet_dante demo", before=_introduction(minutes),
                              after=_appendix(steps, predictions))
    for source in sources:
        (scores,) = source.result.cases.values()
        dice = np.nanmean([values["dice"] for values in scores.values()])
        print(f"      {source.result.method}: mean Dice {dice:.3f}", file=sys.stderr)
    return report


def _sources(out: Path, predictions: dict[str, Path]) -> list[Source]:
    """Return the results to compare: the cost of each training from its fold, the scores from the predictions."""
    untrained: dict[str, Any] = {"curve": [], "seconds": [], "stages": (), "trained_parameters": None,
                                 "adapter_mib": None}
    sources = []
    for name, folder in predictions.items():
        fold = _fold(out, METHODS.get(name, METHODS["LoRA"]))
        source = read_fold(fold)
        assert source.files is not None
        plans = json.loads((fold.parent / "plans.json").read_text())
        facts = {} if name in METHODS else untrained if name == IN_DAFNE else untrained | {"trainer": "", "shots": 0}
        result = msgspec.structs.replace(source.result, method=name, all=False, **facts, cases=score_masks(
            out / folder, source.files, plans, tolerance_mm=source.result.tolerance_mm))
        masks = None if name == IN_DAFNE else out / folder  # the picture would show LoRA twice
        sources.append(Source(result=result, masks=masks, files=source.files))
    return sources


def _introduction(minutes: float) -> list[Block]:
    return [
        Text("A network that was pretrained on the CT of one spine is adapted to the T2-weighted MR of another, with "
             "two structures that it has never seen: spinal canal and intervertebral disc. It was trained on the left "
             "half and tested on the right half; no voxel is in both."),
        Text(CAVEAT),
        Text("All masks are from stock nnUNetv2_predict, in a process in which nnunet_dante could not be imported. All "
             f"trainings took the same {EPOCHS} x {ITERATIONS} steps and are judged by their last epoch. Learning rate "
             "and number of steps were chosen on these images, and are the same for all methods. "
             f"\"{BEFORE}\" is the CT network with a head and a first layer for the MR data, without training. The "
             f"whole demo took {minutes:.1f} minutes."),
    ]


def _appendix(steps: Steps, predictions: dict[str, Path]) -> list[Block]:
    out, fold, dafne = steps.out, _fold(steps.out, METHODS["LoRA"]), list[Block]()
    if IN_DAFNE in predictions:
        ours, theirs = (np.asanyarray(nibabel.Nifti1Image.from_filename(
            out / predictions[name] / f"{MR.check}.nii.gz").dataobj) for name in ("LoRA", IN_DAFNE))
        dafne = [Heading("In Dafne"), Text(
            f"\"{IN_DAFNE}\" is the same network exported as SpineMR.model and run by dafne-dl, in a process in which "
            f"neither nnunet_dante nor nnU-Net could be imported: {(ours == theirs).mean():.2%} of the voxels are as "
            f"nnU-Net labels them.")]
    sizes = {name: (fold / name).stat().st_size / 1024 for name in ("checkpoint_final.pth", "adapter.safetensors")}
    (transferred,) = (out / "nnUNet_preprocessed" / MR.dataset).glob("*_transfer.txt")
    return [
        *dafne, Heading("What LoRA leaves on disk"),
        Table(name="files", title="Size of the files", head=["file", "KiB"], records=[],
              rows=[[name, f"{kib:.0f}"] for name, kib in sizes.items()]),
        Text("The checkpoint is a stock nnU-Net checkpoint. The adapter holds what LoRA trained, and is applied to the "
             "same start weights. For a tiny network like this one, the adapter is large compared with the checkpoint; "
             "for nnU-Net's default network, it has about 6 % of its size."),
        Heading("What transfer matched"), Code(transferred.read_text().strip()),
        Heading("The commands"), Code("\n".join(steps.commands)),
        Text("All commands run in the folder of this report, with nnUNet_raw, nnUNet_preprocessed and nnUNet_results "
             "set to the folders of these names. Between the first two, the demo made network and patch of the plans "
             "smaller (nnUNetDemoPlans.json)."),
        Text("Images: sample_ct and sample_mri of TPTBox 1.1.0, Apache-2.0."),
    ]
