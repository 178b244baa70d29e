"""Encoders without a decoder as donors: read, fitted to plans, and trained with the decoder open from the first epoch."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import running
import tiny
import torch

from nnunet_dante.command.inspect import inspect_path
from nnunet_dante.errors import ConfigurationError, DanteError, DonorError, TransferError
from nnunet_dante.models.donor import open_donor
from nnunet_dante.models.encoder import ADAPTATION_PLAN
from nnunet_dante.training import trainers
from nnunet_dante.transfers.transfer import transfer


def encoder_of(folder: Path) -> dict:
    weights = torch.load(next(folder.glob("fold_*/*.pth")), weights_only=False)["network_weights"]
    return {key: tensor for key, tensor in weights.items() if key.startswith("encoder.")}


def nnssl_checkpoint(folder: Path, path: Path, *, kind="PlainConvUNet", spacing=(2.0, 2.0, 2.0), wrap="", **changes) -> Path:
    """Write what nnssl writes for the network of a model folder, with a decoder that reconstructs."""
    plans = json.loads((folder / "plans.json").read_text())
    weights = torch.load(next(folder.glob("fold_*/*.pth")), weights_only=False)["network_weights"]
    plan = {
        "architecture_plans": {"arch_class_name": kind, "arch_kwargs_requiring_import": None, "arch_kwargs":
                               plans["configurations"]["3d_fullres"]["architecture"]["arch_kwargs"]},
        "pretrain_plan": {"dataset_name": "Dataset745_Pretraining", "transpose_forward": [0, 1, 2], "configurations": {
            "onemmiso": {"spacing": spacing and list(spacing), "patch_size": [32, 32, 32],
                         "normalization_schemes": ["ZScoreNormalization"]}}},
        "pretrain_num_input_channels": 1, "recommended_downstream_patchsize": [16, 16, 16],
        "key_to_encoder": f"{wrap}encoder.stages", "key_to_stem": f"{wrap}encoder.stages.0", "key_to_lpe": None,
        "keys_to_in_proj": ["encoder.stages.0.0.convs.0.conv"]}
    torch.save({"network_weights": {wrap + key: tensor for key, tensor in weights.items()}, "citations": ["a paper"],
                "trainer_name": "BaseMAETrainer", ADAPTATION_PLAN: plan | changes}, path)
    return path


@pytest.fixture
def place(nnunet_paths):
    """The folder in nnUNet_preprocessed of a data set with its fingerprint, and a model folder."""
    dataset = tiny.write_raw_dataset(nnunet_paths["nnUNet_raw"])
    folder = nnunet_paths["nnUNet_preprocessed"] / dataset
    tiny.write_fingerprint(folder, n_cases=5)
    return folder, tiny.write_model_folder(nnunet_paths["nnUNet_results"], spacing_mm=(2.0, 2.0, 2.0), seed=5)


def start(folder: Path, report) -> dict:
    return torch.load(folder / report.start_weights, weights_only=True)["network_weights"]


@pytest.mark.parametrize("wrap", ["", "student."])
def test_an_encoder_of_nnssl_starts_the_encoder_and_the_decoder_is_random(place, tmp_path, wrap):
    folder, model = place
    path = nnssl_checkpoint(model, tmp_path / "ssl.pth", wrap=wrap)
    report = transfer(path, folder.name)
    weights, donors = start(folder, report), encoder_of(model)
    assert all(torch.equal(weights[key], tensor) for key, tensor in donors.items())
    assert all(weights[f"decoder.{key}"].data_ptr() == weights[key].data_ptr() for key in donors)
    whole = torch.load(next(model.glob("fold_*/*.pth")), weights_only=False)["network_weights"]
    assert not torch.equal(weights["decoder.transpconvs.0.weight"], whole["decoder.transpconvs.0.weight"])
    head = weights["decoder.seg_layers.0.weight"]
    assert all(not torch.equal(head[0], row) for row in head[1:])  # equal rows would let no gradient through
    assert report.encoder_only and report.labels.matched == () and report.labels.new == ("background", "organ", "lesion")
    encoder = sum(tensor.numel() for key, tensor in donors.items() if ".all_modules." not in key)
    assert report.weights_copied == pytest.approx(encoder / sum(p.numel() for p in tiny.plain_unet().parameters()))
    assert "the whole decoder is random" in str(report) and "nnUNetTrainerFineTune" in str(report)
    assert report.plans.plans_spacing_mm == (2.0, 2.0, 2.0) and report.plans.patch_size == (16, 16, 16)
    plans = json.loads((folder / "nnUNetDantePlans.json").read_text())
    entry = plans["dante"]["start_weights"]["3d_fullres"]
    assert entry["encoder_only"] and entry["label_map"] == {"background": None, "organ": None, "lesion": None}
    assert entry["donor"]["dataset"] == "Dataset745_Pretraining" and entry["donor"]["trainer"] == "BaseMAETrainer"


def test_an_encoder_at_the_targets_own_spacing(place, tmp_path):
    folder, model = place
    path = nnssl_checkpoint(model, tmp_path / "ssl.pth", spacing=None)
    with pytest.raises(TransferError, match="nothing says at which spacing it was trained. Use --geometry target"):
        transfer(path, folder.name)
    report = transfer(path, folder.name, geometry="target")
    assert report.plans.plans_spacing_mm == (1.0, 1.0, 1.0)
    assert all(torch.equal(start(folder, report)[key], tensor) for key, tensor in encoder_of(model).items())


def test_an_encoder_with_plans_beside_it_has_their_geometry(place, tmp_path):
    folder, model = place
    torch.save({"network_weights": encoder_of(model)}, file := next(model.glob("fold_*/*.pth")))
    report = transfer(model, folder.name, configuration="3d_fullres")
    assert report.plans.plans_spacing_mm == (2.0, 2.0, 2.0) and report.encoder_only
    assert all(torch.equal(start(folder, report)[key], tensor) for key, tensor in encoder_of(model).items())
    assert transfer(file, folder.name, configuration="3d_fullres").encoder_only


def test_an_encoder_alone_gets_the_plans_whose_encoder_has_its_shapes(place, tmp_path):
    """Three stages of nnU-Net's own network are what the default planner makes for these images."""
    folder, _ = place
    own = tiny.plain_unet(features=(32, 64, 128))
    double = [2] * 3  # nnU-Net's blocks have two convolutions
    own = type(own)(1, 3, (32, 64, 128), torch.nn.Conv3d, [[3] * 3] * 3, [[1] * 3, double, double], [2] * 3, 3, [2] * 2,
                    True, torch.nn.InstanceNorm3d, {"eps": 1e-5, "affine": True}, None, None, torch.nn.LeakyReLU,
                    {"inplace": True}, deep_supervision=True)
    weights = {key: tensor for key, tensor in own.state_dict().items() if key.startswith("encoder.")}
    torch.save({"network_weights": weights}, tmp_path / "alone.pth")
    with pytest.raises(TransferError, match="--geometry target"):
        transfer(tmp_path / "alone.pth", folder.name)
    report = transfer(tmp_path / "alone.pth", folder.name, geometry="target")
    assert report.plans.donor.planner == "ExperimentPlanner" and report.plans.patch_size == (20, 24, 20)
    assert "nothing says at which spacing the donor was trained" in str(report)
    assert all(torch.equal(start(folder, report)[key], tensor) for key, tensor in weights.items())
    torch.save({"network_weights": encoder_of(place[1])}, tmp_path / "other.pth")
    before = sorted(file.name for file in folder.iterdir())
    with pytest.raises(TransferError, match="none that ExperimentPlanner, .* has it. Put the plans.json"):
        transfer(tmp_path / "other.pth", folder.name, geometry="target", plans_name="Other")
    assert sorted(file.name for file in folder.iterdir()) == before


@pytest.mark.parametrize(("changes", "message"), [
    ({"key_to_encoder": "eva"}, "lies at 'eva'. Supported are encoders of U-Nets"),
    ({"key_to_encoder": "net.encoder.stages"}, "holds no weights there"),
    ({"key_to_encoder": 3}, "is damaged"), ({"pretrain_num_input_channels": 10**9}, "reads 1000000000 channels"),
    ({"kind": "PrimusM"}, "architecture 'PrimusM'; supported are"),
    ({"kind": "ResidualEncoderUNet"}, "cannot be built.*n_conv_per_stage"),
    ({"pretrain_num_input_channels": 2}, "disagree")])
def test_encoders_that_cannot_be_used_are_refused_by_name(place, tmp_path, changes, message):
    folder, model = place
    path = nnssl_checkpoint(model, tmp_path / "ssl.pth", **changes)
    with pytest.raises((DonorError, ConfigurationError), match=message):
        transfer(path, folder.name)
    assert [file.name for file in folder.iterdir()] == ["dataset_fingerprint.json"]


def test_only_a_transfer_takes_an_encoder(place, tmp_path):
    path = nnssl_checkpoint(place[1], tmp_path / "ssl.pth")
    with pytest.raises(DonorError, match="holds an encoder and no decoder.*nnunet-dante transfer"):
        open_donor(path)
    assert open_donor(path, partial=True).encoder_only
    assert "encoder of a training with nnssl (PlainConvUNet), without a decoder that segments" in inspect_path(path)


@pytest.mark.slow
def test_methods_train_the_whole_random_decoder_from_the_first_epoch_and_others_refuse(tmp_path, monkeypatch):
    ready = running.prepare(tmp_path).activate(monkeypatch)
    path = nnssl_checkpoint(ready.donor, tmp_path / "ssl.pth")
    transfer(path, ready.dataset, num_processes=1, overrides={"epochs": 4, "iterations": 1, "val_iterations": 1})
    for name in ("FineTune", "LoRA", "LPFT", "GradualUnfreezing", "GradualUnfreezingDante", "DecoderOnly", "BitFit",
                 "ConvAdapter"):
        built = running.build(getattr(trainers, f"nnUNetTrainer{name}"), ready)
        built.initialize()
        open_at_first = {key for key, p in built.bare_network.named_parameters() if p.requires_grad}
        decoder = {key for key, _ in built.bare_network.named_parameters() if key.startswith("decoder.")
                   and not key.startswith("decoder.encoder.")}
        assert decoder <= open_at_first and not any("lora" in key for key in decoder), name
        if name in ("LPFT", "GradualUnfreezing"):
            assert open_at_first == decoder
            assert built.training_plan.schedule.stages[-1].trainable == tuple(g.name for g in built.training_plan.groups)
        if name == "FineTune":
            scales = {group.name: scale for group, scale in zip(built.training_plan.groups, built.training_plan.lr_scales)}
            assert {scale for group, scale in scales.items() if group.startswith(("head", "decoder"))} == {1.0}
            assert scales["encoder.0"] == pytest.approx(0.1)
        if name == "LoRA":
            assert any(key.startswith("encoder.") and key.endswith("lora_A") for key in open_at_first)
        assert "the decoder starts at random" in Path(built.log_file).read_text()
    for name in ("HeadOnly", "LoRADecoder", "SpatialAdapter", "AdaptFormer"):
        with pytest.raises(ConfigurationError, match="would stay random|use nnUNetTrainerDecoderOnly"):
            running.build(getattr(trainers, f"nnUNetTrainer{name}"), ready).initialize()
    trained = running.train(trainers.nnUNetTrainerLoRA, ready)
    end = torch.load(Path(trained.output_folder, "checkpoint_final.pth"), weights_only=False)["network_weights"]
    stock = running.build("nnUNetTrainer", ready)
    stock.initialize()
    stock.network.load_state_dict(end, strict=True)


@pytest.mark.parametrize("changes", [
    {"pretrain_plan": {"configurations": [1]}}, {"pretrain_plan": {"transpose_forward": [[], 1]}},
    {"pretrain_plan": {"configurations": {"a": {"spacing": ["x", 1, 1]}}}},
    {"recommended_downstream_patchsize": [10**9] * 3}, {"recommended_downstream_patchsize": [16, -1, 16]},
    {"architecture_plans": {"arch_class_name": "PlainConvUNet", "arch_kwargs": {"conv_op": "subprocess.Popen"}}},
    {"architecture_plans": {"arch_class_name": "PlainConvUNet", "arch_kwargs": {"n_stages": 10**7}}},
    {"architecture_plans": [1]}, {"pretrain_plan": "text"}])
def test_hostile_plans_of_nnssl_end_in_an_error_and_run_nothing(place, tmp_path, changes):
    path = nnssl_checkpoint(place[1], tmp_path / "ssl.pth", **changes)
    with pytest.raises(DanteError):
        transfer(path, place[0].name)
    assert [file.name for file in place[0].iterdir()] == ["dataset_fingerprint.json"]
