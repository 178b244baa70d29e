"""A training mirrors as its donor did, and labels that tell left from right are noticed."""

from __future__ import annotations

import json

import nibabel
import numpy as np
import pytest
import tiny
import torch

from nnunet_dante.errors import ConfigurationError
from nnunet_dante.models.donor import open_donor
from nnunet_dante.transfers.mirroring import chosen_axes, side_axis, side_pairs, side_warnings
from nnunet_dante.transfers.transfer import transfer

KEY = "inference_allowed_mirroring_axes"
SIDES = {"background": 0, "kidney_left": 1, "kidney_right": 2}


def donor(folder, axes=(0, 1, 2), **options):
    """Write a donor whose checkpoint says `axes`, or nothing for "missing"."""
    model = tiny.write_model_folder(folder, **options)
    file = next(model.glob("fold_*/*.pth"))
    content = torch.load(file, weights_only=False)
    content[KEY] = axes
    if axes == "missing":
        del content[KEY]
    torch.save(content, file)
    return model


@pytest.mark.parametrize(("written", "read"), [((0, 1, 2), (0, 1, 2)), ((0, 1), (0, 1)), (None, ()), ((), ()),
                                               ("missing", None)])
def test_none_is_no_mirroring_and_only_a_missing_entry_is_unknown(tmp_path, written, read):
    assert open_donor(donor(tmp_path, written)).mirroring_axes == read


@pytest.mark.parametrize(("written", "choice", "axes", "said"), [
    (None, "donor", [], "no mirroring, as the donor was trained"),
    ((0, 1), "donor", [0, 1], "axes 0, 1, as the donor was trained"),
    ("missing", "donor", None, "the donor's checkpoint does not say; nnU-Net's default: all axes"),
    ((0, 1), "none", [], "no mirroring (--mirroring none; the donor was trained with axes 0, 1)"),
    (None, "all", [0, 1, 2], "axes 0, 1, 2 (--mirroring all; the donor was trained with no mirroring)")])
def test_the_plans_and_the_report_hold_the_axes(nnunet_paths, written, choice, axes, said):
    dataset = tiny.write_raw_dataset(nnunet_paths["nnUNet_raw"], n_cases=2)
    tiny.write_fingerprint(nnunet_paths["nnUNet_preprocessed"] / dataset, n_cases=2)
    report = transfer(donor(nnunet_paths["nnUNet_results"], written), dataset, mirroring=choice, num_processes=1)
    plans = json.loads((nnunet_paths["nnUNet_preprocessed"] / dataset / report.plans_file).read_text())
    assert plans["dante"]["start_weights"]["3d_fullres"]["mirroring_axes"] == axes
    assert f"mirroring  {said}\n" in str(report)


def test_all_axes_of_a_2d_model_are_two_and_other_choices_are_refused():
    assert chosen_axes("all", None, dimension=2) == (0, 1)
    with pytest.raises(ConfigurationError, match="mirroring is 'some'; choose one of donor, none, all"):
        chosen_axes("some", None, dimension=3)


@pytest.mark.parametrize(("names", "pairs"), [
    (("background", "kidney_left", "kidney_right"), [("kidney_left", "kidney_right")]),
    (("Right Lung", "left lung"), [("left lung", "Right Lung")]), (("L-hip", "R-hip"), [("L-hip", "R-hip")]),
    (("FemurLeft", "FemurRight"), [("FemurLeft", "FemurRight")]),
    (("lung_upper_lobe_left", "lung_lower_lobe_right"), []), (("left_atrium", "aorta"), []),
    (("bright", "cleft", "liver"), [])])
def test_pairs_differ_in_their_side_alone(names, pairs):
    assert side_pairs(names) == pairs


@pytest.mark.parametrize(("codes", "transpose", "dimension", "axis"), [
    ("RAS", (0, 1, 2), 3, 2), ("LPS", (2, 0, 1), 3, 0), ("PIR", (0, 1, 2), 3, 0), ("RAS", (0, 1, 2), 2, 1),
    ("RAS", (2, 0, 1), 2, None), ("RAS", (1, 0, 2), 2, 1)])
def test_the_axis_from_left_to_right_depends_on_how_images_lie_and_on_the_plans(tmp_path, codes, transpose, dimension,
                                                                              axis):
    turned = nibabel.orientations.inv_ornt_aff(nibabel.orientations.axcodes2ornt(codes), (4, 4, 4))
    nibabel.save(nibabel.Nifti1Image(np.zeros((4, 4, 4), np.float32), np.linalg.inv(turned)), tmp_path / "i.nii.gz")
    assert "".join(nibabel.aff2axcodes(nibabel.load(tmp_path / "i.nii.gz").affine)) == codes
    assert side_axis(tmp_path / "i.nii.gz", transpose=transpose, dimension=dimension) == axis
    assert side_axis(tmp_path / "missing.png", transpose=(0, 1, 2), dimension=2) == 1


@pytest.mark.parametrize(("axes", "warned"), [((0, 1, 2), True), (None, True), ((0, 1), False), ((), False)])
def test_sides_are_warned_of_where_they_would_be_mirrored(axes, warned):
    found = list(side_warnings(SIDES, axes, side_axis=2, known=axes is not None))
    assert bool(found) == warned
    assert not warned or "(kidney_left and kidney_right)" in found[0] and "--mirroring none" in found[0]


def test_transfer_warns_of_sides(nnunet_paths):
    dataset = tiny.write_raw_dataset(nnunet_paths["nnUNet_raw"], n_cases=2, labels=SIDES)
    tiny.write_fingerprint(nnunet_paths["nnUNet_preprocessed"] / dataset, n_cases=2)
    model = donor(nnunet_paths["nnUNet_results"], labels=SIDES)
    assert "kidney_left and kidney_right" in str(transfer(model, dataset, num_processes=1))
    assert "kidney_left and" not in str(transfer(model, dataset, mirroring="none", num_processes=1))
