"""export.py: what is in the file and beside it, and what is refused."""

from __future__ import annotations

import json
import pickle

import pytest
import tiny
import torch
from click.testing import CliRunner

from nnunet_dante.cli import main
from nnunet_dante.dafne.export import export_model
from nnunet_dante.dafne.model_file import open_model, read
from nnunet_dante.errors import ConfigurationError, DafneError
from nnunet_dante.models.checkpoint import unique_tensors
from nnunet_dante.models.donor import open_donor

FUNCTIONS = {f"{name}_function" for name in (
    "init_model", "apply_model", "weights_to_model", "model_to_weights", "calc_delta", "apply_delta", "weight_copy",
    "factor_multiply", "incremental_learn")}
NEW_FILES = "donor"


@pytest.fixture
def folder(tmp_path):
    return tiny.write_model_folder(tmp_path / NEW_FILES)


def written(root):
    return sorted(p.name for p in root.iterdir() if p.name != NEW_FILES)


def test_the_file_is_what_dafne_reads_and_holds_each_weight_once(folder, tmp_path):
    report = export_model(folder, tmp_path / "Liver.model")
    content, foreign = read(report.model)
    assert set(content) == FUNCTIONS | {"type", "model_id", "timestamp_id", "is_delta", "data_dimensionality",
                                        "metadata", "weights"}
    assert content["type"] == "DynamicTorchModel" and content["data_dimensionality"] == 3 and not foreign
    assert all(isinstance(content[name], str) for name in (*FUNCTIONS, "model_id"))
    expected = unique_tensors(open_donor(folder).weights)
    assert list(content["weights"]) == list(expected)
    assert all(torch.equal(content["weights"][k], v) for k, v in expected.items())
    pickle.loads(report.model.read_bytes())  # Dafne's dill is not needed to open it


def test_a_network_of_ordinary_size_is_written_in_1_02_times_its_weights(tmp_path):
    folder = tiny.write_model_folder(tmp_path / NEW_FILES, features=(32, 64, 256), architecture="ResidualEncoderUNet")
    report = export_model(folder, tmp_path / "Big.model")
    weights = sum(4 * t.numel() for t in unique_tensors(open_donor(folder).weights).values())
    assert report.model.stat().st_size <= 1.02 * weights


def test_the_side_file_is_the_metadata_that_dafnes_lists_need(folder, tmp_path):
    report = export_model(folder, tmp_path / "Liver.model", categories=["Abdomen/Liver", "MR"], info={"Author": "us"})
    metadata = json.loads((tmp_path / "Liver.json").read_text())
    assert metadata == open_model(report.model).metadata
    assert metadata["dimensionality"] == "3" and metadata["variants"] == [""] and metadata["orientation"] == ""
    assert metadata["categories"] == [["Abdomen", "Liver"], ["MR"]] and metadata["dependencies"] == {}
    assert open_model(export_model(folder, tmp_path / "Kept.model", protection=0.5).model).settings["learning"][
        "protection"] == 0.5
    assert metadata["info"]["Author"] == "us" and all(isinstance(v, str) for v in metadata["info"].values())


@pytest.mark.parametrize(("orientation", "transpose", "plane"), [
    ("RAS", (0, 1, 2), "Axial"), ("LPS", (2, 0, 1), "Sagittal"), ("SRA", (0, 1, 2), "Coronal")])
def test_a_2d_network_says_in_which_plane_it_learned(tmp_path, orientation, transpose, plane):
    folder = tiny.write_model_folder(tmp_path / NEW_FILES, configuration="2d", transpose=transpose)
    report = export_model(folder, tmp_path / "Flat.model", orientation=orientation)
    assert f"open volumes as {plane}" in str(report) and open_model(report.model).metadata["info"]["Plane"] == plane


def test_into_a_models_folder_the_name_carries_the_version(folder, tmp_path):
    report = export_model(folder, tmp_path)
    version = open_model(report.model).timestamp
    assert written(tmp_path) == ["Donor-3d-fullres.json", f"Donor-3d-fullres_{version}.model"]
    assert len(str(version)) == 10, "Dafne takes the last name in alphabetical order for the newest"


@pytest.mark.parametrize(("name", "message"), [("my_liver.model", "my-liver.model"), ("a,b.model", "a-b.model"),
                                               ("liver.pth", "NAME.model"), ("nowhere", "NAME.model")])
def test_names_that_dafne_would_cut_are_refused_and_nothing_is_written(folder, tmp_path, name, message):
    with pytest.raises(ConfigurationError, match=message):
        export_model(folder, tmp_path / name)
    assert not written(tmp_path)


@pytest.mark.parametrize("options", [{"tile_step": 0}, {"tile_step": 1.5}, {"orientation": "RAX"},
                                     {"orientation": "RLS"}, {"categories": [" / "]}, {"protection": -1}])
def test_options_that_cannot_work_are_refused_and_nothing_is_written(folder, tmp_path, options):
    with pytest.raises(ConfigurationError):
        export_model(folder, tmp_path / "Liver.model", **options)
    assert not written(tmp_path)


def test_the_base_hands_down_its_model_id(folder, tmp_path):
    base = export_model(folder, tmp_path / "Base.model")
    other = tiny.write_model_folder(tmp_path / NEW_FILES / "other", seed=5)
    alone = export_model(other, tmp_path / "Alone.model")
    child = export_model(other, tmp_path / "Child.model", base=base.model)
    assert child.model_id == base.model_id != alone.model_id
    assert export_model(folder, tmp_path / "Again.model").model_id == base.model_id, "not deterministic"


def test_a_base_with_other_labels_is_refused(folder, tmp_path):
    base = export_model(folder, tmp_path / "Base.model")
    other = tiny.write_model_folder(tmp_path / NEW_FILES / "other", labels={"background": 0, "organ": 1, "vein": 2})
    with pytest.raises(DafneError, match="labels"):
        export_model(other, tmp_path / "Child.model", base=base.model)


def test_networks_that_the_client_cannot_build_are_refused(tmp_path):
    from nnunet_dante.dafne.settings import settings_for

    folder = tiny.write_model_folder(tmp_path / NEW_FILES)
    donor = open_donor(folder)
    donor.plans["configurations"]["3d_fullres"]["normalization_schemes"] = ["MyNormalization"]
    with pytest.raises(DafneError, match="MyNormalization"):
        settings_for(donor, orientation="RAS", as_shown=False, mirroring=False, tile_step=0.5)


def test_a_cascade_stage_is_refused(tmp_path):
    folder = tiny.write_model_folder(tmp_path / NEW_FILES, configuration="3d_cascade_fullres")
    with pytest.raises(DafneError, match="previous stage"):
        export_model(folder, tmp_path / "Liver.model")


def test_an_export_that_fails_leaves_the_old_file(folder, tmp_path, monkeypatch):
    report = export_model(folder, tmp_path / "Liver.model")
    before = report.model.read_bytes()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(pickle, "dump", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_model(folder, tmp_path / "Liver.model")
    assert report.model.read_bytes() == before and written(tmp_path) == ["Liver.json", "Liver.model"]


def test_the_command_prints_what_it_decided(folder, tmp_path):
    done = CliRunner().invoke(main, ["export", str(folder), "-o", str(tmp_path / "Liver.model"), "--info", "Author=us",
                                     "--tile-step", "0.7", "--mirroring", "--orientation", "LPS"])
    assert done.exit_code == 0, done.output
    for said in ("Liver.model", "organ, lesion", "LPS", "mirroring: axes [0, 1, 2]", "tile step 0.7"):
        assert said in done.output
    assert CliRunner().invoke(main, ["inspect", str(tmp_path / "Liver.model")]).exit_code == 0
    done = CliRunner().invoke(main, ["import", str(tmp_path / "Liver.model"), "-o", str(tmp_path / "back")])
    assert done.exit_code == 0 and (tmp_path / "back" / "plans.json").is_file()
