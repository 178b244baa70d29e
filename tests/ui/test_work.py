"""What other processes answer to the page."""

from __future__ import annotations

import base64
import json

import nibabel
import numpy as np
import pytest
import tiny

from nnunet_dante.dafne.model_file import open_model
from nnunet_dante.errors import ConfigurationError, DanteError
from nnunet_dante.ui import work


@pytest.fixture
def scans(tmp_path):
    """Two cases whose masks hold 1 and 7."""
    for folder in ("images", "labels"):
        (tmp_path / "scans" / folder).mkdir(parents=True)
    for case in ("P01", "P02"):
        mask = np.zeros((12, 14, 16), np.uint8)
        mask[2:8, 2:8, 2:8], mask[8:10, 8:10, 8:10] = 1, 7
        for folder, voxels in (("images", mask * 10.0), ("labels", mask)):
            nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / "scans" / folder / f"{case}.nii.gz")
    return tmp_path / "scans"


def test_a_folder_is_looked_at(scans):
    asked = work.look(str(scans), {})
    assert asked["values"] == [1, 7] and "whole numbers" in asked["problem"] and asked["cases"] == []
    seen = work.look(str(scans), {"labels": ["liver=1", "spleen=7"]})
    assert seen["problem"] == "" and seen["labels"] == ["liver", "spleen"] and len(seen["cases"]) == 2
    assert seen["cases"][0]["voxels"] == {"liver": 216, "spleen": 8}
    assert base64.b64decode(seen["cases"][0]["picture"])[:2] == b"\xff\xd8", "a JPEG with outlines"
    assert not any("Dataset001" in line or "tmp" in line for line in seen["lines"]), "nothing of where it would be written"
    json.dumps(seen)


def test_cases_are_shown_although_one_is_damaged(scans):
    (scans / "images" / "P02.nii.gz").write_bytes((scans / "images" / "P02.nii.gz").read_bytes()[:200])
    seen = work.look(str(scans), {"labels": ["liver=1", "spleen=7"]})
    assert "1 of 2 cases cannot be used" in seen["problem"]
    first, second = seen["cases"]
    assert first["picture"] and not first["faults"] and second["faults"] and not second["picture"]
    assert work.look(str(scans), {"labels": ["liver=1", "spleen=7"], "without": ["P02"]})["problem"] == ""


def test_a_data_set_is_written_for_options_that_adapt_has_not(scans, tmp_path):
    made = work.write_dataset(str(scans), str(tmp_path / "made"), {"labels": ["liver=1", "spleen=7"], "channels": ["CT"]})
    assert json.loads((tmp_path / "made" / "Dataset001_Mine" / "dataset.json").read_text())["channel_names"] == {"0": "CT"}
    assert made == str(tmp_path / "made" / "Dataset001_Mine")


def test_donors_are_called_by_their_data_set(tmp_path, monkeypatch):
    monkeypatch.delenv("nnUNet_results", raising=False)
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(tmp_path / "none"))
    donor = tiny.write_model_folder(tmp_path)
    found = work.donors([str(donor), str(tmp_path)])
    assert [model["name"] for model in found] == [f"Dataset900_Donor, {donor.name}"] and found[0]["labels"] == ("organ", "lesion")


def test_options_of_trainings_are_checked():
    assert work.parse_overrides(["lr=0.01", "rank=8"]) == {"lr": 0.01, "rank": 8}
    with pytest.raises(DanteError):
        work.parse_overrides(["rank=many"])


def test_a_run_that_ends_on_a_full_disk_says_so_where_the_page_looks(tmp_path, monkeypatch, capsys):
    def full(out):
        raise OSError(28, "No space left on device", out)

    monkeypatch.setattr(work, "adapt", full)
    assert work.main("adapt", str(tmp_path)) == 1
    assert capsys.readouterr().err.startswith("Error: [Errno 28] No space left on device: ")


def test_dafne_turns_images_back_to_how_the_training_files_lie(tmp_path):
    """Real case: sagittal MRs were stored PIR. The model was written from model.zip, so RAS was assumed, and its masks were wrong."""
    fold = tiny.write_model_folder(tmp_path / "model") / "fold_0"
    (fold / "validation").mkdir()
    affine = np.array([[0, 0, 1, 0], [-1, 0, 0, 0], [0, -1, 0, 0], [0, 0, 0, 1]])  # to the back, down, to the right
    nibabel.save(nibabel.Nifti1Image(np.ones((4, 5, 6), np.uint8), affine), fold / "validation" / "P01.nii.gz")
    (tmp_path / "dafne").mkdir()
    assert "training files lie PIR" in work.send_to_dafne(str(fold), str(tmp_path / "dafne"))
    (written,) = (tmp_path / "dafne").glob("*.model")
    assert open_model(written).settings["orientation"] == "PIR"


def test_dafne_needs_its_folder(tmp_path):
    with pytest.raises(ConfigurationError, match="no folder"):
        work.send_to_dafne(str(tmp_path / "fold_all"), str(tmp_path / "none"))
