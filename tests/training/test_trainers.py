"""Trainers whose modules stay in the network: own name and keys in the checkpoint, everything else as the others."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import tiny
import torch
from running import build, train, train_and_resume, weights

from nnunet_dante.errors import ConfigurationError
from nnunet_dante.methods import AdaptFormer
from nnunet_dante.methods.nonlinear import ADDING_TRAINERS
from nnunet_dante.models.checkpoint import load_checkpoint_safely
from nnunet_dante.models.donor import open_donor
from nnunet_dante.models.network import build_network
from nnunet_dante.peft.added_modules import added_modules, is_added
from nnunet_dante.training import trainers
from nnunet_dante.training.launch import VARIABLE, trainers_folder
from nnunet_dante.training.trainers import AddedModulesMixin
from nnunet_dante.transfers.transfer import transfer

TRAINERS = [trainers.nnUNetTrainerSpatialAdapter, trainers.nnUNetTrainerAdaptFormer]


def test_the_table_from_which_networks_are_built_names_the_trainers_with_their_methods():
    found = {name: cls.method for name, cls in vars(trainers).items()
             if isinstance(cls, type) and issubclass(cls, AddedModulesMixin) and cls is not AddedModulesMixin}
    assert found == ADDING_TRAINERS


@pytest.fixture
def start(prepared) -> dict:
    return weights(prepared.preprocessed / "nnUNetDantePlans_3d_fullres_start.pth")


def predictor_of(trainer):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,), "checkpoint_final.pth")
    return predictor


@pytest.mark.parametrize("cls", TRAINERS)
def test_only_added_modules_and_heads_move_and_stock_keys_stay(prepared, start, cls):
    trainer = train(cls, prepared)
    for file in ("checkpoint_final.pth", "checkpoint_best.pth"):
        checkpoint = load_checkpoint_safely(Path(trainer.output_folder, file))
        state = checkpoint["network_weights"]
        assert checkpoint["trainer_name"] == cls.__name__
        assert [k for k in state if not is_added(k)] == list(start)
        assert any(is_added(k) for k in state)
    final = weights(Path(trainer.output_folder, "checkpoint_final.pth"))
    moved = {k for k in start if not torch.equal(final[k], start[k])}  # the coarsest head has no part in the loss
    assert moved == {"decoder.seg_layers.1.weight", "decoder.seg_layers.1.bias"}
    assert all(final[k].any() for k in final if is_added(k) and k.endswith("up.weight"))


@pytest.mark.parametrize("cls", TRAINERS)
def test_nnunet_predicts_with_the_trained_network_where_it_finds_the_trainer(prepared, monkeypatch, cls):
    trainer = train(cls, prepared)
    monkeypatch.setenv(VARIABLE, str(trainers_folder()))
    predictor = predictor_of(trainer)
    trainer.set_deep_supervision_enabled(False)
    x = torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        live = trainer.network.eval()(x)
        assert torch.equal(predictor.network.eval()(x), live)
        assert torch.equal(copy.deepcopy(predictor.network)(x), live)
        for module in added_modules(predictor.network).values():
            module.reset()
        assert not torch.equal(predictor.network(x), live), "the added modules do nothing: the test says nothing"


def test_nnunet_says_that_the_trainer_is_missing(prepared, monkeypatch):
    trainer = train(trainers.nnUNetTrainerSpatialAdapter, prepared)
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(RuntimeError, match="nnUNetTrainerSpatialAdapter"):
        predictor_of(trainer)


@pytest.mark.parametrize("cls", TRAINERS)
def test_resuming_equals_never_having_stopped(prepared, monkeypatch, cls):
    whole, expected, resumed = train_and_resume(cls, prepared, monkeypatch)
    folder = Path(resumed.output_folder)
    final = weights(folder / "checkpoint_final.pth")
    assert list(final) == list(expected) and all(torch.equal(final[k], expected[k]) for k in expected)
    assert resumed.logger.get_value("train_losses", None) == whole.logger.get_value("train_losses", None)


@pytest.mark.parametrize("cls", TRAINERS)
def test_pretrained_weights_may_be_stock_and_added_modules_start_anew(prepared, start, tmp_path, cls):
    torch.save({"network_weights": {k: torch.full_like(v, 0.25) for k, v in start.items()}}, tmp_path / "other.pth")
    trainer = build(cls, prepared, pretrained=tmp_path / "other.pth")
    assert trainer.start_source == "-pretrained_weights"
    trainer.run_training()
    final = weights(Path(trainer.output_folder, "checkpoint_final.pth"))
    assert torch.all(final["encoder.stages.0.0.convs.0.conv.weight"] == 0.25) and any(is_added(k) for k in final)


def test_a_network_is_the_same_in_every_training_before_its_first_step(prepared):
    first, second = (build(trainers.nnUNetTrainerAdaptFormer, prepared) for _ in range(2))
    for trainer in (first, second):
        trainer.initialize()
    pairs = zip(first.network.parameters(), second.network.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def transferred(prepared, tmp_path):
    """A donor of nnUNetTrainerSpatialAdapter, and the plans of its transfer to the prepared data set."""
    donor = tiny.add_modules(shutil.copytree(prepared.donor, tmp_path / prepared.donor.name),
                             "nnUNetTrainerSpatialAdapter")
    report = transfer(donor, prepared.dataset, plans_name="nnUNetAddedPlans")
    plans = json.loads((prepared.preprocessed / report.plans_file).read_text())
    plans["configurations"]["3d_fullres"]["data_identifier"] = "nnUNetDantePlans_3d_fullres"  # preprocessed alike
    yield donor, report, plans
    for file in prepared.preprocessed.glob("nnUNetAddedPlans*"):
        file.unlink()


def test_a_donor_with_added_modules_is_trained_further_by_its_own_trainer(prepared, transferred):
    path, report, plans = transferred
    donor = open_donor(path)
    assert donor.network_trainer == "nnUNetTrainerSpatialAdapter"
    trainer = build(trainers.nnUNetTrainerSpatialAdapter, prepared, plans=plans)
    trainer.initialize()
    for name, module in added_modules(trainer.bare_network).items():
        assert all(torch.equal(p, donor.weights[f"{name}.{n}"]) and p.any() for n, p in module.named_parameters())
    head = trainer.bare_network.decoder.seg_layers[-1].weight
    labels = dict(zip(("background", "organ", "lesion"), donor.weights["decoder.seg_layers.1.weight"]))
    assert torch.equal(head[1], labels["lesion"]) and torch.equal(head[2], labels["organ"])


@pytest.mark.parametrize("cls", [trainers.nnUNetTrainerLoRA, trainers.nnUNetTrainerAdaptFormer])
def test_other_trainers_refuse_a_start_with_added_modules_and_name_the_right_one(prepared, transferred, cls):
    with pytest.raises(ConfigurationError, match="Train with -tr nnUNetTrainerSpatialAdapter"):
        build(cls, prepared, plans=transferred[2]).initialize()
    assert "-tr nnUNetTrainerSpatialAdapter" in str(transferred[1])


def test_any_stock_trainer_can_stand_under_the_mixin():
    """What the trainer replaces is built first, then the modules are added."""
    from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import nnUNet_Primus_S_Trainer
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    class Mine(AddedModulesMixin, nnUNet_Primus_S_Trainer):
        method = AdaptFormer()

    manager = PlansManager(tiny.plans("D"))
    with torch.device("meta"):
        network = Mine.build_network_architecture(manager, manager.get_configuration("3d_fullres"), 1, 3, False)
    assert len(added_modules(network)) == len(network.eva.blocks)
    assert Mine.__new__(Mine).stock_trainer_name == "Mine"


@pytest.fixture
def batch_norm(prepared, tmp_path):
    """Plans of a transfer from a donor of nnUNetTrainerBN, whose network the trainer builds and not the plans."""
    donor = shutil.copytree(prepared.donor, tmp_path / prepared.donor.name)
    file = next(donor.glob("fold_*/*.pth"))
    content = torch.load(file, weights_only=False)
    init = content["init_args"]
    network = build_network(copy.deepcopy(init["plans"]), init["dataset_json"], init["configuration"],
                            trainer_name="nnUNetTrainerBN")
    torch.save(content | {"network_weights": network.state_dict(), "trainer_name": "nnUNetTrainerBN"}, file)
    report = transfer(donor, prepared.dataset, plans_name="nnUNetNormPlans")
    plans = json.loads((prepared.preprocessed / report.plans_file).read_text())
    plans["configurations"]["3d_fullres"]["data_identifier"] = "nnUNetDantePlans_3d_fullres"
    plans["dante"]["overrides"] = {"epochs": 1, "iterations": 1, "val_iterations": 1}
    yield report, plans
    for file in prepared.preprocessed.glob("nnUNetNormPlans*"):
        file.unlink()


def test_a_network_that_the_donors_trainer_builds_is_trained_and_stock_nnunet_predicts_with_it(prepared, batch_norm,
                                                                                             monkeypatch):
    report, plans = batch_norm
    assert "-p nnUNetNormPlans -tr nnUNetTrainerLoRA" in str(report)
    trainer = train(trainers.nnUNetTrainerLoRA, prepared, plans=copy.deepcopy(plans))
    assert any(isinstance(module, torch.nn.BatchNorm3d) for module in trainer.bare_network.modules())
    folder = Path(trainer.output_folder_base)
    assert folder.name == "nnUNetTrainerLoRA__nnUNetNormPlans__3d_fullres"
    assert load_checkpoint_safely(folder / "fold_0" / "checkpoint_final.pth")["trainer_name"] == "nnUNetTrainerBN"
    monkeypatch.delenv(VARIABLE, raising=False)
    predictor = predictor_of(trainer)
    trainer.set_deep_supervision_enabled(False)
    x = torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        assert torch.equal(predictor.network.eval()(x), trainer.network.eval()(x))
    assert build(trainers.nnUNetTrainerLoRA, prepared, plans=copy.deepcopy(plans), resume=True).current_epoch == 1


def test_added_modules_on_a_network_of_the_donors_trainer_are_refused(prepared, batch_norm):
    with pytest.raises(ConfigurationError, match="built by its trainer nnUNetTrainerBN. Choose another -tr"):
        build(trainers.nnUNetTrainerAdaptFormer, prepared, plans=batch_norm[1])
