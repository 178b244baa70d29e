"""A Dafne client without its windows: a fresh process with dafne-dl, in which neither this package nor nnU-Net exists.

Arrays reach it as the client makes them: axis 2 runs along the slices, axis 0 down the screen, axis 1 to the right.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import nibabel
import numpy as np
import pytest
from nibabel.orientations import axcodes2ornt, io_orientation, ornt_transform

VERSIONS = ("2.0b0", "2.0.1b3", "2.0.2b2")
NEWEST = VERSIONS[-1]
PLANES = {"axial": "PLS", "sagittal": "IAL", "coronal": "ILP"}
CACHE = Path(os.environ.get("NNUNET_DANTE_TEST_CACHE", Path(tempfile.gettempdir(), "nnunet-dante-tests")))
_BEFORE = """
import sys
for name in ("nnunet_dante", "nnunetv2", "dynamic_network_architectures", "tensorflow"):
    sys.modules[name] = None
sys.path.insert(0, sys.argv[1])
arguments = sys.argv[2:]
import warnings
warnings.simplefilter("ignore")
import numpy as np
import torch
torch.set_num_threads(1)
from dafne_dl.model_loaders import generic_load_model
def load(path):
    with open(path, "rb") as stream:
        return generic_load_model(stream, install_deps=False)
"""


def dafne_dl(version: str = NEWEST) -> Path:
    """The folder with this dafne-dl, installed once without dependencies; skips the test where pip cannot reach it."""
    folder = CACHE / f"dafne-dl-{version}"
    if not (folder / "dafne_dl").is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as temporary:
            fresh = Path(temporary, "packages")
            command = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--retries", "1", "--timeout",
                       "15", "--disable-pip-version-check", "--target", str(fresh), f"dafne-dl=={version}",
                       "dill==0.4.1", "flexidep==0.0.17", "appdirs==1.4.4", "packaging>=23"]
            if subprocess.run(command, capture_output=True, check=False).returncode:
                pytest.skip(f"dafne-dl {version} cannot be installed here")
            if not folder.exists():
                fresh.replace(folder)
    return folder


def client(script: str, *arguments: object, home: Path, version: str = NEWEST) -> str:
    """Run `script` in a client; `load(path)` and `arguments` (strings) are there. Returns what it printed."""
    home.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "HOME": str(home), "XDG_CONFIG_HOME": str(home), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    # A file, as the client is one: of `-c`, Python 3.13 keeps the text, and dafne-dl takes it for that of its functions.
    file = home / "client.py"
    file.write_text(_BEFORE + script, encoding="utf-8")
    command = [sys.executable, str(file), str(dafne_dl(version)), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=home)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def shown(image: nibabel.Nifti1Image, plane: str = "axial") -> nibabel.Nifti1Image:
    """The volume with its axes as the client shows it in `plane`."""
    return image.as_reoriented(ornt_transform(io_orientation(image.affine), axcodes2ornt(PLANES[plane])))


def as_stored(mask: np.ndarray, image: nibabel.Nifti1Image, plane: str = "axial") -> np.ndarray:
    """Undo `shown` for a mask."""
    back = ornt_transform(axcodes2ornt(PLANES[plane]), io_orientation(image.affine))
    return np.asarray(nibabel.Nifti1Image(mask, shown(image, plane).affine).as_reoriented(back).dataobj)
