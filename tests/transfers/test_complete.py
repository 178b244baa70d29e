"""complete.py and union.py: the donor's predictions fill in what the user did not draw, in a data set of their own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import tiny
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_dante.errors import ConfigurationError, TransferError
from nnunet_dante.models.donor import open_donor
from nnunet_dante.transfers.transfer import transfer
from nnunet_dante.transfers.union import Tally, join_labels

SHAPE = (20, 24, 18)
BOXES = {  # where the donor of these tests finds its labels, in every image
    "liver": np.s_[12:18, 10:20, 4:12], "spleen": np.s_[12:18, 2:8, 4:12], "tumour": np.s_[14:16, 12:16, 6:8],
    "organ": np.s_[2:8, 2:8, 2:8], "lesion": np.s_[3:6, 3:6, 3:6]}
DONOR = {"background": 0, "spleen": 1, "liver": 2}
MINE = {"background": 0, "organ": 1, "lesion": 2}


class Teacher:
    """Replaces a network's prediction by boxes, so that tests know what the donor says; counts what it predicts."""

    def __init__(self, monkeypatch) -> None:
        self.calls, self.folds, self.stop_after, self.missing = 0, 0, None, {}
        teacher = self

        def predict(predictor, image, properties, *_):
            if teacher.calls == teacher.stop_after:
                raise KeyboardInterrupt
            mask = np.zeros(image.shape[1:], np.uint8)
            for name, value in predictor.dataset_json["labels"].items():
                if name in BOXES and teacher.calls not in teacher.missing.get(name, ()):
                    mask.T[BOXES[name]] = value
            teacher.calls += 1
            teacher.folds = len(predictor.list_of_parameters)
            return mask

        monkeypatch.setattr(nnUNetPredictor, "predict_single_npy_array", predict)


@pytest.fixture
def teacher(monkeypatch):
    return Teacher(monkeypatch)


@pytest.fixture(autouse=True)
def _fingerprint(monkeypatch, tmp_path):
    """One fingerprint for every data set: nnU-Net starts processes to extract it."""
    tiny.write_fingerprint(tmp_path / "fingerprint", n_cases=5)
    content = json.loads((tmp_path / "fingerprint" / "dataset_fingerprint.json").read_text())
    monkeypatch.setattr("nnunet_dante.datasets.dataset.fingerprint", lambda *_, **__: content)


@pytest.fixture
def mine(nnunet_paths):
    """Data set 901 of the user."""
    dataset = tiny.write_raw_dataset(nnunet_paths["nnUNet_raw"], labels=MINE)
    return nnunet_paths["nnUNet_raw"] / dataset


@pytest.fixture
def donor(nnunet_paths):
    return tiny.write_model_folder(nnunet_paths["nnUNet_results"], labels=DONOR)


def mask(folder: Path, case: str = "case_000", kind: str = "labelsTr") -> np.ndarray:
    return np.asarray(nibabel.load(folder / kind / f"{case}.nii.gz").dataobj)


def change(folder: Path, **entries) -> None:
    content = json.loads((folder / "dataset.json").read_text())
    (folder / "dataset.json").write_text(json.dumps(content | entries))


def completed(mine: Path) -> Path:
    return mine.with_name("Dataset902_TinyCompleted")


def test_old_labels_are_the_donors_and_new_ones_the_users(teacher, mine, donor):
    report = transfer(donor, 901, keep_labels=["all"])
    folder = completed(mine)
    content = json.loads((folder / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "spleen": 1, "liver": 2, "organ": 3, "lesion": 4}
    assert content["numTraining"] == 5 and content["completed"] == ["liver", "spleen"] and "annotated" not in content
    drawn, both = mask(mine), mask(folder)
    assert np.array_equal(both[drawn > 0], drawn[drawn > 0] + 2)
    expected = np.zeros(SHAPE, np.uint8)
    expected[BOXES["spleen"]], expected[BOXES["liver"]] = 1, 2
    assert np.array_equal(both[drawn == 0], expected[drawn == 0])
    assert np.array_equal(mask(folder, kind="donorTr"), expected)
    image = folder / "imagesTr" / "case_000_0000.nii.gz"
    assert image.is_symlink() and image.resolve() == (mine / "imagesTr" / "case_000_0000.nii.gz").resolve()
    assert report.dataset == folder.name and report.labels.matched == ("background", "spleen", "liver")
    assert report.labels.new == ("organ", "lesion")
    assert report.completion.drawn["organ"] == sum(int((mask(mine, f"case_{i:03d}") == 1).sum()) for i in range(5))
    picture = (folder / "pictures" / "case_000.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(list((folder / "pictures").iterdir())) == 5
    assert report.completion.donors["organ"] == 0 < report.completion.donors["liver"]
    assert "Dataset902_TinyCompleted 3d_fullres 0" in str(report)


def test_without_the_option_nothing_is_completed(teacher, mine, donor):
    report = transfer(donor, 901)
    assert report.dataset == mine.name and report.completion is None and teacher.calls == 0
    assert not completed(mine).exists()


def test_only_the_named_labels_are_kept_whatever_their_case(teacher, mine, donor):
    report = transfer(donor, 901, keep_labels=["Liver"], into="Dataset950_Mine_and_liver")
    folder = mine.with_name("Dataset950_Mine_and_liver")
    assert json.loads((folder / "dataset.json").read_text())["labels"] == {
        "background": 0, "liver": 1, "organ": 2, "lesion": 3}
    assert report.labels.dropped == ("spleen",) and 1 in mask(folder) and report.completion.kept == ("liver",)


def test_a_renamed_label_of_the_donor_is_the_users(teacher, mine, donor):
    report = transfer(donor, 901, keep_labels=["all"], rename={"spleen": "organ"})
    assert json.loads((completed(mine) / "dataset.json").read_text())["labels"] == {
        "background": 0, "organ": 1, "liver": 2, "lesion": 3}
    assert np.array_equal(mask(completed(mine)) == 1, mask(mine) == 1)  # drawn in every case: the donor is not asked
    assert report.labels.matched == ("background", "organ", "liver")


@pytest.mark.parametrize(("rename", "said"), [
    ({"kidney": "organ"}, "no such label; it has spleen, liver"), ({"spleen": "liver"}, "already has a label 'liver'"),
    ({"spleen": "organ", "liver": "organ"}, "one name"), ({"background": "organ"}, "no such label")])
def test_a_wrong_new_name_is_refused(mine, donor, rename, said):
    with pytest.raises(ConfigurationError, match=said):
        transfer(donor, 901, rename=rename)


def test_a_stopped_run_goes_on_and_a_finished_one_leaves_corrections_alone(teacher, mine, donor):
    teacher.stop_after = 3
    with pytest.raises(KeyboardInterrupt):
        transfer(donor, 901, keep_labels=["all"])
    assert not (completed(mine) / "dataset.json").exists()
    teacher.stop_after = None
    transfer(donor, 901, keep_labels=["all"])
    assert teacher.calls == 5 and not list(completed(mine).glob("unfinished*"))
    file = completed(mine) / "labelsTr" / "case_001.nii.gz"
    shutil.copy(completed(mine) / "labelsTr" / "case_002.nii.gz", file)
    transfer(donor, 901, keep_labels=["all"])
    assert teacher.calls == 5 and np.array_equal(mask(file.parents[1], "case_001"), mask(file.parents[1], "case_002"))


def test_cases_that_were_added_since_are_completed_and_the_others_stay(teacher, mine, donor):
    transfer(donor, 901, keep_labels=["all"])
    for old in (mine / "imagesTr" / "case_000_0000.nii.gz", mine / "labelsTr" / "case_000.nii.gz"):
        shutil.copy(old, old.with_name(old.name.replace("000", "005", 1)))
    change(mine, numTraining=6)
    transfer(donor, 901, keep_labels=["all"])
    assert teacher.calls == 6 and (completed(mine) / "labelsTr" / "case_005.nii.gz").is_file()
    assert json.loads((completed(mine) / "dataset.json").read_text())["numTraining"] == 6


def test_a_finished_data_set_that_differs_is_left_alone(teacher, mine, donor, nnunet_paths):
    transfer(donor, 901, keep_labels=["all"])
    before = {file: file.read_bytes() for file in completed(mine).rglob("*") if file.is_file()}
    with pytest.raises(ConfigurationError, match="completed otherwise: .*with the labels"):
        transfer(donor, 901, keep_labels=["liver"])
    other = tiny.write_model_folder(nnunet_paths["nnUNet_results"] / "other", labels=DONOR, seed=1)
    with pytest.raises(ConfigurationError, match="by another donor"):
        transfer(other, 901, keep_labels=["all"])
    shutil.copy(mine / "labelsTr" / "case_001.nii.gz", mine / "labelsTr" / "case_000.nii.gz")
    with pytest.raises(ConfigurationError, match="from other masks in case_000.*--into"):
        transfer(donor, 901, keep_labels=["all"])
    assert {file: file.read_bytes() for file in completed(mine).rglob("*") if file.is_file()} == before


def test_a_folder_that_is_no_completed_data_set_is_left_alone(teacher, mine, donor):
    other = tiny.write_raw_dataset(mine.parent, dataset_id=960, name="Other")
    with pytest.raises(ConfigurationError, match="was not written by"):
        transfer(donor, 901, keep_labels=["all"], into=other)
    with pytest.raises(ConfigurationError, match="belongs to Dataset960_Other"):
        transfer(donor, 901, keep_labels=["all"], into="Dataset960_Mine")
    with pytest.raises(ConfigurationError, match="named like"):
        transfer(donor, 901, keep_labels=["all"], into="Mine")
    with pytest.raises(ConfigurationError, match="nothing is completed"):
        transfer(donor, 901, into="Dataset961_Mine")


def test_two_names_for_one_structure_are_refused_and_nothing_is_predicted_again(teacher, mine, donor, monkeypatch):
    monkeypatch.setitem(BOXES, "liver", BOXES["organ"])
    for file in (mine / "labelsTr").iterdir():
        drawn = np.zeros(SHAPE, np.uint8)
        drawn[BOXES["organ"]], drawn[BOXES["lesion"]] = 1, 2
        nibabel.save(nibabel.Nifti1Image(drawn, np.eye(4)), file)
    with pytest.raises(TransferError, match="100% lies where you drew organ.*--rename liver=organ"):
        transfer(donor, 901, keep_labels=["all"])
    assert not (completed(mine) / "dataset.json").exists()
    transfer(donor, 901, keep_labels=["all"], rename={"liver": "organ"})
    assert teacher.calls == 5
    assert json.loads((completed(mine) / "dataset.json").read_text())["labels"] == {
        "background": 0, "spleen": 1, "organ": 2, "lesion": 3}


def test_all_folds_of_the_donor_predict_unless_one_was_chosen(teacher, mine, donor, nnunet_paths):
    shutil.copytree(tiny.write_model_folder(nnunet_paths["nnUNet_results"] / "other", labels=DONOR, fold=1, seed=1)
                    / "fold_1", donor / "fold_1")
    assert transfer(donor, 901, keep_labels=["all"]).completion.folds == teacher.folds == 2
    transfer(donor, 901, keep_labels=["all"], fold=1, into="Dataset950_One")
    assert teacher.folds == 1


def test_the_prediction_is_nnunets_own(mine, donor, nnunet_paths):
    change(mine, labels={"background": 0, "organ": 1, "lesion": 2})
    transfer(donor, 901, keep_labels=["all"])
    predictor = nnUNetPredictor(allow_tqdm=False, device=torch.device("cpu"), perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(str(donor), ("0",), "checkpoint_final.pth")
    reader = predictor.plans_manager.image_reader_writer_class()
    image, properties = reader.read_images([str(mine / "imagesTr" / "case_000_0000.nii.gz")])
    expected = predictor.predict_single_npy_array(image, properties, None, None, False)
    assert len(np.unique(expected)) > 1
    assert np.array_equal(mask(completed(mine), kind="donorTr").T, expected)


@pytest.mark.parametrize(("target", "donors", "options", "said"), [
    ({"channel_names": {"0": "CT"}}, {}, {}, "cannot read these images: it needs the channels MRI, and .* has CT"),
    ({}, {}, {"keep_labels": ["kidney"]}, "'kidney', which the donor does not know; it knows spleen, liver"),
    ({"labels": {"background": 0, "liver": 1, "spleen": 2}}, {}, {}, "No label is kept"),
    ({"labels": {"background": 0, "whole": [1, 2], "lesion": 2}, "regions_class_order": [1, 2]}, {}, {},
     "labels of your data set are regions.*two labels claim one voxel"),
    ({}, {"labels": {"background": 0, "whole": [1, 2], "part": 2}, "regions_class_order": [1, 2]}, {},
     "labels of the donor are regions"),
    ({}, {"configuration": "3d_cascade_fullres"}, {}, "second stage of a cascade"),
    ({}, {}, {"invert": ["MRI"]}, "--invert MRI and --keep-labels do not go together")])
def test_what_cannot_work_is_refused_by_name_and_nothing_is_written(teacher, nnunet_paths, target, donors, options, said):
    dataset = tiny.write_raw_dataset(nnunet_paths["nnUNet_raw"], **{"labels": MINE, **target})
    donor = tiny.write_model_folder(nnunet_paths["nnUNet_results"], **{"labels": DONOR, **donors})
    with pytest.raises((ConfigurationError, TransferError), match=said):
        transfer(donor, dataset, **{"keep_labels": ["all"], **options})
    assert [p.name for p in nnunet_paths["nnUNet_raw"].iterdir()] == [dataset] and teacher.calls == 0


def test_masks_beside_their_images_are_refused(teacher, mine, donor):
    file = mine / "labelsTr" / "case_003.nii.gz"
    shifted = np.eye(4)
    shifted[0, 3] = 7
    nibabel.save(nibabel.Nifti1Image(mask(mine, "case_003"), shifted), file)
    with pytest.raises(TransferError, match="do not lie on one grid: case_003"):
        transfer(donor, 901, keep_labels=["all"])
    assert not completed(mine).exists()


def test_implausible_predictions_are_named(teacher, mine, donor, monkeypatch):
    teacher.missing = {"liver": {3}, "spleen": set(range(5))}
    warnings = transfer(donor, 901, keep_labels=["all"]).warnings
    assert "the donor finds no liver in 1 of 5 cases: case_003" in warnings
    assert any("finds no spleen in any case" in warning for warning in warnings)


def test_sizes_far_from_the_other_cases_are_named():
    union = join_labels(tiny.dataset_json(labels=MINE), tiny.dataset_json(labels=DONOR), undrawn={}, keep=["all"],
                        cases=["a", "b", "c", "d"])
    tally, predicted = Tally(union), np.full((10, 10, 10), 2)
    for case, slices in {"a": 5, "b": 6, "c": 5, "d": 1}.items():
        predicted[:] = 1
        predicted[:slices] = 2
        tally.join(case, np.zeros_like(predicted), predicted, voxel_mm3=2.0)
    (said,) = tally.implausible()
    assert "liver is far from the median (1 ml) in d (0.2 ml)" in said


def test_ignored_voxels_stay_ignored(teacher, nnunet_paths, donor):
    labels = {"background": 0, "organ": 1, "ignore": 2}
    dataset = tiny.write_raw_dataset(nnunet_paths["nnUNet_raw"], labels=labels)
    transfer(donor, dataset, keep_labels=["all"])
    folder = nnunet_paths["nnUNet_raw"] / "Dataset902_TinyCompleted"
    assert json.loads((folder / "dataset.json").read_text())["labels"] == {
        "background": 0, "spleen": 1, "liver": 2, "organ": 3, "ignore": 4}
    assert np.array_equal(mask(folder) == 4, mask(folder.with_name(dataset)) == 2)


def test_labels_of_a_sequence_of_donors_are_all_kept(teacher, mine, donor, nnunet_paths):
    transfer(donor, 901, keep_labels=["all"])
    second = tiny.write_model_folder(nnunet_paths["nnUNet_results"], dataset="Dataset902_TinyCompleted",
                                     labels=json.loads((completed(mine) / "dataset.json").read_text())["labels"])
    later = tiny.write_raw_dataset(mine.parent, dataset_id=910, name="Later", labels={"background": 0, "vessel": 1})
    for file in (mine.with_name(later) / "labelsTr").iterdir():
        drawn = np.zeros(SHAPE, np.uint8)
        drawn[8:11, 20:23, 14:17] = 1
        nibabel.save(nibabel.Nifti1Image(drawn, np.eye(4)), file)
    report = transfer(second, 910, keep_labels=["all"])
    folder = mine.with_name("Dataset911_LaterCompleted")
    assert list(json.loads((folder / "dataset.json").read_text())["labels"]) == [
        "background", "spleen", "liver", "organ", "lesion", "vessel"]
    assert report.labels.new == ("vessel",) and set(np.unique(mask(folder))) == {0, 1, 2, 3, 4, 5}
    assert open_donor(second).dataset_json["labels"]["lesion"] == 4


def test_labels_that_were_not_drawn_are_completed_by_a_donor_that_knows_them(teacher, nnunet_paths, donor):
    labels = {"background": 0, "spleen": 1, "vessel": 2}
    dataset = tiny.write_raw_dataset(nnunet_paths["nnUNet_raw"], labels=labels, values=(1,))
    mine = nnunet_paths["nnUNet_raw"] / dataset
    blank = nibabel.Nifti1Image(np.zeros(SHAPE, np.uint8), np.eye(4))
    nibabel.save(blank, mine / "labelsTr" / "case_001.nii.gz")
    change(mine, annotated={"case_001": [], "case_002": ["spleen"]})
    report = transfer(donor, 901)
    folder = completed(mine)
    content = json.loads((folder / "dataset.json").read_text())
    assert content["labels"] == labels and report.completion.kept == ()
    assert teacher.calls == 5, "where a person drew the label, `compare` needs the donor's prediction, too"
    assert content["annotated"] == {"case_001": ["spleen"], "case_002": ["spleen"]}  # nobody knows the vessel there
    expected = np.zeros(SHAPE, bool)
    expected[BOXES["spleen"]] = True
    assert np.array_equal(mask(folder, "case_001") == 1, expected)
    assert np.array_equal(mask(folder, "case_000"), mask(mine, "case_000"))
    assert "in 2 of 5 cases not every label was drawn" in str(report)
    assert transfer(donor, 901, keep_labels=["none"]).dataset == dataset


def test_labels_that_no_donor_knows_are_left_to_the_loss(teacher, mine, donor):
    change(mine, annotated={"case_001": ["organ", "lesion"], "case_002": []})
    (mine / "labelsTr" / "case_002.nii.gz").write_bytes(b"")
    nibabel.save(nibabel.Nifti1Image(np.zeros(SHAPE, np.uint8), np.eye(4)), mine / "labelsTr" / "case_002.nii.gz")
    report = transfer(donor, 901)
    assert report.dataset == mine.name and teacher.calls == 0
    assert "the donor cannot complete labels that were not drawn. No label is kept" in str(report)
    assert "in 1 of 5 cases not every label was drawn" in str(report)


@pytest.fixture
def old_cases(nnunet_paths):
    """Two labelled cases of the donor's own."""
    name = tiny.write_raw_dataset(nnunet_paths["nnUNet_results"], dataset_id=800, name="Old", labels=DONOR, n_cases=2, seed=1)
    return nnunet_paths["nnUNet_results"] / name


def test_rehearsed_cases_are_only_trained_on(teacher, mine, donor, old_cases, nnunet_paths):
    preprocessed = nnunet_paths["nnUNet_preprocessed"] / "Dataset902_TinyCompleted"
    report = transfer(donor, 901, keep_labels=["liver"], rehearse=old_cases, share=0.4)
    content = json.loads((completed(mine) / "dataset.json").read_text())
    assert content["labels"] == {"background": 0, "liver": 1, "organ": 2, "lesion": 3} and content["numTraining"] == 7
    assert content["rehearsed"] == {"share": 0.4, "cases": ["rehearsed_case_000", "rehearsed_case_001"]}
    assert content["annotated"] == {f"rehearsed_case_00{i}": ["liver"] for i in range(2)}
    theirs = mask(old_cases)
    assert np.array_equal(mask(completed(mine), "rehearsed_case_000"), np.where(theirs == 2, 1, 0))
    splits = json.loads((preprocessed / "splits_final.json").read_text())
    assert len(splits) == 5 and {case for fold in splits for case in fold["train"] + fold["val"]} == {
        f"case_00{i}" for i in range(5)}
    assert report.cases == 5 and "40% of the training patches" in str(report) and teacher.calls == 5
    with pytest.raises(ConfigurationError, match="with the rehearsed cases"):
        transfer(donor, 901, keep_labels=["liver"])


@pytest.mark.parametrize(("spoil", "options", "said"), [
    (lambda f: None, {"share": 1}, "--share is 1"),
    (lambda f: shutil.rmtree(f / "imagesTr"), {}, "holds no images"),
    (lambda f: (f / "labelsTr" / "case_001.nii.gz").unlink(), {}, "case case_001 has 1 of 1 channels and no mask"),
    (lambda f: nibabel.save(nibabel.Nifti1Image(np.full(SHAPE, 7, np.uint8), np.eye(4)),
                            f / "labelsTr" / "case_001.nii.gz"), {}, "holds the values .7., for which the donor"),
    (lambda f: None, {"keep_labels": []}, "--rehearse .* nothing is completed")])
def test_cases_that_cannot_be_rehearsed_are_refused(teacher, mine, donor, old_cases, spoil, options, said):
    spoil(old_cases)
    with pytest.raises((ConfigurationError, TransferError), match=said):
        transfer(donor, 901, **{"keep_labels": ["all"], "rehearse": old_cases, **options})
    assert not (completed(mine) / "dataset.json").exists()
