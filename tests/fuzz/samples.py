"""One small valid file of every kind that the package reads."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path

import folds
import tiny
import torch

from nnunet_dante.adapters.adapter import apply
from nnunet_dante.adapters.strength import at_strength
from nnunet_dante.compare.results import RunResult, write_result
from nnunet_dante.dafne.export import export_model
from nnunet_dante.models.checkpoint import load_checkpoint_safely, save_atomically, unique_tensors, weights_sha256
from nnunet_dante.peft.low_rank import LowRankDelta

DATASET = "Dataset901_Tiny"
FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed")
MODEL = "Dataset900_Donor/nnUNetTrainer__nnUNetPlans__3d_fullres"
PROTOCOL = """name = "example"
shots = [1, 2]
tolerance_mm = 1.0
[training]
epochs = 3
[[experiments]]
name = "one"
dataset = 901
donor = "checkpoint.pth"
[[methods]]
name = "LoRA"
trainer = "nnUNetTrainerLoRA"
set = {rank = 4}
"""
LOGGING = {"dice_per_class_or_region": [[0.1, 0.5], [0.2, 0.5]], "epoch_start_timestamps": [1.0, 3.0],
           "epoch_end_timestamps": [2.5, 4.5]}


def write_samples(root: Path) -> None:
    """Write them all below `root`; nnU-Net's environment variables are set to folders there."""
    for name in (*FOLDERS, "nnUNet_results"):
        (root / name).mkdir()
        os.environ[name] = str(root / name)
    model = tiny.write_model_folder(root / "models", features=(2, 2), patch=(8, 8, 8))
    shutil.copy(model / "fold_0" / "checkpoint_final.pth", root / "checkpoint.pth")
    torch.save(torch.load(root / "checkpoint.pth", weights_only=False), root / "old.pth",
               _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(root / "model.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(model.rglob("*.*")):
            archive.write(file, file.relative_to(root / "models"))
    _write_adapter(root)
    export_model(model, root / "Liver.model", orientation="RAS")
    _write_target(root)
    _write_fold(root)
    (root / "protocol.toml").write_text(PROTOCOL)
    (root / "logging.json").write_text(json.dumps(LOGGING))
    (root / "groups.csv").write_text("case,group\ncase_000,a\ncase_001,a\n")
    (root / "groups.json").write_text(json.dumps({"a": ["case_000"], "b": ["case_001"]}))
    (root / "cases.json").write_text(json.dumps(["case_000", "case_001"]))
    scores = {"case": {"organ": {"dice": 0.5, "hd95_mm": 2.0, "surface_dice": 0.4}}}
    write_result(RunResult(experiment="e", method="LoRA", trainer="nnUNetTrainerLoRA", shots=1, seed=0, cases=scores,
                           tolerance_mm=1.0, curve=[0.1, 0.2], seconds=[1.0, 1.0]), root / "result.json")


def _write_adapter(root: Path) -> None:
    """trained.pth, half of whose update is kept, and its adapter.safetensors; the whole update as a folder of PEFT."""
    from nnunet_dante.adapters.adapter import extract

    content = load_checkpoint_safely(root / "checkpoint.pth")
    weights = content["network_weights"]
    names = [key for key, tensor in unique_tensors(weights).items() if tensor.ndim == 5][1:3]
    settings = {"kind": "lora", "rank": 1, "alpha": 2.0, "factorisation": "flat"}
    factors = {}
    for name in names:
        update = LowRankDelta(weights[name].shape, rank=1, alpha=2.0, factorisation="flat")
        factors |= {f"{name}.{part}": torch.ones_like(tensor) for part, tensor in update.factors().items()}
    head = "decoder.seg_layers.0.bias"
    content["dante"] = {
        "format": 1, "version": "0.1", "method": "LoRA", "options": {"rank": 1}, "base_sha256": weights_sha256(weights),
        "donor": None, "label_map": None, "start_dice": {},
        "adapter": {"base": {name: weights[name] for name in (*names, head)}, "factors": factors,
                    "updates": dict.fromkeys(names, settings)}}
    save_atomically(content, root / "trained.pth")
    extract(root / "trained.pth", root / "adapter.safetensors")
    extract(root / "trained.pth", root / "peft", form="peft")
    apply(root / "checkpoint.pth", root / "adapter.safetensors", root / "trained.pth")
    content = load_checkpoint_safely(root / "trained.pth")
    content["network_weights"][head] = content["network_weights"][head] + 1  # trained in full
    save_atomically(at_strength(content, 0.5, facts={"rule": "unseen cases", "cases": 1, "curve": [[0.0, 0.1], [0.5, 0.2]]}),
                    root / "trained.pth")
    extract(root / "trained.pth", root / "adapter.safetensors")


def _write_target(root: Path) -> None:
    """A raw data set of two cases, with fingerprint, split, and plans of an earlier transfer."""
    from nnunet_dante.transfers.transfer import transfer

    tiny.write_raw_dataset(root / "nnUNet_raw", n_cases=2, shape=(12, 12, 12))
    intensity = {"max": 1.0, "mean": 0.4, "median": 0.4, "min": 0.0, "percentile_00_5": 0.0, "percentile_99_5": 1.0,
                 "std": 0.3}
    folder = root / "nnUNet_preprocessed" / DATASET
    folder.mkdir()
    (folder / "dataset_fingerprint.json").write_text(json.dumps({
        "spacings": [[1.0, 1.0, 1.0]] * 2, "shapes_after_crop": [[12, 12, 12]] * 2,
        "foreground_intensity_properties_per_channel": {"0": intensity}, "median_relative_size_after_cropping": 1.0}))
    transfer(root / "models" / MODEL, DATASET, num_processes=1)
    shutil.copy(folder / "nnUNetDantePlans_3d_fullres_start.pth", root / "start.pth")
    shutil.copy(folder / "nnUNetDantePlans.json", root / "plans.json")
    (folder / "shots.json").write_text(json.dumps({
        "format": 1, "dataset": DATASET, "seed_count": 1, "val": ["case_001"], "test": ["case_001"], "pool": ["case_000"],
        "folds": [{"fold": 0, "shots": 1, "all": True, "seed": 0, "train": ["case_000"]}]}))


def _write_fold(root: Path) -> None:
    """A finished training of another data set, with what its comparison needs."""
    folds.write_dataset(root / "folds")
    folds.write_fold(root / "folds", "nnUNetTrainerLoRA", shifts=(1,))
    (root / "folds" / "nnUNet_preprocessed" / DATASET / "shots.json").write_text(json.dumps({
        "folds": [{"fold": 0, "shots": 2, "all": False, "seed": 3, "train": ["case_2", "case_3"]}]}))
