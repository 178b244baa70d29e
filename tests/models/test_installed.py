"""installed.py: what lies on this machine is found, what is damaged is named, and models can be named by number."""

from __future__ import annotations

import json
import shutil

import pytest
import tiny
from click.testing import CliRunner

from nnunet_dante.cli import main
from nnunet_dante.command.donors import list_donors
from nnunet_dante.command.inspect import inspect_path
from nnunet_dante.errors import DonorError
from nnunet_dante.models.donor import open_donor
from nnunet_dante.models.installed import find_donor, installed_models, totalsegmentator_folder


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """nnUNet_results with one model, and TotalSegmentator's folder with two."""
    results, weights = tmp_path / "results", tmp_path / "home" / "nnunet" / "results"
    monkeypatch.setenv("nnUNet_results", str(results))
    monkeypatch.setenv("TOTALSEG_HOME_DIR", str(tmp_path / "home"))
    monkeypatch.delenv("TOTALSEG_WEIGHTS_PATH", raising=False)
    tiny.write_model_folder(results, spacing_mm=(2.0, 1.0, 1.5))
    for number, name in ((291, "organs"), (8, "vessels")):
        tiny.write_model_folder(weights, dataset=f"Dataset{number:03d}_{name}", channel_names={"0": "CT"})
    return tmp_path


def test_models_of_nnunet_and_of_totalsegmentator_are_found_with_what_they_are(machine):
    found = installed_models()
    assert list(found) == [machine / "results", totalsegmentator_folder()]
    (mine,), theirs = found.values()
    assert (mine.spacing_mm, mine.channels, mine.labels) == ((2.0, 1.0, 1.5), ("MRI",), ("organ", "lesion"))
    assert (mine.trainer, mine.configuration, mine.folds) == ("nnUNetTrainer", "3d_fullres", ("0",))
    assert mine.size == next((machine / "results").glob("*/*/*/*.pth")).stat().st_size
    assert [model.donor for model in theirs] == ["totalsegmentator:8", "totalsegmentator:291"]
    assert all(open_donor(model.donor).dataset_json["labels"] == tiny.LABELS for model in (mine, *theirs))


def test_the_licence_of_a_model_is_its_file_or_what_its_data_set_says(machine):
    (folder,) = (machine / "results").glob("*/*")

    def licence():
        return installed_models()[machine / "results"][0].licence

    assert licence() == ""
    dataset = json.loads((folder / "dataset.json").read_text())
    for said, seen in ((["CC"], ""), ("CC-BY 4.0", "CC-BY 4.0")):
        (folder / "dataset.json").write_text(json.dumps(dataset | {"licence": said}))
        assert licence() == seen
    (folder.parent / "LICENSE.txt").write_bytes(b"For research only \xff")
    assert licence() == "For research only \ufffd"
    (machine / "secret").write_text("secret")
    (folder / "LICENCE").symlink_to(machine / "secret")
    assert licence().startswith("For research"), "links are not followed"


def test_the_list_names_what_to_give_and_what_is_damaged(machine):
    for number, name in ((1, "plans"), (2, "labels"), (3, "weights"), (4, "none"), (5, "foreign")):
        tiny.write_model_folder(machine / "more", dataset=f"Dataset00{number}_{name}")
    plans, labels, weights, none, foreign = sorted((machine / "more").glob("Dataset*/*"))
    (plans / "plans.json").write_text("{")
    (labels / "dataset.json").write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": {"a\x1b[2J": 1}}))
    next(weights.glob("*/*.pth")).write_bytes(b"half of it")
    shutil.rmtree(none / "fold_0")
    content = json.loads((foreign / "plans.json").read_text())
    content["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = "subprocess.Popen"
    (foreign / "plans.json").write_text(json.dumps(content))
    text = list_donors([machine / "more"])
    assert "totalsegmentator:291\n    Dataset291_organs/nnUNetTrainer__nnUNetPlans__3d_fullres\n    2 labels: organ, " \
           "lesion\n    CT; 1 x 1 x 1 mm; 3d_fullres; nnUNetTrainer; fold 0; 0 MiB" in text
    assert text.count("NOT USABLE") == 5 and "\x1b" not in text
    for reason in ("NOT USABLE: Expecting", "background 0", "fold_0/checkpoint_final.pth is truncated",
                   "it holds no checkpoint", "subprocess.Popen"):
        assert reason in text


def test_the_command_says_where_it_looked(machine, monkeypatch):
    said = CliRunner().invoke(main, ["donors", str(machine / "results")]).output
    assert said.count(f"{machine / 'results'}: 1 model\n") == 1
    monkeypatch.delenv("nnUNet_results")
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(machine / "nowhere"))
    assert CliRunner().invoke(main, ["donors"]).output.startswith("No folder to look in: nnUNet_results is not set")


def test_a_model_of_totalsegmentator_is_found_by_number(machine):
    assert find_donor("totalsegmentator:291").name == "Dataset291_organs"
    assert find_donor("TotalSegmentator:008").name == "Dataset008_vessels"
    assert "channels: CT" in inspect_path("totalsegmentator:291")
    with pytest.raises(DonorError, match=r"no folder Dataset292_.*totalsegmentator:8 \(Dataset008_vessels\), totalseg"):
        open_donor("totalsegmentator:292")


def test_two_folders_of_one_number_and_no_folder_at_all_are_refused(machine, monkeypatch):
    shutil.copytree(find_donor("totalsegmentator:8"), totalsegmentator_folder() / "Dataset008_old")
    with pytest.raises(DonorError, match="holds Dataset008_old, Dataset008_vessels. Give the path"):
        find_donor("totalsegmentator:8")
    assert all("Dataset008" in model.donor for model in installed_models()[totalsegmentator_folder()][:2])
    monkeypatch.setenv("TOTALSEG_WEIGHTS_PATH", str(machine / "nowhere"))
    with pytest.raises(DonorError, match="nowhere, which is no folder"):
        find_donor("totalsegmentator:8")
