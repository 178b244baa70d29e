"""data.py: halves that share no voxel and keep their place, labels by name, folders that nnU-Net reads."""

from __future__ import annotations

import json

import nibabel
import numpy as np
import pytest

from nnunet_dante.demo.data import CT, MR, SPINE, merge_labels, split_at_midline, write_dataset
from nnunet_dante.errors import ConfigurationError


def volume(array: np.ndarray, codes: str = "PIR") -> nibabel.Nifti1Image:
    """A volume of 1.5 mm with axes `codes`, off-centre in the world."""
    ornt = nibabel.orientations.axcodes2ornt(codes)
    affine = nibabel.orientations.inv_ornt_aff(ornt, array.shape) @ np.eye(4)
    affine = np.diag([1.5, 1.5, 1.5, 1]) @ affine
    affine[:3, 3] += (-20, 7, 11)
    return nibabel.Nifti1Image(array, affine)


def spine(codes: str = "PIR", width: int = 15) -> tuple[nibabel.Nifti1Image, nibabel.Nifti1Image]:
    """A ramp as image; a mask whose centre of mass along left-right is the middle of voxel 6."""
    axis = next(i for i, c in enumerate(codes) if c in "LR")
    shape = [8, 9, 10]
    shape[axis] = width
    image = np.arange(np.prod(shape), dtype=np.int16).reshape(shape)
    mask = np.zeros(shape, np.uint8)
    index = [slice(2, 6)] * 3
    index[axis] = slice(4, 9)
    mask[tuple(index)] = 49
    return volume(image, codes), volume(mask, codes)


@pytest.mark.parametrize("codes", ["PIR", "RAS", "LPS", "AIL"])
def test_halves_share_no_voxel_miss_none_and_keep_their_world_position(codes):
    image, mask = spine(codes)
    halves = split_at_midline(image, mask)
    values = {side: np.asarray(half.dataobj) for side, (half, _) in halves.items()}
    together = np.concatenate([v.ravel() for v in values.values()])
    assert sorted(together) == list(range(image.dataobj.size))  # each value of the ramp once
    for half, half_mask in halves.values():
        np.testing.assert_array_equal(half.affine, half_mask.affine)
        where = nibabel.affines.apply_affine(half.affine, (1, 2, 3))
        source = np.round(nibabel.affines.apply_affine(np.linalg.inv(image.affine), where)).astype(int)
        assert half.dataobj[1, 2, 3] == image.dataobj[tuple(source)]
    centre = {side: nibabel.affines.apply_affine(h.affine, np.array(h.shape) / 2)[0] for side, (h, _) in halves.items()}
    assert centre["left"] < centre["right"]  # world x runs to the patient's right


def test_the_cut_is_at_the_middle_of_what_is_labelled():
    halves = split_at_midline(*spine("RAS", width=15))
    assert halves["left"][0].shape[0] in (6, 7)
    assert {side: int((np.asarray(mask.dataobj) > 0).sum()) for side, (_, mask) in halves.items()} in (
        {"left": 32, "right": 48}, {"left": 48, "right": 32})


def test_masks_that_do_not_fit_are_refused():
    image, mask = spine()
    with pytest.raises(ConfigurationError, match="the same voxel grid"):
        split_at_midline(image, nibabel.Nifti1Image(np.asarray(mask.dataobj), np.eye(4)))
    with pytest.raises(ConfigurationError, match="empty"):
        split_at_midline(image, nibabel.Nifti1Image(np.zeros(mask.shape, np.uint8), mask.affine))


def test_sub_labels_are_merged_in_the_order_of_their_names():
    source = np.array([[0, 41, 48, 49, 50, 60, 61, 62, 100]])
    assert merge_labels(source, SPINE).tolist() == [[0, 2, 2, 1, 1, 3, 3, 0, 4]]
    assert merge_labels(source, CT.structures).tolist() == [[0, 2, 2, 1, 1, 0, 0, 0, 0]]


def test_the_target_adds_structures_to_those_of_the_donor():
    assert list(MR.labels)[:3] == list(CT.labels) == ["background", "vertebral_body", "posterior_elements"]
    assert list(MR.labels)[3:] == ["spinal_canal", "intervertebral_disc"]


def test_channel_names_give_the_normalisation_of_each_modality():
    from nnunetv2.preprocessing.normalization.map_channel_name_to_normalization import get_normalization_scheme

    assert [get_normalization_scheme(m.channel).__name__ for m in (CT, MR)] == ["CTNormalization", "ZScoreNormalization"]


def test_the_dataset_has_the_form_nnunet_checks(tmp_path):
    from nnunetv2.experiment_planning.verify_dataset_integrity import verify_dataset_integrity

    image, mask = spine()
    files = {}
    for name, part in ((MR.image, image), (MR.mask, mask)):
        files[name] = tmp_path / name
        nibabel.save(part, files[name])
    folder = write_dataset(tmp_path / "raw", MR, files)
    verify_dataset_integrity(str(folder), num_processes=1)
    assert sorted(p.name for p in (folder / "imagesTr").iterdir()) == ["mr_left_0000.nii.gz", "mr_right_0000.nii.gz"]
    assert json.loads((folder / "dataset.json").read_text())["labels"] == MR.labels
