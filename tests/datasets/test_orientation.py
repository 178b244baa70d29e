"""orientation.py: how the training files lie, from whatever is left of them."""

from __future__ import annotations

import json

import nibabel
import numpy as np
import pytest
import tiny

from nnunet_dante.datasets.images import Case
from nnunet_dante.datasets.orientation import Orientation, case_orientations, compare_orientations, training_orientation
from nnunet_dante.models.donor import open_donor


def write(path, affine, shape=(4, 5, 6)):
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(np.zeros(shape, np.uint8), affine), path)


LAS = np.diag([-1.0, 1, 2, 1])
TURN = np.array([[0.96, -0.28, 0, 0], [0.28, 0.96, 0, 0], [0, 0, 1.0, 0], [0, 0, 0, 1.0]])
OBLIQUE = TURN @ np.array([[0, 0, -2.0, 5], [-1.0, 0, 0, 6], [0, 1.0, 0, 7], [0, 0, 0, 1.0]])


@pytest.fixture
def model(tmp_path, monkeypatch):
    monkeypatch.delenv("nnUNet_raw", raising=False)
    return tiny.write_model_folder(tmp_path / "results")


@pytest.mark.parametrize(("affine", "codes"), [(np.eye(4), "RAS"), (LAS, "LAS"), (OBLIQUE, "PSL")])
def test_predictions_of_the_validation_tell(model, affine, codes):
    write(model / "fold_0" / "validation" / "case.nii.gz", affine)
    found = training_orientation(open_donor(model), model)
    assert found.codes == codes == "".join(nibabel.aff2axcodes(affine)) and not found.assumed


def test_training_images_tell_and_the_majority_counts(model, tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", str(tmp_path / "raw"))
    for case, affine in enumerate((LAS, np.eye(4), LAS)):
        write(tmp_path / "raw" / "Dataset900_Donor" / "imagesTr" / f"case_{case}_0000.nii.gz", affine)
    found = training_orientation(open_donor(model), model)
    assert found.codes == "LAS" and "2 of 3" in found.known_from


def test_damaged_files_do_not_count(model):
    write(model / "fold_0" / "validation" / "a.nii.gz", LAS)
    (model / "fold_0" / "validation" / "b.nii.gz").write_bytes(b"no image")
    assert training_orientation(open_donor(model), model).codes == "LAS"


def test_a_guess_is_called_one(model):
    found = training_orientation(open_donor(model), model)
    assert found.codes == "RAS" and found.assumed and "--orientation" in found.known_from


def test_what_the_user_says_counts_most(model):
    write(model / "fold_0" / "validation" / "case.nii.gz", LAS)
    assert training_orientation(open_donor(model), model, codes="pir").codes == "PIR"


@pytest.mark.parametrize(("reader", "codes", "as_shown"), [("NibabelIOWithReorient", "RAS", False),
                                                           ("NaturalImage2DIO", "LPS", True)])
def test_some_readers_know_by_themselves(model, reader, codes, as_shown):
    plans = json.loads((model / "plans.json").read_text()) | {"image_reader_writer": reader}
    (model / "plans.json").write_text(json.dumps(plans))
    write(model / "fold_0" / "validation" / "case.nii.gz", LAS)
    found = training_orientation(open_donor(model), model)
    assert (found.codes, found.as_shown) == (codes, as_shown)


@pytest.fixture
def cases(tmp_path):
    """Five cases, of which two are stored as LAS."""
    for n in range(5):
        write(tmp_path / f"{n}.nii.gz", LAS if n in (1, 3) else np.eye(4))
    return {str(n): Case(images=(tmp_path / f"{n}.nii.gz",), mask=tmp_path / f"{n}.nii.gz") for n in range(5)}


def test_cases_that_lie_otherwise_than_the_donors_are_named(cases):
    text, warnings = compare_orientations(case_orientations(cases, "SimpleITKIO"), Orientation("RAS", "20 of 20 files"))
    assert text == "your images RAS (3 cases), LAS (2 cases); the donor's images RAS (20 of 20 files)"
    assert "2 of 5 cases" in warnings[0] and "1 (LAS), 3 (LAS)" in warnings[0]
    _, warnings = compare_orientations(dict.fromkeys(cases, "LAS"), Orientation("RAS", "x"))
    assert warnings[0].startswith("all cases are stored in another orientation than the donor saw (RAS)")


def test_of_an_unknown_donor_only_the_minority_is_named(cases):
    text, warnings = compare_orientations(case_orientations(cases, "SimpleITKIO"), Orientation("RAS", "x", assumed=True))
    assert text.endswith("the donor's images not known") and "2 of 5 cases" in warnings[0] and "most of your images" in warnings[0]
    assert compare_orientations(dict.fromkeys(cases, "LAS"), Orientation("RAS", "x", assumed=True))[1] == []


def test_readers_that_turn_images_or_know_no_orientation_leave_nothing_to_say(cases):
    assert set(case_orientations(cases, "NibabelIOWithReorient").values()) == {"RAS"}
    assert case_orientations(cases, "Tiff3DIO") == {}
    assert compare_orientations({}, Orientation("LPS", "x", as_shown=True))[1] == []
