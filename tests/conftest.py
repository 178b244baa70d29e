"""nnU-Net's folders for each test, and few threads: the suite must behave the same on any machine.

One donor is transferred to one target data set and preprocessed, for all tests that train.
"""

from __future__ import annotations

import os
import shutil

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors gain nothing from more, and children of a fork lose them
os.environ.setdefault("nnUNet_n_proc_DA", "0")
os.environ.setdefault("nnUNet_def_n_proc", "1")
os.environ.setdefault("nnUNet_compile", "f")
os.environ.setdefault("MPLBACKEND", "Agg")

import pytest  # noqa: E402
import torch  # noqa: E402
from hypothesis import settings  # noqa: E402

# The same examples in every run; HYPOTHESIS_EXAMPLES asks for more than the usual 100 a property.
settings.register_profile("suite", deadline=None, database=None, derandomize=True,
                          max_examples=int(os.environ.get("HYPOTHESIS_EXAMPLES", "100")))
settings.load_profile("suite")


@pytest.fixture
def nnunet_paths(tmp_path, monkeypatch):
    """nnUNet_raw, nnUNet_preprocessed and nnUNet_results below a temporary folder, as a dict of Path."""
    folders = {}
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        monkeypatch.setenv(name, str(folders[name]))
    return folders


@pytest.fixture(scope="session")
def prepared_once(tmp_path_factory):
    """A `running.Prepared`."""
    from running import prepare

    return prepare(tmp_path_factory.mktemp("prepared"))


@pytest.fixture
def prepared(prepared_once, monkeypatch):
    """The same with nnU-Net's folders set, and no results in them."""
    shutil.rmtree(prepared_once.root / "nnUNet_results" / prepared_once.dataset, ignore_errors=True)
    return prepared_once.activate(monkeypatch)


@pytest.fixture(autouse=True)
def _seed():
    """Weights and images of a test are the same in every run and in any order."""
    torch.manual_seed(0)
