"""fingerprint.py: facts about a data set are those of its files as they are now."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tiny
from nnunetv2.paths import nnUNet_preprocessed

from nnunet_dante.datasets.dataset import open_target
from nnunet_dante.errors import TransferError


@pytest.fixture
def dataset(nnunet_paths):
    return nnunet_paths["nnUNet_raw"] / tiny.write_raw_dataset(nnunet_paths["nnUNet_raw"], n_cases=3)


@pytest.fixture
def extractions(monkeypatch):
    """Replace nnU-Net's extractor, which starts processes, by one that writes what the list's last entry says."""
    wanted = []

    class Extractor:
        def __init__(self, name, num_processes):
            self.name = name

        def run(self, *, overwrite_existing):
            assert overwrite_existing
            content = wanted.pop()
            if isinstance(content, Exception):
                raise content
            path = Path(nnUNet_preprocessed, self.name, "dataset_fingerprint.json")
            path.parent.mkdir(exist_ok=True)
            path.write_text(json.dumps(content))

    monkeypatch.setattr("nnunet_dante.datasets.fingerprint.DatasetFingerprintExtractor", Extractor)
    return wanted


def fingerprint(n, mean=1.0, channels=1, spacing=(1.0, 1.0, 1.0)):
    return {"spacings": [list(spacing)] * n, "shapes_after_crop": [[20, 24, 18]] * n,
            "foreground_intensity_properties_per_channel": {str(c): {"mean": mean} for c in range(channels)}}


def test_extracted_once_and_again_when_cases_came(dataset, extractions):
    target = open_target(901)
    extractions.append(fingerprint(3, mean=5.0))
    assert target.fingerprint() == target.fingerprint() == fingerprint(3, mean=5.0)
    (target.preprocessed / "dataset_fingerprint.json").write_text(json.dumps(fingerprint(2)))
    extractions.append(fingerprint(3, mean=7.0))
    assert target.fingerprint() == fingerprint(3, mean=7.0)


def second_contrast(dataset):
    content = json.loads((dataset / "dataset.json").read_text())
    (dataset / "dataset.json").write_text(json.dumps(content | {"channel_names": {"0": "MRI", "1": "T2"}}))
    for image in list((dataset / "imagesTr").iterdir()):
        shutil.copy(image, image.with_name(image.name.replace("_0000", "_0001")))


def coarser(dataset):
    """Other images under the same names, with old dates, as an archive brings them."""
    for path in [*(dataset / "imagesTr").iterdir(), *(dataset / "labelsTr").iterdir()]:
        image = nibabel.load(path)
        nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj), np.diag([3.0, 3.0, 5.0, 1.0])), path)
        os.utime(path, (1e9, 1e9))


def other_voxels(dataset):
    path = dataset / "imagesTr" / "case_000_0000.nii.gz"
    image = nibabel.load(path)
    nibabel.save(nibabel.Nifti1Image(np.asarray(image.dataobj) * 2, image.affine), path)
    os.utime(path, (2e9, 2e9))


def renamed(dataset):
    for folder, old, new in (("imagesTr", "case_000_0000", "a_0000"), ("labelsTr", "case_000", "a")):
        (dataset / folder / f"{old}.nii.gz").rename(dataset / folder / f"{new}.nii.gz")


@pytest.mark.parametrize(("change", "then"), [
    (second_contrast, fingerprint(3, channels=2)), (coarser, fingerprint(3, spacing=(5.0, 3.0, 3.0))),
    (other_voxels, fingerprint(3, mean=2.0)), (renamed, fingerprint(3, mean=2.0))])
def test_changed_files_are_fingerprinted_again(dataset, extractions, change, then):
    extractions.append(fingerprint(3))
    open_target(901).fingerprint()
    change(dataset)
    extractions.append(then)
    assert open_target(901).fingerprint() == then
    assert open_target(901).fingerprint() == then and not extractions


@pytest.mark.parametrize(("change", "then"), [
    (second_contrast, fingerprint(3, channels=2)), (coarser, fingerprint(3, spacing=(5.0, 3.0, 3.0))),
    (other_voxels, fingerprint(3, mean=2.0))])
def test_so_are_those_of_a_fingerprint_that_nnunet_or_an_older_version_wrote(dataset, extractions, change, then):
    folder = open_target(901).preprocessed
    folder.mkdir()
    (folder / "dataset_fingerprint.json").write_text(json.dumps(fingerprint(3)))
    assert open_target(901).fingerprint() == fingerprint(3)
    change(dataset)
    extractions.append(then)
    assert open_target(901).fingerprint() == then


@pytest.mark.parametrize("damage", [
    "[" * 100_000, "[]", "null", json.dumps(fingerprint(3) | {"spacings": [[0, 0, 0]] * 3}),
    json.dumps(fingerprint(3) | {"shapes_after_crop": "x"}),
    json.dumps(fingerprint(3) | {"median_relative_size_after_cropping": "x"}), json.dumps({"spacings": []})])
def test_a_damaged_fingerprint_is_extracted_again(dataset, extractions, damage):
    target = open_target(901)
    target.preprocessed.mkdir()
    (target.preprocessed / "dataset_fingerprint.json").write_text(damage)
    extractions.append(fingerprint(3))
    assert target.fingerprint() == fingerprint(3)


@pytest.mark.parametrize("damage", ["[", "[]", "3", '{"fingerprint": {}}'])
def test_a_damaged_record_of_the_files_counts_as_none(dataset, extractions, damage):
    extractions.append(fingerprint(3))
    target = open_target(901)
    target.fingerprint()
    (target.preprocessed / "dataset_fingerprint_files.json").write_text(damage)
    assert target.fingerprint() == fingerprint(3)


def test_what_the_extractor_cannot_read_is_named(dataset, extractions):
    extractions.append(RuntimeError("file is not a NIfTI"))
    with pytest.raises(TransferError, match="could not extract the fingerprint.*not a NIfTI.*--verify_dataset_integrity"):
        open_target(901).fingerprint()


def test_statistics_that_are_no_numbers_are_refused(dataset, extractions):
    extractions.append(fingerprint(3, mean=float("nan")))
    with pytest.raises(TransferError, match="intensity statistics.*are not finite"):
        open_target(901).fingerprint()
