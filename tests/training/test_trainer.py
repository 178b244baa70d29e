"""What a person sees of the trainers: stock checkpoints, a score before training, exact resume, clear refusals."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from running import build, equal, train, train_and_resume, weights, with_overrides

from nnunet_dante.errors import ConfigurationError
from nnunet_dante.methods import ParameterEfficient
from nnunet_dante.models.checkpoint import load_checkpoint_safely
from nnunet_dante.training import trainers
from nnunet_dante.training.trainers import AddedModulesMixin, DanteMixin

NAMES = [name for name, cls in trainers.TRAINERS.items() if not issubclass(cls, AddedModulesMixin)]


@pytest.mark.parametrize("name", NAMES)
def test_every_trainer_leaves_a_stock_checkpoint(prepared, name):
    trainer = train(getattr(trainers, name), prepared)
    folder = Path(trainer.output_folder)
    stock = build("nnUNetTrainer", prepared)
    stock.initialize()
    start = weights(prepared.preprocessed / "nnUNetDantePlans_3d_fullres_start.pth")
    for file in ("checkpoint_final.pth", "checkpoint_best.pth"):
        checkpoint = load_checkpoint_safely(folder / file)
        assert checkpoint["trainer_name"] == "nnUNetTrainer"
        assert list(checkpoint["network_weights"]) == list(stock.network.state_dict())
        stock.network.load_state_dict(checkpoint["network_weights"], strict=True)
        assert checkpoint["dante"]["method"] == type(trainer.run_method).__name__
        assert set(checkpoint["dante"]["start_dice"]) == {"organ", "lesion", "vessel"}
    assert not equal(weights(folder / "checkpoint_final.pth"), start)
    assert (folder / "adapter.safetensors").is_file() == isinstance(trainer.run_method, ParameterEfficient)


def test_stock_nnunet_predicts_with_it_and_gets_the_trained_networks_output(prepared):
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    trainer = train(trainers.nnUNetTrainerLoRA, prepared)
    predictor = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(trainer.output_folder_base, (0,), "checkpoint_final.pth")
    predictor.network.load_state_dict(predictor.list_of_parameters[0])
    trainer.set_deep_supervision_enabled(False)
    x = torch.rand(1, 1, 16, 16, 16)
    with torch.no_grad():
        assert torch.equal(predictor.network.eval()(x), trainer.network.eval()(x))


@pytest.mark.parametrize("name", ["nnUNetTrainerLoRA", "nnUNetTrainerGradualUnfreezing", "nnUNetTrainerLoRADecoder"])
def test_resuming_equals_never_having_stopped(prepared, monkeypatch, name):
    """The checkpoint_latest of the first epoch, continued, ends at the very weights of the run that went through."""
    cls = getattr(trainers, name)
    whole, expected, resumed = train_and_resume(cls, prepared, monkeypatch)
    folder = Path(resumed.output_folder)
    assert equal(weights(folder / "checkpoint_final.pth"), expected)
    assert resumed.logger.get_value("train_losses", None) == whole.logger.get_value("train_losses", None)


@pytest.mark.parametrize("name", ["nnUNetTrainerLoRA", "nnUNetTrainerGradualUnfreezing", "nnUNetTrainerAdaptFormer"])
def test_recomputing_trains_the_very_same_weights(prepared, name):
    found = []
    for recompute in (False, True):
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(0)
        trainer = train(getattr(trainers, name), prepared, plans=with_overrides(prepared, recompute=recompute))
        assert trainer.run_method.recompute == recompute
        found.append((weights(Path(trainer.output_folder, "checkpoint_final.pth")),
                      trainer.logger.get_value("train_losses", None)))
    assert equal(found[0][0], found[1][0]) and found[0][1] == found[1][1]


def test_the_best_checkpoint_is_never_worse_than_the_start(prepared, monkeypatch):
    """An absurd learning rate ruins the network; checkpoint_best must still be the start weights."""
    plans = prepared.preprocessed / "nnUNetDantePlans.json"
    content = json.loads(plans.read_text())
    ruined = content | {"dante": content["dante"] | {"overrides": content["dante"]["overrides"] | {"lr": 1e3}}}
    trainer = train(trainers.nnUNetTrainerFineTune, prepared, plans=ruined)
    start = weights(prepared.preprocessed / "nnUNetDantePlans_3d_fullres_start.pth")
    best = load_checkpoint_safely(Path(trainer.output_folder, "checkpoint_best.pth"))
    scores = trainer.logger.get_value("ema_fg_dice", None)
    mean = sum(best["dante"]["start_dice"].values()) / 3
    assert equal(best["network_weights"], start) == (max(scores) <= mean)
    assert best["_best_ema"] >= mean - 1e-6


def test_fine_tuning_without_start_weights_is_refused(prepared):
    plans = json.loads((prepared.preprocessed / "nnUNetDantePlans.json").read_text())
    del plans["dante"]["start_weights"]["3d_fullres"]
    with pytest.raises(ConfigurationError, match="nnunet-dante transfer MODEL -d Dataset901_Tiny -c 3d_fullres"):
        train(trainers.nnUNetTrainerLoRA, prepared, plans=plans)


def test_pretrained_weights_win_over_the_plans(prepared, tmp_path):
    other = weights(prepared.preprocessed / "nnUNetDantePlans_3d_fullres_start.pth")
    other = {k: torch.full_like(v, 0.25) for k, v in other.items()}
    torch.save({"network_weights": other}, tmp_path / "other.pth")
    trainer = build(trainers.nnUNetTrainerLoRA, prepared, pretrained=tmp_path / "other.pth")
    assert trainer.start_source == "-pretrained_weights"
    assert torch.all(trainer.bare_network.state_dict()["encoder.stages.0.0.convs.0.conv.weight"] == 0.25)


def test_start_weights_that_were_changed_or_lost_are_refused(prepared, tmp_path):
    file = prepared.preprocessed / "nnUNetDantePlans_3d_fullres_start.pth"
    kept = shutil.copy(file, tmp_path)
    try:
        file.write_bytes(file.read_bytes() + b"x")
        with pytest.raises(ConfigurationError, match="sha256"):
            build(trainers.nnUNetTrainerLoRA, prepared).initialize()
        file.unlink()
        with pytest.raises(ConfigurationError, match="does not hold"):
            build(trainers.nnUNetTrainerLoRA, prepared).initialize()
    finally:
        shutil.copy(kept, file)


def test_a_fold_that_does_not_exist_is_refused(prepared):
    trainer = build(trainers.nnUNetTrainerLoRA, prepared, fold=7)
    with pytest.raises(ConfigurationError, match="fold 7 .* folds 0 to"):
        trainer.do_split()


def test_the_encoder_of_lora_decoder_stays_as_it_was(prepared):
    trainer = train(trainers.nnUNetTrainerLoRADecoder, prepared)
    start = weights(prepared.preprocessed / "nnUNetDantePlans_3d_fullres_start.pth")
    final = weights(Path(trainer.output_folder, "checkpoint_final.pth"))
    assert all(torch.equal(final[k], start[k]) for k in final if k.startswith("encoder"))
    assert not torch.equal(final["decoder.stages.0.convs.0.conv.weight"], start["decoder.stages.0.convs.0.conv.weight"])


def test_gradual_unfreezing_keeps_closed_groups_bit_for_bit(prepared):
    trainer = build(trainers.nnUNetTrainerGradualUnfreezing, prepared)
    trainer.initialize()
    assert trainer.optimizer.param_groups[0]["name"] == "head"
    first = trainer.training_plan.schedule.stage(0)
    closed = {g["name"] for g in trainer.optimizer.param_groups} - set(first.trainable)
    assert closed
    for group in trainer.optimizer.param_groups:
        assert all(p.requires_grad == (group["name"] not in closed) for p in group["params"])


def test_checkpoint_names_the_trainer_whose_network_it_is():
    from nnunetv2.training.nnUNetTrainer.primus.primus_trainers import nnUNet_Primus_S_Trainer

    from nnunet_dante import DanteMixin

    class Mine(DanteMixin, nnUNet_Primus_S_Trainer):
        pass

    class Deeper(Mine):
        pass

    assert Deeper.__new__(Deeper).stock_trainer_name == "nnUNet_Primus_S_Trainer"


def test_the_log_shows_the_options_as_a_user_writes_them(prepared, capsys):
    build(trainers.nnUNetTrainerLoRA, prepared).initialize()
    said = capsys.readouterr().out
    assert "strength=auto" in said and "Overrides in the plans: {'epochs': 3" in said and "ignored" not in said


def test_new_channels_that_a_method_cannot_learn_are_called_out(prepared, capsys):
    plans = json.loads((prepared.preprocessed / "nnUNetDantePlans.json").read_text())
    plans["dante"]["start_weights"]["3d_fullres"]["channel_map"] = {"MRI": None}
    for cls, warned in ((trainers.nnUNetTrainerLoRADecoder, True), (trainers.nnUNetTrainerLoRA, False)):
        build(cls, prepared, plans=plans).initialize()
        assert ("WARNING: the donor does not know the channels MRI" in capsys.readouterr().out) == warned


@pytest.mark.parametrize("value", [[1], "1", 1.0])
def test_labels_that_stock_trains_are_named_in_the_order_of_its_dice_list(value):
    trainer = SimpleNamespace(dataset_json={"labels": {"background": 0, "lesion": 2, "organ": value}})
    assert DanteMixin.foreground_names.fget(trainer) == ["organ", "lesion"]
