"""kept.py: what each label of the donor lost or gained, against hand computations and in the report of a fold."""

from __future__ import annotations

import json
import math

import folds
import numpy as np
import pytest

from nnunet_dante.compare.kept import label_changes
from nnunet_dante.compare.report import compare
from nnunet_dante.compare.sources import read_fold
from nnunet_dante.errors import ResultError

LABELS = {"background": 0, "liver": 1, "organ": 2, "ignore": 3}


def row(text: str) -> np.ndarray:
    return np.array([int(letter) for letter in text])


def changes(truth: str, network: str, donor: str, *, completed=("liver",)) -> dict[str, float]:
    """What the donor's label liver, 7 in its own numbers, became."""
    return label_changes(row(truth), row(network), row(donor), labels=LABELS, donor_values={"liver": 7},
                         completed=completed)["liver"]


def test_where_the_mask_is_the_donors_own_only_the_agreement_is_known():
    found = changes("1111220", "1110221", "7777700")  # the donor's liver reaches into the organ that the user drew
    assert math.isnan(found["donor"]) and math.isnan(found["network"])
    assert found["agreement"] == pytest.approx(2 * 3 / (4 + 4))
    assert (found["lost"], found["gained"]) == (1 / 4, 1 / 4)


@pytest.mark.parametrize(("completed", "truth"), [((), "1111100"), (("liver",), "1111100")], ids=["drawn", "corrected"])
def test_a_mask_from_a_person_tells_whether_the_label_became_better(completed, truth):
    found = changes(truth, "1111000", "7700000", completed=completed)
    assert found["donor"] == pytest.approx(4 / 7) and found["network"] == pytest.approx(8 / 9)
    assert (found["lost"], found["gained"]) == (0, 1)


def test_ignored_voxels_and_a_label_that_the_donor_does_not_find_do_not_count():
    assert changes("1133", "1110", "7777")["lost"] == 0
    nothing = changes("0000", "0100", "0000")
    assert nothing["agreement"] == 0 and math.isnan(nothing["lost"])


@pytest.fixture
def fold(nnunet_paths, tmp_path):
    """A fold on two cases, of a data set in which the donor, which calls the organ 5, completed it in case_1."""
    folds.write_dataset(tmp_path)
    raw = tmp_path / "nnUNet_raw" / "Dataset901_Tiny"
    (raw / "completed.json").write_text(json.dumps({
        "format": 1, "donor_values": {"organ": 5}, "completed": {"case_0": [], "case_1": ["organ"]}}))
    made = folds.write_fold(tmp_path, "nnUNetTrainerLoRA", shifts=(0, 1))
    content = json.loads((made.parent / "dataset.json").read_text())
    (made.parent / "dataset.json").write_text(json.dumps(content | {"completed": ["organ"]}))
    for case, shift in (("case_0", 2), ("case_1", 0)):
        folds.write(5 * (folds.mask(shift) == 1).astype(np.uint8), raw / "donorTr" / f"{case}.nii.gz")
    return made


def test_the_report_says_per_label_of_the_donor_what_it_lost_or_gained(fold, tmp_path):
    organ = {case: labels["organ"] for case, labels in read_fold(fold).result.against_donor.items()}
    assert organ["case_0"]["network"] == 1 > organ["case_0"]["donor"] > 0 and math.isnan(organ["case_1"]["donor"])
    text = compare([fold], tmp_path / "report").read_text()
    gained = 1 - organ["case_0"]["donor"]
    line = next(line for line in text.splitlines() if line.startswith("| organ | LoRA |"))
    assert f"+{gained:.3f}, 1 of 2 cases" in line and "1.000" in line and "| lesion | LoRA |" not in text
    assert "completed by a donor" in text and "donorTr" not in text
    assert "What each label of the donor lost or gained" in (tmp_path / "report" / "report.html").read_text()
    records = json.loads((tmp_path / "report" / "tables.json").read_text())["dataset901_tiny_kept_all_2"]
    assert records[0]["change"] == pytest.approx(gained) and (records[0]["cases"], records[0]["cases_of_a_person"]) == (2, 1)
    again = compare([tmp_path / "report" / "results.json"], tmp_path / "again").read_text()
    assert line in again, "the results hold it, so that it can be shown without the images"


def test_where_nobody_drew_a_label_the_report_does_not_call_it_better_or_worse(fold, tmp_path):
    (tmp_path / "nnUNet_raw" / "Dataset901_Tiny" / "donorTr" / "case_0.nii.gz").unlink()
    text = compare([fold], tmp_path / "report").read_text()
    assert "| organ | LoRA | not known | - | - |" in text


def test_without_the_donors_predictions_the_report_says_where_they_were_looked_for(fold, tmp_path, monkeypatch):
    monkeypatch.delenv("nnUNet_raw")
    monkeypatch.setattr("nnunet_dante.compare.sources.CaseFiles.truth", lambda self, case: (
        tmp_path / "nnUNet_raw" / "Dataset901_Tiny" / "labelsTr" / f"{case}.nii.gz"))
    text = compare([fold], tmp_path / "report").read_text()
    assert "nnUNet_raw/Dataset901_Tiny/donorTr: set nnUNet_raw" in text and "lost or gained, " not in text


def test_a_prediction_of_the_donor_of_another_shape_is_named(fold, tmp_path):
    folds.write(folds.mask()[:10], tmp_path / "nnUNet_raw" / "Dataset901_Tiny" / "donorTr" / "case_1.nii.gz")
    with pytest.raises(ResultError, match=r"donorTr/case_1.nii.gz has shape .* Delete it"):
        read_fold(fold)
