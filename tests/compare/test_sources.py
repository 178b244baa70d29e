"""sources.py: folds, protocols and files of results; where the files of a case are found."""

from __future__ import annotations

import json
import pickle
import shutil

import folds
import numpy as np
import pytest
import synthetic
import torch

from nnunet_dante.compare import sources
from nnunet_dante.compare.results import write_result
from nnunet_dante.compare.sources import CaseFiles, read_sources
from nnunet_dante.errors import DanteError, ResultError


@pytest.fixture
def root(nnunet_paths, tmp_path):
    folds.write_dataset(tmp_path)
    return tmp_path


def read_fold(folder, **options):
    return sources.read_fold(folder, **options).result


def test_scores_cost_and_curve_are_read(root):
    result = read_fold(folds.write_fold(root, "nnUNetTrainerLoRA"), tolerance_mm=1.0)
    assert (result.experiment, result.method, result.trainer) == ("Dataset901_Tiny", "LoRA", "nnUNetTrainerLoRA")
    assert (result.shots, result.all, result.seed, result.donor) == (2, True, 0, "CT")
    assert result.cases["case_0"]["organ"] == {"dice": 1.0, "hd95_mm": 0.0, "surface_dice": 1.0}
    moved = result.cases["case_1"]["lesion"]  # 3 x 3 x 2 voxels moved by one of three layers
    assert moved["dice"] == pytest.approx(2 / 3) and moved["hd95_mm"] == 1.0 and moved["surface_dice"] == 1.0
    assert (result.start_dice, result.curve, result.seconds) == (0.1, pytest.approx([0.5, 0.8]), [2.0, 2.0])
    assert result.stages == ((0, ("head",)), (1, ("head", "decoder.0")))
    assert (result.trained_parameters, result.total_parameters, result.adapter_mib) == (7, 70, 0.5)
    assert (result.iterations_per_epoch, result.machine, result.tolerance_mm) == (250, "cpu", 1.0)


def test_spacing_lies_along_the_axes_of_the_mask(root):
    folder = folds.write_fold(root, "nnUNetTrainerLoRA")
    mask = folds.mask()
    folds.write(mask[:, :, [5, 0, 1, 2, 3, 4]], folder / "validation" / "case_1.nii.gz")  # one thick slice up
    assert read_fold(folder).cases["case_1"]["organ"]["hd95_mm"] == 3.0


def test_shots_and_seed_of_a_drawn_fold_come_from_the_table_of_draws(root):
    file = root / "nnUNet_preprocessed" / "Dataset901_Tiny" / "shots.json"
    file.write_text(json.dumps({"folds": [{"fold": 1, "shots": 2, "all": False, "seed": 7,
                                           "train": ["case_0", "case_1"]}]}))
    result = read_fold(folds.write_fold(root, "nnUNetTrainerLoRA", fold=1))
    assert (result.shots, result.all, result.seed) == (2, False, 7)


def test_the_truth_beside_the_preprocessed_data_is_taken_where_there_is_one(root):
    folder = folds.write_fold(root, "nnUNetTrainerLoRA")
    raw = root / "nnUNet_raw" / "Dataset901_Tiny" / "labelsTr"
    shutil.move(raw, root / "nnUNet_preprocessed" / "Dataset901_Tiny" / "gt_segmentations")
    assert read_fold(folder).cases["case_0"]["organ"]["dice"] == 1


@pytest.mark.parametrize("place", ["nnUNet_preprocessed", "nnUNet_raw"])
def test_labels_that_were_not_drawn_in_a_case_are_not_scored(root, place):
    folder = folds.write_fold(root, "nnUNetTrainerLoRA")
    content = json.loads((folder.parent / "dataset.json").read_text()) | {"annotated": {"case_1": ["lesion"]}}
    (root / place / "Dataset901_Tiny" / "dataset.json").write_text(json.dumps(content))
    cases = read_fold(folder).cases
    assert cases["case_1"].keys() == {"lesion"} and cases["case_0"].keys() == {"organ", "lesion"}
    (root / place / "Dataset901_Tiny" / "dataset.json").write_text(json.dumps(content | {"annotated": {"case_1": ["x"]}}))
    with pytest.raises(DanteError, match="label 'x' for case case_1"):
        read_fold(folder)


@pytest.mark.parametrize(("remove", "said"), [
    ("fold/checkpoint_final.pth", "no finished fold"), ("fold/validation", r"holds no predictions \*.nii.gz"),
    ("raw/labelsTr", "truth of case_0.nii.gz is neither"), ("preprocessed/splits_final.json", "splits_final.json was"),
    ("fold/../plans.json", "plans.json cannot be read")])
def test_what_is_missing_is_named(root, remove, said):
    folder = folds.write_fold(root, "nnUNetTrainerLoRA")
    kind, _, below = remove.partition("/")
    places = {"fold": folder, "raw": root / "nnUNet_raw" / "Dataset901_Tiny",
              "preprocessed": root / "nnUNet_preprocessed" / "Dataset901_Tiny"}
    victim = places[kind] / below
    shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
    with pytest.raises(ResultError, match=said):
        read_fold(folder)


def test_a_fold_validated_on_its_training_cases_or_not_in_the_split_is_refused(root):
    folder = folds.write_fold(root, "nnUNetTrainerLoRA", fold=3)
    with pytest.raises(ResultError, match="fold 3 is not in"):
        read_fold(folder)
    with pytest.raises(ResultError, match="cases it was trained on"):
        read_fold(folder.rename(folder.with_name("fold_all")))


@pytest.mark.parametrize(("file", "damage", "said"), [
    ("validation/case_0.nii.gz", lambda content: content[:-9], "was cut off"),
    ("validation/case_0.nii.gz", lambda content: b"no image", "one of its files"),
    ("../plans.json", lambda _: b'{"image_reader_writer": "os"}', "no reader of nnU-Net"),
    ("../plans.json", lambda content: content.replace(b"Dataset901_Tiny", b"../Dataset901_Tiny"), "was not found"),
    ("../plans.json", lambda _: b'[]', "one of its files"), ("../dataset.json", lambda _: b'{}', "one of its files"),
    ("../dataset.json", lambda _: b"[" * 10**5, "cannot be read")])
def test_damaged_and_foreign_files_are_errors_that_name_the_fold(root, file, damage, said):
    folder = folds.write_fold(root, "nnUNetTrainerLoRA")
    (folder / file).write_bytes(damage((folder / file).read_bytes()))
    with pytest.raises(DanteError, match=said):
        read_fold(folder)


def test_masks_of_another_shape_are_refused(root):
    folder = folds.write_fold(root, "nnUNetTrainerLoRA")
    folds.write(folds.mask()[:10], folder / "validation" / "case_0.nii.gz")
    with pytest.raises(ResultError, match="its truth"):
        read_fold(folder)


def test_one_trainer_with_two_plans_is_two_methods(root):
    paths = [folds.write_fold(root, "nnUNetTrainerLoRA", plans_name=name) for name in ("nnUNetPlans", "other")]
    methods = [source.result.method for source in read_sources(paths, tolerance_mm=1)]
    assert methods == ["LoRA (nnUNetPlans, 3d_fullres)", "LoRA (other, 3d_fullres)"]


def test_a_protocol_folder_brings_its_masks_and_its_data_set(root):
    name = "virtual-scanner__gu__k002__s0"
    write_result(synthetic.result("GU", 2, 0), root / "protocol" / "runs" / f"{name}.json")
    folds.write_fold(root / "protocol", "nnUNetTrainerGradualUnfreezing", plans_name=name.replace("__", "-"))
    folds.write(folds.mask(), root / "protocol" / "predictions" / name / "case_0.nii.gz")
    (source,) = read_sources([root / "protocol"], tolerance_mm=1)
    assert source.files.dataset == "Dataset901_Tiny" and list(source.files.masks(source.masks)) == ["case_0"]


def test_only_masks_are_taken_of_what_nnunet_writes_beside_them(root):
    folder = folds.write_fold(root, "nnUNetTrainerLoRA")
    for name in ("case_0", "case_1"):  # as with --npz
        np.savez(folder / "validation" / f"{name}.npz", probabilities=np.zeros(3))
        (folder / "validation" / f"{name}.pkl").write_bytes(pickle.dumps({}))
    (folder / "validation" / "summary.json").write_text("{}")
    files = CaseFiles(dataset="Dataset901_Tiny", content={"file_ending": ".nii.gz"})
    assert [file.name for file in files.masks(folder / "validation").values()] == ["case_0.nii.gz", "case_1.nii.gz"]
    assert set(read_fold(folder).cases) == {"case_0", "case_1"}


def test_masks_whose_files_are_pngs_are_told_from_the_pickles_beside_them(tmp_path):
    for name in ("a.pkl", "a.png", "a.npz", "b.png"):
        (tmp_path / name).touch()
    files = CaseFiles(dataset="Dataset901_Tiny", content={"file_ending": ".png"})
    assert files.masks(tmp_path) == {"a": tmp_path / "a.png", "b": tmp_path / "b.png"}


def test_cases_that_dataset_json_lists_are_found_where_it_says(root):
    raw = root / "nnUNet_raw" / "Dataset901_Tiny"
    (raw / "elsewhere").mkdir()
    image = (raw / "imagesTr" / "case_0_0000.nii.gz").rename(raw / "elsewhere" / "ct.nii.gz")
    truth = (raw / "labelsTr" / "case_0.nii.gz").rename(root / "truth.nii.gz")
    files = CaseFiles(dataset="Dataset901_Tiny", content={"file_ending": ".nii.gz", "dataset": {
        "case_0": {"images": ["elsewhere/ct.nii.gz"], "label": str(truth)}}})
    assert (files.image("case_0"), files.truth("case_0")) == (image, truth)
    assert files.image("case_1") == raw / "imagesTr" / "case_1_0000.nii.gz"
    with pytest.raises(ResultError, match="image of case_9 was not found"):
        files.image("case_9")


def test_masks_of_another_strength_than_the_checkpoint_are_said(root):
    folder = folds.write_fold(root, "nnUNetTrainerLoRA")
    content = torch.load(folder / "checkpoint_final.pth", weights_only=False)
    content["dante"]["strength"] = {"value": 0.4, "trained": {}}
    torch.save(content, folder / "checkpoint_final.pth")
    for noted, said in (({}, False), ({"dante": {"strength": 0.4}}, False), ({"dante": {"strength": 0.7}}, True),
                        ({"dante": {"strength": None}}, True), ([1], False)):
        (folder / "validation" / "summary.json").write_text(json.dumps(noted))
        assert ("is at strength 0.4" in read_fold(folder).warning) == said


def test_labels_written_as_text_are_scored_as_numbers(root):
    folder = folds.write_fold(root, "nnUNetTrainerLoRA")
    expected = read_fold(folder).cases
    file = folder.parent / "dataset.json"
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"labels": {name: str(value) for name, value in content["labels"].items()}}))
    assert read_fold(folder).cases == expected


def test_a_checkpoint_that_says_nothing_of_its_training_gives_scores_without_curves(root):
    folder = folds.write_fold(root, "nnUNetTrainerLoRA")
    torch.save({"network_weights": {}}, folder / "checkpoint_final.pth")
    result = read_fold(folder)
    assert result.cases["case_0"]["organ"]["dice"] == 1 and (result.curve, result.trained_parameters) == ([], None)
