"""The demo: pretrain on CT, move to MR, fine-tune in three ways, predict with stock nnU-Net, report."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import nibabel
import numpy as np
import torch

from ..evaluation.metrics import score
from ..evaluation.plots import learning_curves, overlays
from ..evaluation.report import cost_table, score_table, table
from ..evaluation.runs import Run, read_run
from ..nnunet.adapter import remove
from ..nnunet.checkpoint import load_checkpoint_safely, write_text_atomically
from .data import CT, MR, write_dataset, write_split
from .download import fetch_images
from .steps import Steps

CONFIGURATION, FOLD, PLANS, DONOR_PLANS = "3d_fullres", "0", "nnUNetDantePlans", "nnUNetDemoPlans"
PRETRAIN_TRAINER, PRETRAIN_EPOCHS = "nnUNetTrainer_5epochs", 5
EPOCHS, ITERATIONS, VAL_ITERATIONS = 15, 16, 5
LEARNING_RATE = 0.01  # ten times the default: a small network and 240 steps instead of 25,000
METHODS = {"LoRA": "nnUNetTrainerLoRA", "gradual unfreezing": "nnUNetTrainerGradualUnfreezing",
           "from scratch": "nnUNetTrainerFromScratch"}
BEFORE = "before training"
CAVEAT = ("One person per modality: both halves of a spine are the same person, so this shows that it runs, not how "
          "good it is.")


def run_demo(out: Path, *, data: Path | None = None) -> Path:
    """Run everything below `out` and return the path of report.md. An earlier demo in `out` is replaced.

    data: a folder with the images, instead of downloading them (see `download.fetch_images`).

    Raises:
        DemoDataError: the images cannot be had. DanteError: a command failed; names its log.
    """
    out = out.resolve()
    _clear(out)
    steps = Steps(out, total=7)
    print(CAVEAT, file=sys.stderr)
    _prepare(steps, data)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    _pretrain(steps, device)
    transfer_text = _transfer(steps)
    for name, trainer in METHODS.items():
        steps.announce(f"Fine-tune on MR: {name}, {EPOCHS} epochs of {ITERATIONS} steps")
        steps.run("nnunet-dante", "train", 802, CONFIGURATION, FOLD, "-p", PLANS, "-tr", trainer, "-device", device,
                  epochs=EPOCHS)
    steps.announce("Predict the check case with stock nnUNetv2_predict, without nnunet_dante; write the report")
    _predict(steps, device)
    report = _report(steps, transfer_text)
    print(f"\n{report.read_text().split('## ')[1]}", file=sys.stderr)
    return report


def _clear(out: Path) -> None:
    """Remove what an earlier demo left; other files in `out` stay."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results", "logs", "predictions", "images"):
        shutil.rmtree(out / name, ignore_errors=True)


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


def _model(out: Path, trainer: str) -> Path:
    return out / "nnUNet_results" / MR.dataset / f"{trainer}__{PLANS}__{CONFIGURATION}"


def _transfer(steps: Steps) -> str:
    steps.announce("Transfer the CT network to the MR data")
    donor = _donor(steps.out).relative_to(steps.out)
    return steps.run("nnunet-dante", "transfer", donor, "-d", 802, "--preprocess", "--epochs", EPOCHS, "--iterations",
                     ITERATIONS, "--val-iterations", VAL_ITERATIONS, "--lr", LEARNING_RATE)


def _predict(steps: Steps, device: str) -> None:
    """Predict with each method's final weights, and with the start weights, which LoRA's checkpoint gives back."""
    lora = _model(steps.out, METHODS["LoRA"]) / f"fold_{FOLD}"
    remove(lora / "checkpoint_final.pth", lora / "checkpoint_start.pth")
    images = Path("nnUNet_raw", MR.dataset, "imagesTs")
    common = ["-i", images, "-d", 802, "-c", CONFIGURATION, "-f", FOLD, "-p", PLANS, "-device", device, "-npp", 1,
              "-nps", 1, "--disable_progress_bar"]
    jobs = [(BEFORE, METHODS["LoRA"], "checkpoint_start.pth"),
            *((name, trainer, "checkpoint_final.pth") for name, trainer in METHODS.items())]
    steps.predict_without_this_package(
        [[*common, "-o", Path("predictions", name.replace(" ", "_")), "-tr", trainer, "-chk", checkpoint]
         for name, trainer, checkpoint in jobs])


def _report(steps: Steps, transfer_text: str) -> Path:
    out = steps.out
    raw = out / "nnUNet_raw" / MR.dataset
    image, truth = (_upright(raw / f"{kind}Ts" / f"{MR.check}{suffix}.nii.gz")
                    for kind, suffix in (("images", "_0000"), ("labels", "")))
    spacing = [float(s) for s in image.header.get_zooms()]
    masks = {name: np.asarray(_upright(out / "predictions" / name.replace(" ", "_") / f"{MR.check}.nii.gz").dataobj)
             for name in (BEFORE, *METHODS)}
    reference = np.asarray(truth.dataobj)
    results = {name: score(reference, mask, labels=MR.labels, spacing_mm=spacing) for name, mask in masks.items()}
    folders = {name: _model(out, trainer) / f"fold_{FOLD}" for name, trainer in METHODS.items()}
    runs = [read_run(name, folder, load_checkpoint_safely(folder / "checkpoint_final.pth"))
            for name, folder in folders.items()]
    learning_curves(runs, out / "learning_curves.png")
    labelled = np.nonzero(reference.any(axis=(0, 1)))[0]
    overlays(image.get_fdata(), {"truth": reference, **masks}, out / "overlays.png", labels=MR.labels,
             slices=[int(k) for k in np.quantile(labelled, (0.05, 0.35, 0.65))], spacing_mm=spacing,
             captions={name: f"mean Dice {np.nanmean([s['dice'] for s in by_label.values()]):.2f}"
                       for name, by_label in results.items()})
    write_text_atomically(_text(steps, transfer_text, results, runs), out / "report.md")
    return out / "report.md"


def _upright(file: Path) -> nibabel.Nifti1Image:
    """Return the volume with axes (posterior, inferior, right), so that a transposed slice is a sagittal view."""
    volume = nibabel.Nifti1Image.from_filename(file)
    target = nibabel.orientations.axcodes2ornt("PIR")
    return volume.as_reoriented(nibabel.orientations.ornt_transform(nibabel.io_orientation(volume.affine), target))


def _text(steps: Steps, transfer_text: str, results: dict, runs: list[Run]) -> str:
    commands, minutes = "\n".join(steps.commands), (time.monotonic() - steps.begun) / 60
    fold = _model(steps.out, METHODS["LoRA"]) / f"fold_{FOLD}"
    sizes = [["file", "MiB"], *([f.name, f"{f.stat().st_size / 2**20:.2f}"] for f in
                                (fold / "checkpoint_final.pth", fold / "adapter.safetensors"))]
    return f"""# nnunet_dante demo

A network pretrained on the CT of one spine is moved to the T2-weighted MR of another, where it meets two structures
it has never seen (spinal canal, intervertebral disc). **{CAVEAT}** It trained on the left half and was checked on the
right half; no voxel is in both. The whole demo took {minutes:.1f} minutes.

## Dice on the check case, predicted by stock nnUNetv2_predict without nnunet_dante

{score_table(results)}

All three trainings took the same {EPOCHS} x {ITERATIONS} steps. "{BEFORE}" is the CT network after head surgery, as it
stands.

![The check case: image, truth, and each method](overlays.png)

## Learning curves and cost

{cost_table(runs)}

Peak and epochs are of the pseudo Dice: nnU-Net's own measure during training, on a few random patches of the check
case. In brackets: the same on the curve smoothed over three epochs.

![Learning curves](learning_curves.png)

## What is on disk

{table(sizes)}

The checkpoint is a stock nnU-Net checkpoint; the adapter is what LoRA trained, to be applied to the same start weights.

## What transfer matched

```
{transfer_text.strip()}
```

## The commands

```
{commands}
```

All run in the folder of this report, with nnUNet_raw, nnUNet_preprocessed and nnUNet_results set to the folders of
these names. Between the first two, the demo made the planned network and patch small (nnUNetDemoPlans.json).

Images: sample_ct and sample_mri of TPTBox 1.1.0, Apache-2.0.
"""
