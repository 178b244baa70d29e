"""dafne.py: dafne-dl stays out of the environment, and sees what a Dafne client would give it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np
import pytest

from nnunet_dante.demo.dafne import APPLY, REQUIREMENTS, install_dafne
from nnunet_dante.demo.data import DemoDataError

FAKE_DAFNE = """
import sys
class Model:
    def apply(self, data):
        for name in ("nnunet_dante", "nnunetv2"):
            assert sys.modules[name] is None
        image = data["image"]
        assert image.dtype == "float32" and len(data["resolution"]) == 3 and data["affine"].shape == (4, 4)
        return {"bright": (image > 5).astype("uint8"), "dark": (image < -5).astype("uint8")}
def generic_load_model(stream, install_deps=True):
    assert not install_deps and stream.read() == b"model"
    return Model()
"""


def test_the_masks_come_back_on_the_grid_of_the_image(tmp_path):
    package = tmp_path / "packages" / "dafne_dl"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "model_loaders.py").write_text(FAKE_DAFNE)
    (tmp_path / "m.model").write_bytes(b"model")
    voxels = np.zeros((5, 6, 7), np.int16)
    voxels[1, 2, 3], voxels[4, 0, 6] = 10, -10
    affine = np.diag([1.5, -1.5, 2, 1])
    nibabel.save(nibabel.Nifti1Image(voxels, affine), tmp_path / "image.nii.gz")
    arguments = [tmp_path / name for name in ("packages", "home", "m.model", "image.nii.gz")]
    subprocess.run([sys.executable, "-c", APPLY, *map(str, arguments), "bright,dark", str(tmp_path / "out.nii.gz")],
                   check=True)
    masks = nibabel.load(tmp_path / "out.nii.gz")
    assert nibabel.aff2axcodes(masks.affine) == nibabel.aff2axcodes(affine)
    for value, index in ((1, (1, 2, 3)), (2, (4, 0, 6))):
        (found,) = np.argwhere(np.asarray(masks.dataobj) == value)
        np.testing.assert_allclose(nibabel.affines.apply_affine(masks.affine, found),
                                   nibabel.affines.apply_affine(affine, index))


def test_dafne_is_installed_once_into_its_own_folder_without_dependencies(tmp_path, monkeypatch):
    calls = []

    def run(command, **_):
        calls.append(command)
        Path(command[command.index("--target") + 1], "dafne_dl").mkdir(parents=True)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(subprocess, "run", run)
    for _ in range(2):
        assert (install_dafne(tmp_path) / "dafne_dl").is_dir()
    (command,) = calls
    assert "--no-deps" in command and set(REQUIREMENTS) <= set(command)
    assert not any("tensorflow" in word for word in command)


def test_offline_the_error_says_what_pip_said_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(subprocess, "run", lambda c, **_: subprocess.CompletedProcess(c, 1, "", "ERROR: no network\n"))
    with pytest.raises(DemoDataError, match="no network"):
        install_dafne(tmp_path)
    assert not list(tmp_path.iterdir())
