"""match.py: names are matched in one place, and every list that the plans, the surgery and the report use follows."""

from __future__ import annotations

import pytest
import tiny

from nnunet_dante.transfers.match import NameMatch, are_alike, match_data_sets, match_names


def test_case_and_blanks_do_not_count_and_repeated_names_match_in_turn():
    assert match_names(("ct", "MR"), ("MR ", "CT")) == (1, 0)
    assert match_names(("rgb", "rgb", "rgb", "x"), ("rgb", "y", "rgb")) == (0, 2, None, None)


def test_what_is_matched_new_and_dropped():
    match = NameMatch(target=("T2", "CT"), donor=("ct", "PET"))
    assert match.source == (None, 0)
    assert match.by_name() == {"T2": None, "CT": "ct"}
    report = match.report("zeros")
    assert (report.matched, report.new, report.dropped, report.rule) == (("CT",), ("T2",), ("PET",), "zeros")
    assert NameMatch(target=("CT",), donor=("CT", "PET")).report("zeros").rule == ""


def test_two_data_sets_are_matched_with_their_regions_and_cascade():
    target = tiny.dataset_json(labels={"background": 0, "whole": [1, 2], "lesion": 2}, regions_class_order=[1, 2])
    match = match_data_sets(target, tiny.dataset_json(channel_names={"0": "mri"}), cascaded=True)
    assert match.channels.source == (0,)
    assert (match.labels.target_regions, match.labels.donor_regions) == (True, False)
    assert match.labels.knows_structure
    report = match.labels.report("absent")
    assert (report.matched, report.new, report.dropped) == (("lesion",), ("whole",), ("organ",))
    assert match.previous_stage.donor == ("organ", "lesion")
    assert match_data_sets(target, target, cascaded=False).previous_stage.target == ()


@pytest.mark.parametrize(("name", "other", "alike"), [
    ("kidney_left", "LeftKidney", True), ("liver", "liver_new", True), ("tumour", "Tumor", True), ("MR", "MRI", True),
    ("T1", "T1w", True), ("kidney_left", "kidney_right", False), ("vertebrae_L1", "vertebrae_L2", False),
    ("T1w", "T2w", False), ("CT", "MR", False), ("left kidney", "left lung", False), ("é", "ü", False)])
def test_names_that_may_mean_the_same(name, other, alike):
    assert are_alike(name, other) == are_alike(other, name) == alike


def test_labels_of_one_number_may_be_renamed_but_not_where_either_side_has_regions():
    donor, target = tiny.Rows(("background", "liver", "spleen")), tiny.Rows(("background", "organ", "spleens"))
    assert tiny.label_match(donor, target).report("").renamed == (
        ("spleens", "spleen", "similar names"), ("organ", "liver", "both have the number 1"))
    assert tiny.label_match(donor, tiny.Rows(("a", "b"), regions=True)).report("").renamed == ()
    assert list(tiny.label_match(donor, donor).report("").hint("labels")) == []
