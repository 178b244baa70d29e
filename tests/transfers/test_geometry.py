"""geometry.py: the target's own spacing and patch from nnU-Net's planner, the network and weights from the donor."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import running
import tiny
import torch

from nnunet_dante.errors import ConfigurationError, TransferError
from nnunet_dante.models.checkpoint import load_checkpoint_safely
from nnunet_dante.models.donor import open_donor
from nnunet_dante.models.network import build_network
from nnunet_dante.training.trainers import nnUNetTrainerLoRA
from nnunet_dante.transfers.geometry import fitting_patch, patch_steps
from nnunet_dante.transfers.transfer import transfer


@pytest.fixture
def target(nnunet_paths):
    """A function that writes a raw data set with its fingerprint; sizes and spacings in the axes that nnU-Net reads."""
    def make(*, spacing_mm=(1.0, 1.0, 1.0), shape=(18, 24, 20), n_cases=5, **options) -> Path:
        dataset = tiny.write_raw_dataset(nnunet_paths["nnUNet_raw"], spacing_mm=spacing_mm[::-1], n_cases=n_cases, **options)
        folder = nnunet_paths["nnUNet_preprocessed"] / dataset
        folder.mkdir()
        (folder / "dataset_fingerprint.json").write_text(json.dumps({
            "spacings": [list(spacing_mm)] * n_cases, "shapes_after_crop": [list(shape)] * n_cases,
            "median_relative_size_after_cropping": 1.0,
            "foreground_intensity_properties_per_channel": {"0": {
                "mean": 9.0, "std": 1.0, "median": 9.0, "min": 1.0, "max": 20.0, "percentile_00_5": 2.0,
                "percentile_99_5": 19.0}}}))
        return folder

    return make


def plans_in(folder: Path, configuration: str = "3d_fullres", name: str = "nnUNetDantePlans") -> tuple[dict, dict]:
    plans = json.loads((folder / f"{name}.json").read_text())
    return plans, plans["configurations"][configuration]


@pytest.mark.parametrize("architecture", ["PlainConvUNet", "ResidualEncoderUNet"])
@pytest.mark.parametrize("configuration", ["2d", "3d_fullres"])
def test_spacing_patch_and_data_are_the_targets_own_network_and_weights_the_donors(
        nnunet_paths, target, architecture, configuration):
    folder = target()
    donor = tiny.write_model_folder(nnunet_paths["nnUNet_results"], architecture=architecture, spacing_mm=(2.0, 2.0, 2.0),
                                    configuration=configuration)
    report = transfer(donor, folder.name, geometry="target")
    plans, config = plans_in(folder, configuration)
    before = open_donor(donor)
    dimension = int(configuration[0])
    assert config["spacing"] == [1.0] * dimension
    assert config["patch_size"] == [20, 24, 20][-dimension:]
    assert config["architecture"] == before.plans["configurations"][configuration]["architecture"]
    assert config["data_identifier"] == f"nnUNetDantePlans_{configuration}_target"
    assert plans["dante"]["start_weights"][configuration]["geometry"] == "target"
    network = build_network(plans, json.loads((folder / "dataset.json").read_text()), configuration)
    network.load_state_dict(torch.load(folder / report.start_weights, weights_only=True)["network_weights"])
    assert all(torch.equal(tensor, before.weights[key]) for key, tensor in network.state_dict().items())
    assert network(torch.randn(1, 1, *config["patch_size"]))[0].shape[2:] == tuple(config["patch_size"])
    text = str(report)
    assert "mm (target's own)" in text and "resampled to" not in text
    assert f"a patch shows {' x '.join(['20', '24', '20'][-dimension:])} mm (donor: {' x '.join(['32'] * dimension)} mm)" in text
    assert f"covers {' x '.join(['3'] * dimension)} mm (donor: {' x '.join(['6'] * dimension)} mm)" in text
    assert any("times as large in voxels as the donor saw them" in warning for warning in report.warnings)


def test_it_is_nnunets_own_plan_where_the_donor_has_the_network_that_nnunet_would_build(nnunet_paths, target, monkeypatch):
    """Patch, batch and spacing come out as in nnUNetv2_plan_experiment, where memory limits the patch."""
    from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner

    folder = target(shape=(200, 240, 110), spacing_mm=(1.5, 1.5, 5.0))
    monkeypatch.setenv("nnUNet_n_proc_DA", "1")  # the planner fails with 0
    theirs = ExperimentPlanner(folder.name).plan_experiment()
    monkeypatch.setattr(tiny, "plans", lambda *_, **__: json.loads(json.dumps(theirs)))
    donor = tiny.write_model_folder(nnunet_paths["nnUNet_results"])
    transfer(donor, folder.name, geometry="target")
    plans, config = plans_in(folder)
    expected = json.loads((folder / "nnUNetPlans.json").read_text())["configurations"]["3d_fullres"]
    assert expected["patch_size"][0] < 110  # it is limited
    assert plans["transpose_forward"] == [2, 0, 1]
    assert {key for key in expected if config[key] != expected[key]} == {"data_identifier"}


@pytest.mark.parametrize("planner", ["ExperimentPlanner", "nnUNetPlannerResEncL", "no planner"])
def test_the_planner_of_the_donors_plans_counts(nnunet_paths, target, monkeypatch, planner):
    folder = target()
    original = tiny.plans
    monkeypatch.setattr(tiny, "plans", lambda *a, **o: original(*a, **o) | {"experiment_planner_used": planner})
    report = transfer(tiny.write_model_folder(nnunet_paths["nnUNet_results"]), folder.name, geometry="target")
    assert report.plans.donor.planner == ("ExperimentPlanner" if planner == "no planner" else planner)
    assert report.batch_size == (4 if planner == "nnUNetPlannerResEncL" else 2)  # as many as each allows for small data


def test_anisotropic_images_keep_the_axes_of_the_donor(nnunet_paths, target):
    folder = target(spacing_mm=(1.0, 1.0, 3.0), shape=(40, 40, 12))
    donor = tiny.write_model_folder(nnunet_paths["nnUNet_results"], transpose=(1, 0, 2))
    report = transfer(donor, folder.name, geometry="target", batch_size=7)
    plans, config = plans_in(folder)
    assert plans["transpose_forward"] == [1, 0, 2]
    assert config["spacing"] == [1.0, 1.0, 3.0]
    assert config["patch_size"] == [40, 40, 12] and config["batch_size"] == report.batch_size == 7
    assert "coarse along axis 2 of the plans, and the donor's along none" in str(report)


@pytest.mark.parametrize(("intensity", "scheme", "mean"), [
    (None, "ZScoreNormalization", 9.0), ("target", "ZScoreNormalization", 9.0), ("donor", "CTNormalization", 0.4)])
def test_normalisation_follows_the_geometry_unless_asked_for(nnunet_paths, target, intensity, scheme, mean):
    folder = target()
    donor = tiny.write_model_folder(nnunet_paths["nnUNet_results"], normalization="CTNormalization")
    report = transfer(donor, folder.name, geometry="target", intensity=intensity)
    plans, config = plans_in(folder)
    assert config["normalization_schemes"] == [scheme]
    assert plans["foreground_intensity_properties_per_channel"]["0"]["mean"] == mean
    assert report.plans.channels[0].scheme_from == ("donor" if intensity == "donor" else "target") == report.intensity


def test_both_geometries_have_data_of_their_own(nnunet_paths, target):
    folder = target()
    donor = tiny.write_model_folder(nnunet_paths["nnUNet_results"])
    transfer(donor, folder.name)
    assert plans_in(folder)[1]["data_identifier"] == "nnUNetDantePlans_3d_fullres"
    transfer(donor, folder.name, geometry="target", plans_name="Mine")
    assert plans_in(folder, name="Mine")[1]["data_identifier"] == "Mine_3d_fullres_target"
    transfer(donor, folder.name, geometry="target")
    assert plans_in(folder)[1]["data_identifier"] == "nnUNetDantePlans_3d_fullres_target"


@pytest.mark.parametrize("configuration", ["3d_lowres", "3d_cascade_fullres"])
def test_cascades_are_refused_and_nothing_is_written(nnunet_paths, target, configuration):
    folder = target()
    donor = tiny.write_model_folder(nnunet_paths["nnUNet_results"], configuration=configuration)
    with pytest.raises(TransferError, match=f"'{configuration}' is a stage of a cascade.*--geometry donor"):
        transfer(donor, folder.name, geometry="target")
    assert [file.name for file in folder.iterdir()] == ["dataset_fingerprint.json"]
    with pytest.raises(ConfigurationError, match="geometry is 'mine'; choose 'donor' or 'target'"):
        transfer(donor, folder.name, geometry="mine")


def test_networks_for_one_patch_size_are_refused():
    with pytest.raises(TransferError, match="weights of a Primus .* belong to its patch size"):
        patch_steps(tiny.primus(), "3d_fullres")


@pytest.mark.parametrize(("patch", "step", "fitting"), [
    ((20, 24, 18), (4, 4, 4), [20, 24, 20]), ((20, 24, 18), (1, 8, 8), [20, 24, 24]),
    ((12, 10, 9), (16, 16, 16), [32, 32, 32]), ((12, 40, 9), (16, 16, 16), [16, 48, 16])])
def test_patches_are_multiples_that_leave_more_than_one_voxel(patch, step, fitting):
    assert fitting_patch(patch, step) == fitting
    assert math.prod(size // n for size, n in zip(fitting, step)) > 1


def test_a_patch_without_voxels_says_that_memory_is_too_small():
    with pytest.raises(TransferError, match="needs more memory than nnU-Net's planner allows"):
        fitting_patch((0, 8, 8), (4, 4, 4))


def test_a_transfer_to_own_geometry_is_trained_and_stock_nnunet_predicts(tmp_path, monkeypatch):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    ready = running.prepare(tmp_path, donor_options={"spacing_mm": (2.0, 2.0, 2.0)}, transfer_options={"geometry": "target"},
                            spacing_mm=(1.0, 1.0, 3.0), shape=(24, 24, 10)).activate(monkeypatch)
    trained = running.train(nnUNetTrainerLoRA, ready)
    folder = Path(trained.output_folder)
    assert load_checkpoint_safely(folder / "checkpoint_final.pth")["dante"]["start_source"] == "transfer"
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False, perform_everything_on_device=False)
    predictor.initialize_from_trained_model_folder(str(folder.parent), (0,))
    case = next((tmp_path / "nnUNet_raw").glob("*/imagesTr/*.nii.gz"))
    (mask,) = predictor.predict_from_files_sequential([[str(case)]], None)
    assert mask.shape == (10, 24, 24)
