"""Finished trainings in nnU-Net's folders, without training anything: masks are boxes that a trainer hits or misses."""

from __future__ import annotations

import json
from pathlib import Path

import nibabel
import numpy as np
import tiny
import torch

LABELS = {"background": 0, "organ": 1, "lesion": 2}
SHAPE, SPACING_MM = (20, 24, 6), (1.0, 1.0, 3.0)


def mask(shift: int = 0) -> np.ndarray:
    """An organ with a lesion in it, moved along the first axis."""
    voxels = np.zeros(SHAPE, np.uint8)
    voxels[4 + shift:12 + shift, 6:16, 1:5] = 1
    voxels[6 + shift:9 + shift, 9:12, 2:4] = 2
    return voxels


def write(voxels: np.ndarray, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    nibabel.Nifti1Image(voxels, np.diag([*SPACING_MM, 1.0])).to_filename(file)


def write_dataset(root: Path, dataset: str = "Dataset901_Tiny", cases: int = 4) -> None:
    """Images, labels and two folds of a data set."""
    names = [f"case_{n}" for n in range(cases)]
    for n, name in enumerate(names):
        write(np.random.default_rng(n).normal(size=SHAPE).astype(np.float32),
              root / "nnUNet_raw" / dataset / "imagesTr" / f"{name}_0000.nii.gz")
        write(mask(), root / "nnUNet_raw" / dataset / "labelsTr" / f"{name}.nii.gz")
    preprocessed = root / "nnUNet_preprocessed" / dataset
    preprocessed.mkdir(parents=True)
    half = cases // 2
    (preprocessed / "splits_final.json").write_text(json.dumps(
        [{"train": names[half:], "val": names[:half]}, {"train": names[:half], "val": names[half:]}]))


def logging(dice: list[float]) -> dict:
    """What nnU-Net logs into its checkpoints; an epoch takes two seconds."""
    return {"dice_per_class_or_region": [[np.float32(value), np.float32("nan")] for value in dice],
            "epoch_start_timestamps": [100.0 + 5 * epoch for epoch in range(len(dice))],
            "epoch_end_timestamps": [102.0 + 5 * epoch for epoch in range(len(dice))]}


def write_fold(root: Path, trainer: str, *, shifts=(0, 1), fold: int = 0, dataset: str = "Dataset901_Tiny",
               plans_name: str = "nnUNetDantePlans", dice=(0.5, 0.8)) -> Path:
    """Write a fold whose validation masks are the truth moved by `shifts`, a case each."""
    model = root / "nnUNet_results" / dataset / f"{trainer}__{plans_name}__3d_fullres"
    folder = model / f"fold_{fold}"
    (folder / "validation").mkdir(parents=True)
    (model / "plans.json").write_text(json.dumps(tiny.plans(dataset)))
    (model / "dataset.json").write_text(json.dumps(tiny.dataset_json(labels=LABELS, n_cases=4)))
    for n, shift in enumerate(shifts):
        write(mask(shift), folder / "validation" / f"case_{2 * fold + n}.nii.gz")
    torch.save({"logging": logging(list(dice)), "dante": {
        "trainable_parameters": 7, "total_parameters": 70, "donor": {"source": "CT"}, "start_dice": {"organ": 0.1},
        "stages": [(0, ("head",)), (1, ("head", "decoder.0"))]}}, folder / "checkpoint_final.pth")
    (folder / "adapter.safetensors").write_bytes(b"0" * 2**19)
    (folder / "debug.json").write_text(json.dumps({"device": "cpu", "num_iterations_per_epoch": "250"}))
    return folder
