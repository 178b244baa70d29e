"""annotated.py: which labels were drawn in which case; the checks of the entry, and who leaves out what."""

from __future__ import annotations

import json

import numpy as np
import pytest
import tiny

from nnunet_dante.datasets.annotated import check_drawn, drawn_nothing, foreground, undrawn_labels, without_cases
from nnunet_dante.datasets.dataset import open_target
from nnunet_dante.datasets.shots import write_shots
from nnunet_dante.errors import TransferError

CASES = [f"case_00{i}" for i in range(5)]


def content(annotated) -> dict:
    return tiny.dataset_json() | {"annotated": annotated}


def test_a_case_that_is_left_out_is_drawn_completely():
    assert undrawn_labels(content({"case_001": ["organ"], "case_002": [], "case_003": ["lesion", "organ"]}), CASES) == {
        "case_001": {"lesion"}, "case_002": {"organ", "lesion"}}
    assert undrawn_labels(tiny.dataset_json(), CASES) == {}


@pytest.mark.parametrize(("annotated", "said"), [
    ({"case_009": ["organ"]}, "'case_009', which imagesTr does not hold; .* such as case_000"),
    ({"case_001": ["Organ"]}, "label 'Organ' for case case_001, which is not among its labels: organ, lesion"),
    ({"case_001": ["background"]}, "label 'background'"), ({"case_001": "organ"}, "must name the drawn labels"),
    (["case_001"], "must name the drawn labels"), ({"case_001": [1]}, "must name the drawn labels")])
def test_unknown_names_and_other_forms_are_refused(annotated, said):
    with pytest.raises(TransferError, match=said):
        undrawn_labels(content(annotated), CASES)


def test_names_of_cases_do_not_travel():
    full = content({"patient": []}) | {"rehearsed": {"cases": ["patient"]}, "completed": ["liver"], **{
        key: {"patient": "file"} for key in ("dataset", "training", "test")}}
    assert without_cases(full) == tiny.dataset_json() | {"completed": ["liver"]}


def test_a_mask_must_not_hold_what_was_not_drawn():
    regions = {"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [1, 2]}
    check_drawn(np.array([0, 1, 2]), regions, ["core"], "m")  # 2 is also part of whole, which was drawn
    with pytest.raises(TransferError, match="m holds voxels of whole"):
        check_drawn(np.array([0, 1, 2]), regions, ["whole"], "m")
    assert foreground(regions) == ("whole", "core")
    assert drawn_nothing(regions, {"a": frozenset({"whole", "core"}), "b": frozenset({"core"})}, "a")
    assert not drawn_nothing(regions, {"b": frozenset({"core"})}, "b")


@pytest.fixture
def raw(nnunet_paths):
    return nnunet_paths["nnUNet_raw"] / tiny.write_raw_dataset(nnunet_paths["nnUNet_raw"], values=(1,))


def annotate(raw, **entry):
    (raw / "dataset.json").write_text(json.dumps(content(entry)))


def test_a_data_set_is_opened_with_what_was_not_drawn(raw):
    annotate(raw, case_001=["organ"])
    assert open_target(raw.name).undrawn == {"case_001": {"lesion"}}
    annotate(raw, case_001=["lesion"])
    with pytest.raises(TransferError, match="case_001.nii.gz holds voxels of organ"):
        open_target(raw.name)
    annotate(raw, case_007=["organ"])
    with pytest.raises(TransferError, match="case_007"):
        open_target(raw.name)


def test_shots_leave_out_cases_without_any_label_and_say_which_labels_a_fold_lacks(raw):
    import nibabel

    file = raw / "labelsTr" / "case_004.nii.gz"
    nibabel.save(nibabel.Nifti1Image(np.zeros((20, 24, 18), np.uint8), np.eye(4)), file)
    annotate(raw, case_004=[], case_000=["organ"], case_001=["organ"], case_002=["organ"])
    drawn = write_shots(raw.name, [1, "all"])
    used = {*drawn.val, *drawn.pool}
    assert used == set(CASES) - {"case_004"}
    said = " ".join(drawn.notes)
    assert "1 cases are left out" in said and "lesion was drawn in no" in said and "organ was drawn in no" not in said
