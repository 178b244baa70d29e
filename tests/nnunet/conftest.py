"""One donor transferred to one target data set and preprocessed, shared by all trainer tests."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny

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

    def activate(self, monkeypatch) -> Prepared:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            monkeypatch.setenv(name, str(self.root / name))
        return self


def prepare(root: Path, *, configuration: str = "3d_fullres", architecture: str = "PlainConvUNet", labels=None,
            values=(2, 1, 3), **options) -> Prepared:
    """Write a donor and a raw data set, transfer, and preprocess."""
    from nnunet_dante.nnunet.transfer import transfer

    with pytest.MonkeyPatch.context() as patch:
        for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
            (root / name).mkdir()
            patch.setenv(name, str(root / name))
        donor = tiny.write_model_folder(root / "nnUNet_results", configuration=configuration, architecture=architecture)
        dataset = tiny.write_raw_dataset(root / "nnUNet_raw", labels=labels or TARGET_LABELS, values=values, **options)
        transfer(donor, dataset, preprocess=True, num_processes=1,
                 overrides={"epochs": 3, "iterations": 2, "val_iterations": 1, "rank": 2, "alpha": 4.0})
    return Prepared(root, dataset, donor)


@pytest.fixture(scope="session")
def prepared_once(tmp_path_factory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def prepared(prepared_once, monkeypatch) -> Prepared:
    from nnunetv2.training.logging.nnunet_logger import LocalLogger

    monkeypatch.setattr(LocalLogger, "plot_progress_png", lambda *_: None)  # most of the time of a tiny epoch
    shutil.rmtree(prepared_once.root / "nnUNet_results" / prepared_once.dataset, ignore_errors=True)
    return prepared_once.activate(monkeypatch)
