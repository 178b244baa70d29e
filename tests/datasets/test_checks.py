"""checks.py: files that nnU-Net would pass over, or take for what they are not, are named."""

from __future__ import annotations

import json

import nibabel
import numpy as np
import pytest
import tiny

from nnunet_dante.datasets.dataset import open_target
from nnunet_dante.errors import TransferError


@pytest.fixture
def dataset(nnunet_paths):
    return nnunet_paths["nnUNet_raw"] / tiny.write_raw_dataset(nnunet_paths["nnUNet_raw"], n_cases=3)


def rewrite(path, change):
    image = nibabel.load(path)
    voxels, affine = change(np.asarray(image.dataobj), image.affine.copy())
    nibabel.save(nibabel.Nifti1Image(voxels, affine), path)


def shifted(voxels, affine):
    affine[:3, 3] += 30
    return voxels, affine


def test_a_mask_at_another_place_than_its_image_is_named(dataset):
    rewrite(dataset / "labelsTr" / "case_001.nii.gz", shifted)
    (warning,) = open_target(901).warnings
    assert "different places in space" in warning and "1 of 3 cases: case_001." in warning


def test_masks_that_hold_no_label_at_all_are_refused(dataset):
    for path in (dataset / "labelsTr").iterdir():
        rewrite(path, lambda voxels, affine: (np.zeros_like(voxels), affine))
    with pytest.raises(TransferError, match="No mask of the 3 cases holds a label"):
        open_target(901)


def test_a_mask_of_another_size_is_refused_by_name(dataset):
    rewrite(dataset / "labelsTr" / "case_002.nii.gz", lambda voxels, affine: (voxels[:-1], affine))
    with pytest.raises(TransferError, match=r"differ in size: case_002 \(20 x 24 x 18 and 19 x 24 x 18\)"):
        open_target(901)


def test_a_case_with_another_ending_is_not_lost_in_silence(dataset):
    for folder, name in (("imagesTr", "case_002_0000"), ("labelsTr", "case_002")):
        nibabel.load(dataset / folder / f"{name}.nii.gz").to_filename(dataset / folder / f"{name}.nii")
        (dataset / folder / f"{name}.nii.gz").unlink()
    target = open_target(901)
    assert sorted(target.cases) == ["case_000", "case_001"]
    assert any("imagesTr holds 1 file with another ending than .nii.gz" in w and "case_002_0000.nii" in w
               for w in target.warnings)
    assert any("labelsTr" in w and "case_002.nii" in w for w in target.warnings)


def test_masks_without_images_and_images_without_number_are_named(dataset):
    (dataset / "imagesTr" / "case_002_0000.nii.gz").rename(dataset / "imagesTr" / "case_002.nii.gz")
    text = " ".join(open_target(901).warnings)
    assert "imagesTr holds 1 file without a case: case_002.nii.gz" in text
    assert "labelsTr holds 1 file without a case: case_002.nii.gz. A mask needs the images" in text


def test_other_files_beside_the_images_are_nobodys_business(dataset):
    for name in ("notes.txt", ".DS_Store", "case_000.json"):
        (dataset / "imagesTr" / name).write_text("")
    assert open_target(901).warnings == ()


def test_a_list_of_files_in_dataset_json_names_the_cases(dataset):
    moved = dataset / "elsewhere"
    (dataset / "imagesTr").rename(moved)
    content = json.loads((dataset / "dataset.json").read_text())
    content["dataset"] = {"patient": {"images": ["elsewhere/case_001_0000.nii.gz"], "label": "labelsTr/case_001.nii.gz"}}
    (dataset / "dataset.json").write_text(json.dumps(content))
    target = open_target(901)
    assert target.cases["patient"].images == (moved / "case_001_0000.nii.gz",)
    assert target.warnings == () and list(target.cases) == ["patient"]
    (moved / "case_001_0000.nii.gz").unlink()
    with pytest.raises(TransferError, match=r"lists images that are not there: .*case_001_0000\.nii\.gz"):
        open_target(901)
