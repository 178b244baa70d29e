"""The demo: pretrain on CT, move to MR, fine-tune in three ways, predict with stock nnU-Net, report."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import torch

from ..adapters.adapter import remove
from ..errors import ConfigurationError
from .dafne import APPLY, install_dafne
from .data import CT, MR, write_dataset, write_split
from .download import DemoDataError, fetch_images, writable_cache
from .steps import Steps
from .summary import CAVEAT, IN_DAFNE, write_report

CONFIGURATION, FOLD, PLANS, DONOR_PLANS = "3d_fullres", "0", "nnUNetDantePlans", "nnUNetDemoPlans"
PRETRAIN_TRAINER, PRETRAIN_EPOCHS = "nnUNetTrainer_5epochs", 5
EPOCHS, ITERATIONS, VAL_ITERATIONS = 12, 16, 5
LEARNING_RATE = 0.01  # ten times the default: a small network and 192 steps instead of 25,000
METHODS = {"LoRA": "nnUNetTrainerLoRA", "gradual unfreezing": "nnUNetTrainerGradualUnfreezing",
           "from scratch": "nnUNetTrainerFromScratch"}
BEFORE = "before training"
_MARK = ".nnunet_dante_demo"  # says that the demo may replace what lies here


def run_demo(out: Path, *, data: Path | None = None) -> Path:
    """Run everything below `out` and return the path of report.md. An earlier demo in `out` is replaced.

    data: a folder with the images, instead of downloading them (see `download.fetch_images`).

    Raises:
        DemoDataError: the images cannot be had.
        ConfigurationError: `out` holds nnU-Net folders that no demo wrote.
        DanteError: a command failed; names its log.
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
    report = write_report(
        out, runs={name: _fold(out, trainer) for name, trainer in METHODS.items()}, predictions=predictions,
        steps=f"{EPOCHS} x {ITERATIONS}", commands=steps.commands, minutes=(time.monotonic() - steps.begun) / 60)
    print(f"\n{report.read_text().split('## ')[1].split('![')[0]}", file=sys.stderr)
    return report


def _clear(out: Path) -> None:
    """Remove what an earlier demo left; other files in `out` stay, and other people's data are not touched.

    Raises:
        ConfigurationError: `out` holds folders of these names that no demo wrote.
    """
    ours = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "logs", "predictions", "images", "cache")
    found = [name for name in ours if (out / name).exists()]
    if found and not (out / _MARK).exists():
        raise ConfigurationError(f"--out {out} holds {', '.join(found)}, which no demo wrote and none will overwrite; "
                                 f"choose a new folder.")
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
    """Return nnU-Net's own plans with a network and patch that two CPU cores train in a minute or two."""
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
    """Predict with each method's final weights, and with the start weights, which LoRA's checkpoint gives back."""
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
    """Export and let dafne-dl segment; returns False, with a word to the user, where dafne-dl cannot be had."""
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
