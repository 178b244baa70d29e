"""data.py: the data set is found by nnU-Net without a copy, and cases of one patient stay together."""

from __future__ import annotations

import json
import re

import image_folders
import pytest
import tiny

from nnunet_dante.adaptation.data import put_data, write_folds
from nnunet_dante.datasets.dataset import open_target
from nnunet_dante.errors import ConfigurationError, DatasetError


@pytest.fixture
def raw(tmp_path, monkeypatch):
    for name in ("nnUNet_raw", "nnUNet_preprocessed"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    return tmp_path / "nnUNet_raw"


def put(data, raw, name, labels=()):
    return put_data(data, raw, name, labels, None, say=lambda _: None)


def source(tmp_path, name="mine", **options):
    (tmp_path / "data").mkdir()
    return (tmp_path / "data" / tiny.write_raw_dataset(tmp_path / "data", **options)).rename(tmp_path / "data" / name)


@pytest.mark.parametrize(("folder", "name", "found"), [
    ("Dataset012_Liver", None, "Dataset012_Liver"), ("my cases", None, r"Dataset[1-9]\d\d_mycases"),
    ("my cases", "Dataset123_Mine", "Dataset123_Mine")])
def test_the_data_set_gets_a_name_that_nnunet_takes_and_nothing_is_copied(tmp_path, raw, folder, name, found):
    data = source(tmp_path, folder)
    pattern, found = found, put(data, raw, name)["dataset"]
    assert re.fullmatch(pattern, found)
    assert (raw / found).is_symlink() and open_target(found).cases
    assert put(data, raw, name) == {"dataset": found}, "a second time is the same"


def test_two_folders_of_one_name_become_two_data_sets(tmp_path, raw):
    found = []
    for hospital in ("north", "south"):
        (tmp_path / hospital).mkdir()
        found.append(put(source(tmp_path / hospital, "mine"), raw, None)["dataset"])
    assert len(set(found)) == 2 and all(name.endswith("_mine") for name in found)


def test_another_data_set_of_that_name_and_folders_that_are_none_are_refused(tmp_path, raw):
    data = source(tmp_path, "Dataset012_Liver")
    with pytest.raises(ConfigurationError, match="name of the data set is 'Liver'; give one such as Dataset123_Mine"):
        put(data, raw, "Liver")
    (raw / "Dataset012_Liver").mkdir()
    with pytest.raises(ConfigurationError, match="is another data set than .*; give another name"):
        put(data, raw, None)


def test_channels_have_the_names_that_the_user_gives(tmp_path, raw):
    image, mask = image_folders.case()
    image_folders.write(image, tmp_path / "mine" / "P1.nii.gz")
    image_folders.write(mask, tmp_path / "mine" / "P1_seg.nii.gz")
    put_data(tmp_path / "mine", raw, "Dataset123_Mine", ["liver=1,spleen=2"], None, channels=["MRI"], say=lambda _: None)
    assert open_target("Dataset123_Mine").dataset_json["channel_names"] == {"0": "MRI"}
    with pytest.raises(ConfigurationError, match="its dataset.json names the channels"):
        put_data(raw / "Dataset123_Mine", raw, "Dataset124_Other", [], None, channels=["CT"], say=lambda _: None)


def test_any_other_folder_of_images_and_masks_becomes_a_data_set(tmp_path, raw):
    for n in range(2):
        image, mask = image_folders.case(n)
        image_folders.write(image, tmp_path / "mine" / f"P{n}.nii.gz")
        image_folders.write(mask, tmp_path / "mine" / f"P{n}_seg.nii.gz")
    assert put(tmp_path / "mine", raw, "Dataset123_Mine", ["liver=1,spleen=2"]) == {"dataset": "Dataset123_Mine"}
    target = open_target("Dataset123_Mine")
    assert sorted(target.cases) == ["P0", "P1"] and list(target.dataset_json["labels"]) == ["background", "liver", "spleen"]
    (tmp_path / "empty").mkdir()
    with pytest.raises(DatasetError):
        put(tmp_path / "empty", raw, None)


def folds(raw, n_cases, groups=None):
    name = tiny.write_raw_dataset(raw, n_cases=n_cases)
    target = open_target(name)
    target.preprocessed.mkdir()
    if groups:
        (target.raw / "groups.csv").write_text("\n".join(f"{c},{g}" for c, g in zip(sorted(target.cases), groups)))
    names = write_folds(target, None)["folds"]
    file = target.preprocessed / "splits_final.json"
    return names, json.loads(file.read_text()) if file.is_file() else []


@pytest.mark.parametrize(("n_cases", "number"), [(1, 0), (2, 2), (4, 4), (7, 5)])
def test_every_case_is_held_back_once(raw, n_cases, number):
    names, splits = folds(raw, n_cases)
    assert names == [str(n) for n in range(number)] and len(splits) == number
    held = [case for split in splits for case in split["val"]]
    assert len(held) == len(set(held)) == (n_cases if number else 0)
    assert not any(set(split["train"]) & set(split["val"]) for split in splits)


def test_cases_of_one_patient_stay_together(raw):
    _, splits = folds(raw, 6, groups="aabbcc")
    assert len(splits) == 3 and all(len(split["val"]) == 2 for split in splits)
    for split in splits:
        assert split["val"][0][:-1] == split["val"][1][:-1]
        assert int(split["val"][0][-1]) // 2 == int(split["val"][1][-1]) // 2


def test_a_single_patient_leaves_nothing_to_choose_on(raw):
    assert folds(raw, 3, groups="aaa")[0] == []
