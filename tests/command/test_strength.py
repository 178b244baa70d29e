"""strength.py: a finished training is put at another strength and back; nothing that was learned is lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from running import build, threads_for_pools, train

from nnunet_dante.adapters.adapter import apply
from nnunet_dante.adapters.strength import stale_masks
from nnunet_dante.cli import main
from nnunet_dante.command.strength import draw_curve
from nnunet_dante.models.checkpoint import load_checkpoint_safely
from nnunet_dante.training import trainers


@pytest.fixture(params=["LoRA", "FineTune"])
def fold(request, prepared):
    return Path(train(getattr(trainers, f"nnUNetTrainer{request.param}"), prepared).output_folder)


def run(*words):
    return CliRunner().invoke(main, ["strength", *map(str, words)])


def state(fold):
    return load_checkpoint_safely(fold / "checkpoint_final.pth")


def same(one, other):
    return all(torch.equal(one[key], other[key]) for key in other)


def test_set_there_and_back_gives_the_same_weights(fold, prepared, tmp_path):
    start = load_checkpoint_safely(prepared.preprocessed / "nnUNetDantePlans_3d_fullres_start.pth")["network_weights"]
    assert "keeps 100 % of what" in run(fold, "--set", 1).output
    trained = state(fold)["network_weights"]
    assert "keeps 40 % of what" in run(fold, "--set", 0.4).output
    for key, tensor in state(fold)["network_weights"].items():
        torch.testing.assert_close(tensor, torch.lerp(start[key], trained[key], 0.4))
    if (adapter := fold / "adapter.safetensors").is_file():
        apply(prepared.preprocessed / "nnUNetDantePlans_3d_fullres_start.pth", adapter, tmp_path / "applied.pth")
        assert same(load_checkpoint_safely(tmp_path / "applied.pth")["network_weights"], state(fold)["network_weights"])
    run(fold, "--set", 0)
    assert same(state(fold)["network_weights"], start)
    run(fold, "--set", 1)
    assert same(state(fold)["network_weights"], trained)


def test_without_options_the_choice_of_the_training_holds_again(fold, tmp_path):
    chosen = state(fold)["dante"]["strength"]["value"]
    run(fold, "--set", 0.5)
    result = run(fold)
    assert result.exit_code == 0, result.output
    assert "of what was learned: Dice" in result.output and "on 1 unseen case;" in result.output
    assert state(fold)["dante"]["strength"]["value"] == chosen


def test_the_curve_alone_is_drawn_and_nothing_else_is_written(fold, tmp_path):
    run(fold, "--set", 0.45)
    before = {file: file.read_bytes() for file in fold.rglob("*") if file.is_file()}
    result = run(fold, "--curve", tmp_path / "curve.png")
    assert result.exit_code == 0 and "keeps 45 % of what was learned" in result.output
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert {file: file.read_bytes() for file in fold.rglob("*") if file.is_file()} == before
    run(fold)
    assert "Dice" in run(fold, "--curve", tmp_path / "curve.png").output
    content = state(fold)
    content["dante"]["strength"] = {"value": 1.0, "rule": "given", "trained": {}}
    torch.save(content, fold / "checkpoint_final.pth")
    result = run(fold, "--curve", tmp_path / "none.png")
    assert result.exit_code == 1 and "no curve to plot" in result.output and not (tmp_path / "none.png").exists()


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0, 1.5])
def test_the_words_of_the_plot_stay_inside_its_axes(value, tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, file, **_: (drawn.append(self), Path(file).touch()))
    draw_curve({"curve": [[0.0, 0.5], [1.0, 0.8]], "cases": 1, "value": value}, tmp_path / "curve.png")
    (axes,) = drawn[0].axes
    drawn[0].draw_without_rendering()
    words, inside = axes.texts[0].get_window_extent(), axes.get_window_extent()
    assert inside.x0 <= words.x0 and words.x1 <= inside.x1
    assert axes.get_ylabel() == "mean Dice, 1 unseen case"


def test_masks_of_another_strength_are_named_with_the_command_that_predicts_them_again(fold, prepared, monkeypatch):
    trainer_name = fold.parent.name.partition("__")[0]
    run(fold, "--set", 0.4)
    trainer = build(getattr(trainers, trainer_name), prepared)  # as with --val
    trainer.load_checkpoint(str(fold / "checkpoint_final.pth"))
    threads_for_pools(monkeypatch)
    trainer.perform_actual_validation()
    assert "validation masks" not in run(fold, "--set", 0.4).output
    said = run(fold, "--set", 0.7).output
    assert "The validation masks were predicted at strength 0.4, checkpoint_final.pth is at strength 0.7." in said
    assert (f"nnunet-dante train {prepared.dataset} 3d_fullres 0 -p nnUNetDantePlans -tr {trainer_name}" in said
            and said.rstrip().endswith("--val"))
    assert "predicted at strength 0.4" in stale_masks(fold, state(fold))
    assert "validation masks" not in run(fold, "--set", 0.4).output
    summary = fold / "validation" / "summary.json"
    content = json.loads(summary.read_text())
    assert "foreground_mean" in content
    summary.write_text(json.dumps({key: value for key, value in content.items() if key != "dante"}))  # as before
    assert "predicted at strength 0.4" in run(fold, "--set", 1).output




def test_other_cases_choose_anew(fold, prepared, tmp_path):
    before = state(fold)["dante"]["strength"]
    own = prepared.root / "nnUNet_raw" / prepared.dataset
    other = shutil.copytree(own, tmp_path / "other")
    for folder, cases in ((own, 1), (other, 5)):  # the cases of the data set that were trained on are left out
        result = run(fold, "--cases", folder)
        assert result.exit_code == 0, result.output
        kept = state(fold)["dante"]["strength"]
        assert kept["rule"] == "other cases" and kept["cases"] == cases
        assert kept["value"] == max(kept["curve"], key=lambda point: (point[1], -point[0]))[0]
    assert run(fold).exit_code == 0
    after = state(fold)["dante"]["strength"]
    assert (after["rule"], after["curve"], after["value"]) == (before["rule"], before["curve"], before["value"])


@pytest.mark.parametrize(("key", "value"), [
    ("strength", 5), ("strength", {"value": 0.5}), ("strength", {"value": 0.5, "trained": 3}),
    ("strength", {"value": 1, "trained": {}, "curve": [1]}), ("adapter", 3)])
def test_a_damaged_checkpoint_is_named(fold, key, value):
    content = torch.load(fold / "checkpoint_final.pth", weights_only=False)
    content["dante"][key] = value
    torch.save(content, fold / "checkpoint_final.pth")
    result = run(fold)
    assert result.exit_code == 1 and "checkpoint_final.pth" in result.output and "damaged" in result.output


def test_missing_things_are_said_by_name_and_nothing_is_written(fold, prepared, tmp_path):
    before = (fold / "checkpoint_final.pth").read_bytes()
    (tmp_path / "imagesTr").mkdir()
    for words, said in ((("--cases", tmp_path), "holds no labelled cases"), (("--set", -1), "not in the range"),
                        (("--set", 1e300), "strength is 1e+300; give 0 for the start")):
        result = run(fold, *words)
        assert result.exit_code != 0 and said in result.output
    result = run(tmp_path, "--set", 1)
    assert result.exit_code != 0 and "holds no checkpoint_final.pth" in result.output
    assert (fold / "checkpoint_final.pth").read_bytes() == before


def test_changed_start_weights_are_refused(prepared, tmp_path, monkeypatch):
    prepared = prepared.copy_to(tmp_path).activate(monkeypatch)
    fold = Path(train(trainers.nnUNetTrainerFineTune, prepared).output_folder)
    file = prepared.preprocessed / "nnUNetDantePlans_3d_fullres_start.pth"
    file.write_bytes(file.read_bytes() + b"0")
    result = run(fold, "--set", 0.5)
    assert result.exit_code != 0 and "sha256" in result.output
    file.unlink()
    result = run(fold, "--set", 0.5)
    assert result.exit_code != 0 and "start weights" in result.output and file.name in result.output


def test_a_file_of_start_weights_that_is_not_of_this_training_is_not_used(prepared):
    fold = Path(train(trainers.nnUNetTrainerFineTune, prepared).output_folder)
    start = load_checkpoint_safely(prepared.preprocessed / "nnUNetDantePlans_3d_fullres_start.pth")["network_weights"]
    torch.save({"network_weights": {key: tensor + 1 for key, tensor in start.items()}}, fold / "checkpoint_start.pth")
    try:
        run(fold, "--set", 0)
        assert same(state(fold)["network_weights"], start)
    finally:
        (fold / "checkpoint_start.pth").unlink()


def test_a_training_from_random_weights_has_no_strength(prepared):
    fold = Path(train(trainers.nnUNetTrainerFromScratch, prepared).output_folder)
    result = run(fold, "--set", 0.5)
    assert result.exit_code != 0 and "random" in result.output
