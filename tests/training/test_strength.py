"""strength.py: the end of a training keeps what helps on unseen cases, and loses nothing of what was learned."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from running import build, equal, keep_checkpoint, train

from nnunet_dante.adapters.strength import at_strength, start_weights, trained_weights
from nnunet_dante.models.checkpoint import load_checkpoint_safely
from nnunet_dante.training import strength as module
from nnunet_dante.training import trainers
from nnunet_dante.training.strength import best_strength, search, summary

METHODS = ["LoRA", "DoRA", "ConvAdapter", "BitFit", "FineTune", "GradualUnfreezing", "SpatialAdapter"]


def final(trainer):
    return load_checkpoint_safely(Path(trainer.output_folder, "checkpoint_final.pth"))


def test_the_search_is_finer_around_the_best():
    asked = []

    def score(strength):
        asked.append(strength)
        return -abs(strength - 0.3)

    curve = search(score)
    assert best_strength(curve) == 0.3
    assert len(asked) == len(set(asked)) == len(curve) == 8
    assert list(search(lambda s: s)) == [0.0, 0.2, 0.4, 0.6, 0.8, 0.9, 1.0]


def test_of_equal_strengths_the_smallest_is_kept():
    assert best_strength(search(lambda _: 0.5)) == 0.0


def test_the_summary_says_what_was_kept_and_what_else_there_was():
    curve = {0.0: 0.833, 0.2: 0.834, 1.0: 0.786}
    assert summary(0.2, curve, 4) == ("kept 20 % of what was learned: Dice 0.834 on 4 unseen cases; all of it 0.786, "
                                      "none 0.833.")
    assert summary(0.0, {0.0: 0.9, 1.0: 0.1}, 1) == ("kept nothing of what was learned: Dice 0.900 on 1 unseen case; "
                                                     "all of it 0.100.")


@pytest.mark.parametrize("name", METHODS)
def test_the_chosen_strength_is_on_disk_and_in_memory_and_the_trained_weights_can_be_had_back(
        name, prepared, monkeypatch):
    monkeypatch.setattr(module, "search", lambda score: {0.0: score(0.0), 0.4: 2.0, 1.0: score(1.0)})
    trainer = build(getattr(trainers, f"nnUNetTrainer{name}"), prepared)
    seen = {}
    save = type(trainer).save_checkpoint
    monkeypatch.setattr(type(trainer), "save_checkpoint", lambda self, file: (save(self, file), seen.update(
        {Path(file).name: load_checkpoint_safely(file)["network_weights"]})))
    trainer.run_training()
    content = final(trainer)
    trained, kept = seen["checkpoint_final.pth"], content["dante"]["strength"]
    start = start_weights(content) or trainer.start_state()
    assert kept["value"] == 0.4
    assert equal(trained_weights(content), trained)
    assert not equal(content["network_weights"], trained)
    for key, tensor in content["network_weights"].items():
        torch.testing.assert_close(tensor, torch.lerp(start[key], trained[key], 0.4), rtol=1e-5, atol=1e-6)
    assert equal({k: v.cpu() for k, v in trainer.bare_network.state_dict().items()}, content["network_weights"])
    assert equal(at_strength(content, 1, start=start)["network_weights"], trained)
    assert equal(at_strength(content, 0, start=start)["network_weights"], start)


def test_the_start_weights_are_on_the_cpu_like_those_of_a_checkpoint_whatever_device_trains(prepared):
    trainer = build(trainers.nnUNetTrainerFineTune, prepared)
    trainer.initialize()
    trainer.device = torch.device("meta")
    assert {tensor.device.type for tensor in trainer.start_state().values()} == {"cpu"}


def pretrained(prepared, tmp_path, cls=trainers.nnUNetTrainerFineTune):
    file = tmp_path / "pretrained.pth"
    stock = load_checkpoint_safely(prepared.preprocessed / "nnUNetDantePlans_3d_fullres_start.pth")["network_weights"]
    torch.save({"network_weights": {key: tensor + 0.125 for key, tensor in stock.items()}}, file)
    return build(cls, prepared, pretrained=file)


def test_a_training_that_goes_on_still_knows_the_weights_of_pretrained_weights(prepared, tmp_path, monkeypatch):
    trainer = pretrained(prepared, tmp_path)
    start = {key: tensor.clone() for key, tensor in trainer.bare_network.state_dict().items()}
    with monkeypatch.context() as patch:
        patch.setattr(type(trainer), "on_epoch_end", keep_checkpoint(type(trainer).on_epoch_end))
        trainer.run_training()
    folder = Path(trainer.output_folder)
    (folder / "checkpoint_final.pth").unlink()
    (folder / "kept.pth").rename(folder / "checkpoint_latest.pth")
    build(type(trainer), prepared, resume=True).run_training()
    assert equal(load_checkpoint_safely(folder / module.START)["network_weights"], start)


def test_without_the_start_weights_a_training_ends_with_all_that_it_learned(prepared, tmp_path, capsys):
    trainer = pretrained(prepared, tmp_path)
    trainer.on_train_start()
    Path(trainer.output_folder, module.START).unlink()  # as in a training that 0.1.0 began
    trainer.on_train_end()
    assert "WARNING: kept all that was learned" in capsys.readouterr().out
    assert "strength" not in final(trainer)["dante"]


def test_the_start_weights_of_an_earlier_training_are_set_aside(prepared, tmp_path):
    folder = Path(pretrained(prepared, tmp_path).output_folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / module.START).write_bytes(b"of an earlier training")
    train(trainers.nnUNetTrainerFineTune, prepared)
    assert not (folder / module.START).exists() and (folder / f"{module.START}.previous").is_file()


def test_a_finished_training_that_is_continued_keeps_the_strength_that_was_set(prepared):
    trainer = train(trainers.nnUNetTrainerLoRA, prepared)
    file = Path(trainer.output_folder, "checkpoint_final.pth")
    torch.save(at_strength(final(trainer), 0.3, facts={"rule": "given"}), file)
    before = final(trainer)
    build(type(trainer), prepared, resume=True).run_training()
    assert final(trainer)["dante"]["strength"]["value"] == 0.3
    assert equal(final(trainer)["network_weights"], before["network_weights"])


def test_a_prediction_with_infinite_numbers_counts_as_bad_for_every_label(prepared):
    trainer = build(trainers.nnUNetTrainerFineTune, prepared)
    trainer.initialize()

    def refuse(_):
        raise RuntimeError("Encountered inf in predicted array. Aborting...")

    data = trainer.dataset_class(trainer.preprocessed_dataset_folder)
    predictor = SimpleNamespace(predict_sliding_window_return_logits=refuse)
    assert trainer._dice(predictor, data, data.identifiers[0]) == [0.0, 0.0, 0.0]


def test_without_checkpoints_the_log_says_that_nothing_was_chosen(prepared, capsys):
    trainer = build(trainers.nnUNetTrainerFineTune, prepared)
    trainer.disable_checkpointing = True
    trainer.run_training()
    assert "kept all that was learned: without checkpoints" in capsys.readouterr().out


def fold_all(prepared):
    trainer = build(trainers.nnUNetTrainerFineTune, prepared, fold="all")
    trainer.run_training()
    return final(trainer)["dante"]["strength"]


def test_a_training_on_all_cases_takes_the_mean_of_what_its_folds_chose(prepared, monkeypatch, capsys):
    splits = json.loads((prepared.preprocessed / "splits_final.json").read_text())
    for fold in range(len(splits)):
        chosen = 0.2 if fold else 0.6
        monkeypatch.setattr(module, "search", lambda _, best=chosen: {0.0: 0.1, best: 0.9, 1.0: 0.5})
        build(trainers.nnUNetTrainerFineTune, prepared, fold=fold).run_training()
    kept = fold_all(prepared)
    mean = round((0.6 + 0.2 * (len(splits) - 1)) / len(splits), 2)
    assert (kept["value"], kept["rule"]) == (mean, "mean of the folds")
    assert f"kept {100 * mean:.0f} % of what was learned: the mean of what the folds chose" in capsys.readouterr().out
    results = Path(build(trainers.nnUNetTrainerFineTune, prepared, fold="all").output_folder_base)
    (results / "fold_0" / "checkpoint_final.pth").unlink()
    assert fold_all(prepared)["rule"] != "mean of the folds", "the case that fold 0 alone had not seen is missing"


@pytest.mark.parametrize(("few", "rule", "value"), [(99, "what the start lacked", 0.3), (1, "no unseen cases", 1.0)])
def test_without_unseen_cases_and_folds_few_cases_keep_what_the_start_lacked(prepared, monkeypatch, few, rule, value):
    monkeypatch.setattr(module, "FEW", few)
    monkeypatch.setattr(trainers.nnUNetTrainerFineTune, "_dice", lambda *_: [0.9, 0.5])
    kept = fold_all(prepared)
    assert (kept["value"], kept["rule"]) == (value, rule)
