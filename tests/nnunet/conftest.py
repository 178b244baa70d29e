"""One donor transferred to one target data set and preprocessed, shared by all trainer tests."""

from __future__ import annotations

import shutil

import pytest
from running import Prepared, prepare


@pytest.fixture(scope="session")
def prepared_once(tmp_path_factory) -> Prepared:
    return prepare(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def prepared(prepared_once, monkeypatch) -> Prepared:
    from nnunetv2.training.logging.nnunet_logger import LocalLogger

    monkeypatch.setattr(LocalLogger, "plot_progress_png", lambda *_: None)  # most of the time of a tiny epoch
    shutil.rmtree(prepared_once.root / "nnUNet_results" / prepared_once.dataset, ignore_errors=True)
    return prepared_once.activate(monkeypatch)
