"""Transferred data sets, and trainers built and run as nnU-Net's command does, in this process."""

from __future__ import annotations

import json
import multiprocessing.dummy
import random
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch

TARGET_LABELS = {"background": 0, "lesion": 1, "organ": 2, "vessel": 3}


@dataclass(frozen=True)
class Prepared:
    """nnU-Net's three folders with one transferred data set in them."""

    root: Path
    dataset: str
    donor: Path

    @property
    def preprocessed(self) -> Path:
        return self.root / "nnUNet_preprocessed" / self.dataset

    def copy_to(self, root: Path) -> Prepared:
        shutil.copytree(self.root, root, dirs_exist_ok=True)
        return Prepared(root, self.dataset, root / self.donor.relative_to(self.root))

    def activate(self, monkeypatch) -> Prepared:
        """Set nnU-Net's folders, and leave out its progress figure, which takes most of the time of a tiny epoch."""
        from nnunetv2.training.logging.nnunet_logger import LocalLogger

        monkeypatch.setattr(LocalLogger, "plot_progress_png", lambda *_: None)
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            monkeypatch.setenv(name, str(self.root / name))
        return self


def weights(file: Path) -> dict[str, torch.Tensor]:
    from nnunet_dante.models.checkpoint import load_checkpoint_safely

    return load_checkpoint_safely(file)["network_weights"]


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def same(one: Path, other: Path) -> bool:
    """Return whether two checkpoints hold the same weights in the same order."""
    return list(weights(one)) == list(weights(other)) and equal(weights(one), weights(other))


def threads_for_pools(monkeypatch) -> None:
    """Give nnU-Net threads where it asks for new processes, which take longer to import torch than to do a test's work.

    Every other context stays the real one: multiprocessing.pool keeps the get_context that it finds when it is imported,
    and calls it without a name.
    """
    real = multiprocessing.get_context
    monkeypatch.setattr(multiprocessing, "get_context",
                        lambda method=None: multiprocessing.dummy if method == "spawn" else real(method))


def prepare(root: Path, *, configuration: str = "3d_fullres", architecture: str = "PlainConvUNet", labels=None,
            values=(2, 1, 3), donor_options=None, overrides=None, transfer_options=None, **options) -> Prepared:
    """Write a donor and a raw data set (`donor_options`, `options`: of tiny.py; `transfer_options`), transfer, and preprocess."""
    from nnunet_dante.transfers.transfer import transfer

    with pytest.MonkeyPatch.context() as patch:
        threads_for_pools(patch)
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            (root / name).mkdir()
            patch.setenv(name, str(root / name))
        donor = tiny.write_model_folder(root / "nnUNet_results", configuration=configuration, architecture=architecture,
                                        **(donor_options or {}))
        dataset = tiny.write_raw_dataset(root / "nnUNet_raw", labels=labels or TARGET_LABELS, values=values, **options)
        transfer(donor, dataset, preprocess=True, num_processes=1, **(transfer_options or {}),
                 overrides={"epochs": 3, "iterations": 2, "val_iterations": 1, "rank": 2, "alpha": 4.0} | (overrides or {}))
    return Prepared(root, dataset, donor)


def with_overrides(prepared, **overrides) -> dict:
    """Return the plans with further overrides, as `transfer` writes them."""
    from nnunet_dante.models import settings as dante_block

    plans = json.loads((prepared.preprocessed / "nnUNetDantePlans.json").read_text())
    block = dante_block.read_dante_block(plans)
    return plans | {"dante": dante_block.with_overrides(block, block["overrides"] | overrides)}


def build(trainer, prepared, *, plans=None, configuration="3d_fullres", fold=0, resume=False, pretrained=None,
          device="cpu"):
    """Return the trainer, with checkpoint or pretrained weights loaded as `nnUNetv2_train` loads them."""
    from nnunetv2.run.run_training import maybe_load_checkpoint
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    folder = prepared.preprocessed
    plans = plans or json.loads((folder / "nnUNetDantePlans.json").read_text())
    cls = nnUNetTrainer if trainer == "nnUNetTrainer" else trainer
    built = cls(plans=plans | {"continue_training": resume}, configuration=configuration, fold=fold,
                dataset_json=json.loads((folder / "dataset.json").read_text()), device=torch.device(device))
    maybe_load_checkpoint(built, resume, False, str(pretrained) if pretrained else None)
    return built


def keep_checkpoint(on_epoch_end, *, after: int = 1):
    """Return the trainer's method for one that copies the checkpoint after so many epochs to kept.pth."""
    def wrapped(self):
        self.save_every = 1
        on_epoch_end(self)
        if self.current_epoch == after:
            shutil.copy(Path(self.output_folder, "checkpoint_latest.pth"), Path(self.output_folder, "kept.pth"))
    return wrapped


def train(trainer, prepared, **options):
    """Return the trainer after its whole training."""
    built = build(trainer, prepared, **options)
    built.run_training()
    return built


def train_and_resume(trainer, prepared, monkeypatch, **options):
    """Return a training that went through, its final weights, and the same one resumed after its first epoch."""
    from nnunet_dante.models.checkpoint import load_checkpoint_safely

    monkeypatch.setattr(trainer, "on_epoch_end", keep_checkpoint(trainer.on_epoch_end))
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    whole = train(trainer, prepared, **options)
    folder = Path(whole.output_folder)
    expected = load_checkpoint_safely(folder / "checkpoint_final.pth")["network_weights"]
    (folder / "kept.pth").rename(folder / "checkpoint_latest.pth")
    (folder / "checkpoint_final.pth").unlink()
    resumed = build(trainer, prepared, resume=True, **options)
    assert resumed.current_epoch == 1
    resumed.run_training()
    return whole, expected, resumed
