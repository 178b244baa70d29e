"""dataset.py: a data set that will not train is refused before anything is written, with what to do."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import tiny

from nnunet_dante.datasets.dataset import open_target
from nnunet_dante.errors import TransferError


@pytest.fixture
def dataset(nnunet_paths):
    return nnunet_paths["nnUNet_raw"] / tiny.write_raw_dataset(nnunet_paths["nnUNet_raw"], n_cases=3)


def edit_json(folder, **changes):
    path = folder / "dataset.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize("name", [901, "901", "Dataset901_Tiny"])
def test_found_by_id_and_name(dataset, name):
    target = open_target(name)
    assert target.name == "Dataset901_Tiny"
    assert sorted(target.cases) == ["case_000", "case_001", "case_002"]
    assert target.warnings == ()


@pytest.mark.parametrize("variable", ["nnUNet_raw", "nnUNet_preprocessed"])
def test_paths_not_set(dataset, monkeypatch, variable):
    monkeypatch.delenv(variable)
    with pytest.raises(TransferError, match=f"environment variable {variable} is not set.*export {variable}="):
        open_target(901)


def test_raw_is_no_folder(dataset, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", str(dataset / "nothing"))
    with pytest.raises(TransferError, match="which is no folder"):
        open_target(901)


@pytest.mark.parametrize("name", [7, "7", "Dataset007_Heart", "heart"])
def test_unknown_data_set_lists_what_there_is(dataset, name):
    with pytest.raises(TransferError, match="is not below nnUNet_raw .*Dataset901_Tiny.*Give a number"):
        open_target(name)


def test_id_used_twice(dataset):
    shutil.copytree(dataset, dataset.with_name("Dataset901_Other"))
    with pytest.raises(TransferError, match="used twice.*Dataset901_Other.*Dataset901_Tiny"):
        open_target(901)
    assert open_target("Dataset901_Other").name == "Dataset901_Other"


def test_missing_label_file(dataset):
    (dataset / "labelsTr" / "case_001.nii.gz").unlink()
    with pytest.raises(TransferError, match=r"1 of 3 cases have no label file: labelsTr lacks case_001\.nii\.gz"):
        open_target(901)


def test_missing_label_in_dataset_json(dataset):
    edit_json(dataset, labels={"background": 0, "organ": 1})
    with pytest.raises(TransferError, match=r"case_000\.nii\.gz holds the values \['2'\], which dataset.json does not name"):
        open_target(901)


def test_ignore_label_is_allowed_in_masks(dataset):
    edit_json(dataset, labels={"background": 0, "organ": 1, "ignore": 2})
    assert open_target(901).warnings == ()


def test_label_that_no_case_holds_is_reported(dataset):
    edit_json(dataset, labels=tiny.LABELS | {"vessel": 3})
    assert open_target(901).warnings == ("no case holds vessel: what the donor knows of it may be forgotten",)


def test_other_channel_count(dataset):
    edit_json(dataset, channel_names={"0": "T1", "1": "T2"})
    with pytest.raises(TransferError, match=r"names 2 channels \(T1, T2\), but case case_000 has 1 in 1 files"):
        open_target(901)


def test_one_case_lacks_a_channel(nnunet_paths):
    raw = nnunet_paths["nnUNet_raw"]
    folder = raw / tiny.write_raw_dataset(raw, n_cases=3, channel_names={"0": "T1", "1": "T2"})
    (folder / "imagesTr" / "case_002_0001.nii.gz").unlink()
    with pytest.raises(TransferError, match=r"case_000 has 2 image files, but case_002 \(1\) not"):
        open_target(901)


@pytest.mark.parametrize(("changes", "message"), [
    ({"labels": {"background": 0, "organ": 1, "lesion": 3}}, "0 to 2, each once"),
    ({"labels": {"background": 0, "ignore": 1, "organ": 2, "lesion": 1}}, "refuses the labels"),
    ({"labels": {"background": 0, "whole": [1, 2], "core": 2}}, "regions_class_order"),
    ({"labels": {"background": 0, "whole": [1, 2], "core": 2}, "regions_class_order": [[1], [2]]},
     r"regions_class_order of dataset\.json is \[\[1\], \[2\]\]; it must be a list of 2 whole numbers"),
    ({"channel_names": {}}, "names no channels"), ({"file_ending": ".mha"}, "holds no images CASE_0000.mha")])
def test_bad_dataset_json(dataset, changes, message):
    edit_json(dataset, **changes)
    with pytest.raises(TransferError, match=message):
        open_target(901)


def test_labels_as_text_or_lists_of_one_become_plain_numbers_for_training(dataset):
    edit_json(dataset, labels={"background": 0, "organ": [1], "lesion": "2"})
    assert open_target(901).dataset_json["labels"] == {"background": 0, "organ": 1, "lesion": 2}


def test_dataset_json_missing_or_damaged(dataset):
    (dataset / "dataset.json").write_text("{")
    with pytest.raises(TransferError, match=r"Dataset901_Tiny/dataset\.json cannot be read"):
        open_target(901)
    (dataset / "dataset.json").write_text('{"labels": {"background": 0}}')
    with pytest.raises(TransferError, match="lacks file_ending"):
        open_target(901)


def test_rgb_image_is_one_file_of_three_channels(nnunet_paths):
    skimage = pytest.importorskip("skimage.io")
    folder = nnunet_paths["nnUNet_raw"] / "Dataset902_Photo"
    for sub in ("imagesTr", "labelsTr"):
        (folder / sub).mkdir(parents=True)
    skimage.imsave(folder / "imagesTr" / "a_0000.png", np.zeros((8, 8, 3), np.uint8), check_contrast=False)
    skimage.imsave(folder / "labelsTr" / "a.png", np.eye(8, dtype=np.uint8), check_contrast=False)
    content = {"channel_names": {"0": "R", "1": "G", "2": "B"}, "labels": {"background": 0, "x": 1}, "numTraining": 1,
               "file_ending": ".png"}
    (folder / "dataset.json").write_text(json.dumps(content))
    target = open_target(902)
    assert target.reader("SimpleITKIO") == "NaturalImage2DIO"
    edit_json(folder, channel_names={"0": "grey"})
    with pytest.raises(TransferError, match=r"names 1 channels \(grey\), but case a has 3 in 1 files"):
        open_target(902)


def test_reader_of_the_donor_is_kept_where_it_reads_the_files(dataset):
    assert open_target(901).reader("NibabelIOWithReorient") == "NibabelIOWithReorient"
    assert open_target(901).reader("NaturalImage2DIO") == "SimpleITKIO"
    assert open_target(901).reader("NoSuchReader") == "SimpleITKIO"
    edit_json(dataset, overwrite_image_reader_writer="NibabelIO")
    assert open_target(901).reader("NibabelIOWithReorient") == "NibabelIO"


@pytest.mark.parametrize("n", [2, 3, 4])
def test_few_cases_get_a_split_that_leaves_each_out_once(nnunet_paths, n):
    tiny.write_raw_dataset(nnunet_paths["nnUNet_raw"], n_cases=n)
    target = open_target(901)
    assert f"{n} cases are too few for nnU-Net's 5 folds: splits_final.json written with {n} folds" in target.write_split()
    folds = json.loads((target.preprocessed / "splits_final.json").read_text())
    assert [f["val"] for f in folds] == [[c] for c in sorted(target.cases)]
    assert all(sorted(f["train"] + f["val"]) == sorted(target.cases) for f in folds)


def test_one_case_says_fold_all_and_five_leave_it_to_nnunet(nnunet_paths):
    tiny.write_raw_dataset(nnunet_paths["nnUNet_raw"], n_cases=1)
    tiny.write_raw_dataset(nnunet_paths["nnUNet_raw"], dataset_id=902, n_cases=5)
    one, five = open_target(901), open_target(902)
    assert "train with fold `all`" in one.write_split()
    assert "nnU-Net's own 5-fold" in five.write_split()
    assert not (one.preprocessed / "splits_final.json").exists()
    assert not (five.preprocessed / "splits_final.json").exists()


def test_your_own_split_is_kept_and_checked(dataset):
    target = open_target(901)
    target.preprocessed.mkdir()
    path = target.preprocessed / "splits_final.json"
    path.write_text(json.dumps([{"train": ["case_000"], "val": ["case_001"]}]))
    assert "1 folds (0 to 0); it leaves out 1 of 3 cases" in target.write_split()
    path.write_text(json.dumps([{"train": ["case_000"], "val": ["patient"]}]))
    with pytest.raises(TransferError, match="names cases that imagesTr does not hold: patient"):
        target.write_split()
    path.write_text("[1]")
    with pytest.raises(TransferError, match="cannot be read"):
        target.write_split()


@pytest.mark.parametrize(("change", "match"), [
    ({"file_ending": "/../../**/*"}, "file_ending"), ({"file_ending": 3}, "file_ending"),
    ({"labels": {"background": 0, "a": "x"}}, "whole number"), ({"labels": {"background": 0, "a": []}}, "whole number"),
    ({"labels": {"background": 0, "a": 0.5}}, "whole number"), ({"labels": {"background": 0, "a": float("nan")}}, "whole number"),
    ({"overwrite_image_reader_writer": "np"}, "no reader of nnU-Net"), ({"overwrite_image_reader_writer": 3}, "No reader"),
    ({"dataset": 5}, "dataset.json cannot be read")])
def test_entries_of_dataset_json_that_cannot_be_are_named(dataset, change, match):
    edit_json(dataset, **change)
    with pytest.raises(TransferError, match=match):
        open_target(901)


@pytest.mark.parametrize("folder", ["imagesTr", "labelsTr"])
def test_a_damaged_image_is_named(dataset, folder):
    path = sorted((dataset / folder).iterdir())[0]
    path.write_bytes(path.read_bytes()[:-10])
    with pytest.raises(TransferError, match="case_000"):
        open_target(901)


@pytest.mark.parametrize("variable", ["nnUNet_results", "nnUNet_preprocessed"])
def test_a_number_that_a_donor_or_old_data_have_too_is_refused_and_the_name_works(dataset, nnunet_paths, variable):
    (nnunet_paths[variable] / "Dataset901_Donor").mkdir()
    with pytest.raises(TransferError, match=f"number 901 is used twice: Dataset901_Donor .in {variable}.*full name"):
        open_target(901)
    target = open_target("Dataset901_Tiny")
    assert target.name == "Dataset901_Tiny" and target.number is None


@pytest.mark.parametrize(("name", "given", "number"), [
    ("Dataset1234_Mine", 1234, 1234), ("Dataset012_Mine", 12, 12), ("Dataset12345_Mine", "12345", 12345),
    ("Dataset12_Mine", 12, None), ("DatasetMine", "DatasetMine", None)])
def test_every_name_that_nnunet_takes_is_a_data_set(dataset, name, given, number):
    """nnU-Net's commands find Dataset012 by its number, but not Dataset12; ours find both."""
    shutil.move(dataset, dataset.with_name(name))
    for asked in (given, name):
        assert (open_target(asked).name, open_target(asked).number) == (name, number)


def test_a_number_that_begins_another_is_told_apart_although_nnunet_cannot(dataset):
    shutil.move(dataset, dataset.with_name("Dataset123_Mine"))
    tiny.write_raw_dataset(dataset.parent, dataset_id=1234)
    assert (open_target(123).name, open_target(123).number) == ("Dataset123_Mine", None)
    assert open_target(1234).number == 1234


def test_stacks_of_slices_are_not_given_to_a_reader_of_photographs(nnunet_paths):
    tifffile = pytest.importorskip("tifffile")
    folder = nnunet_paths["nnUNet_raw"] / "Dataset902_Stack"
    for sub, name in (("imagesTr", "a_0000.tif"), ("labelsTr", "a.tif")):
        (folder / sub).mkdir(parents=True)
        tifffile.imwrite(folder / sub / name, np.ones((5, 8, 9), np.uint8))
    content = {"channel_names": {"0": "microscope"}, "labels": {"background": 0, "x": 1}, "numTraining": 1, "file_ending": ".tif"}
    (folder / "dataset.json").write_text(json.dumps(content))
    assert open_target(902).reader("NaturalImage2DIO") == "Tiff3DIO"
