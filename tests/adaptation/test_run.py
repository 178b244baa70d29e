"""run.py: only trainings that an adaptation has begun are its own, and the plan is compared with what was taken."""

from __future__ import annotations

import json

import pytest

from nnunet_dante.adaptation.run import _Work
from nnunet_dante.errors import ConfigurationError

TRAINER = "nnUNetTrainerLoRA"


@pytest.fixture
def work(nnunet_paths, tmp_path):
    """An adaptation with the user's own folders of nnU-Net, before its first training."""
    made = _Work(tmp_path / "out", {"device": "cpu", "budget_minutes": 30, "keep_labels": [], "geometry": "donor", "overrides": {}}, trust=False)
    return known(made)


def known(work: _Work) -> _Work:
    """The same with what its first steps find out."""
    work.dataset, work.configuration, work.trainer, work.trainers = "Dataset901_Tiny", "3d_fullres", TRAINER, (TRAINER,)
    work.length = type("Length", (), {"epochs": 2, "iterations": 3})
    return work


def write_transfer_report(work: _Work, *warnings: str) -> None:
    folder = work.steps.folder("nnUNet_preprocessed", work.dataset)
    folder.mkdir(parents=True)
    (folder / "nnUNetDantePlans_3d_fullres_transfer.json").write_text(
        json.dumps({"memory_gib": 8.0, "batch_size": 2, "warnings": warnings}))


def test_an_adaptation_of_an_earlier_version_with_fewer_options_goes_on(work):
    record = work.record | {"asked": {"device": "cpu", "overrides": {}}, "done": {"data": {"seconds": 1}}}
    (work.out / "adapt.json").write_text(json.dumps(record))
    asked = {"device": "cpu", "overrides": {}, "channels": [], "labels": [], "geometry": "donor", "groups": None}
    assert _Work(work.out, asked, trust=False).record["done"]
    with pytest.raises(ConfigurationError, match=r"with channels \(\), and now \['CT'\] is asked for"):
        _Work(work.out, asked | {"channels": ["CT"]}, trust=False)


def test_a_training_of_somebody_else_is_neither_continued_nor_scored(work, nnunet_paths):
    fold = work._model(TRAINER) / "fold_1"
    assert fold.is_relative_to(nnunet_paths["nnUNet_results"])
    fold.mkdir(parents=True)
    work._refuse_others()
    (fold / "checkpoint_latest.pth").touch()
    run = work.steps.run = lambda *_, **__: pytest.fail("nothing may be changed before the refusal")
    for step in (lambda: work._transfer("nnunet-dante transfer"), lambda: work._train(TRAINER, "1")):
        with pytest.raises(ConfigurationError, match=r"fold_1 holds an earlier training, .* Move .*LoRA.* away, or"):
            step()
    assert run and not work.record["begun"]
    work.trainers = ("nnUNetTrainerFromScratch",)
    work._refuse_others()


@pytest.mark.parametrize("killed_at", ["the start", "an epoch"])
def test_a_training_that_was_begun_goes_on_after_a_kill(work, monkeypatch, killed_at):
    fold, called = work._model(TRAINER) / "fold_0", []

    def run(_, *words, epochs=0):
        called.append("--c" in words)
        fold.mkdir(parents=True, exist_ok=True)
        if killed_at == "an epoch":
            (fold / "checkpoint_latest.pth").touch()
        if len(called) == 1:
            raise KeyboardInterrupt
        return ""

    monkeypatch.setattr(work.steps, "run", run)
    monkeypatch.setattr(work, "_checkpoint", lambda *_: {"current_epoch": 2, "dante": {"peak_memory_mib": 3072.0}})
    with pytest.raises(KeyboardInterrupt):
        work._train(TRAINER, "0")
    again = known(_Work(work.out, work.asked, trust=False))
    monkeypatch.setattr(again.steps, "run", run)
    monkeypatch.setattr(again, "_checkpoint", work._checkpoint)
    again._refuse_others()
    again._train(TRAINER, "0")
    assert called == [False, killed_at == "an epoch"]
    assert again.record["done"][f"{TRAINER} 0"]["gib"] == 3.0


def test_what_was_taken_is_said_in_the_words_of_the_plan(work, capsys):
    write_transfer_report(work)
    work.record |= {"begun": ["a", "b"], "done": {"a": {"epochs": 2, "gib": 1.5, "seconds": 60},
                                                  "b": {"epochs": 1, "gib": None, "seconds": 120}, "c": {"seconds": 9}}}
    work._say_taken()
    assert "Taken: 2 trainings with 9 steps, 3 min, 1.5 GiB of memory for the network (measured, without the libraries)." in capsys.readouterr().err
    work._say_plan({"gib": 2.5, "step_seconds": 0.5, "minutes": 29.3}, 3, "few cases")
    said = capsys.readouterr().err
    assert "3 trainings" in said and "2 epochs with 3 steps, so 18 steps of 0.5 s on cpu: about 30 min" in said
    assert "2.5 GiB of memory for the network (measured, without the libraries). Reason: few cases." in said
    work._say_plan({"gib": 0.034, "mib": None, "step_seconds": 0.5, "minutes": 29.3}, 3, "few cases")
    assert "0.034 GiB of memory for the network (by nnU-Net's estimate, without the libraries)" in capsys.readouterr().err


def test_the_plan_has_the_warnings_of_the_transfer_and_says_what_makes_a_training_fit_the_gpu(work, capsys):
    write_transfer_report(work, "the patch is larger than the median image", "images differ")
    work.memory_gib = 7.0
    work._say_plan({"gib": 8.0, "step_seconds": 0.5, "minutes": 30.0}, 3, "few cases")
    said = capsys.readouterr().err
    assert "more than 7 GiB" in said and "  --set recompute=true: about 6.5 GiB" in said
    assert "\n! the patch is larger than the median image\n! images differ\n" in said


@pytest.mark.parametrize(("usual", "overrides", "rate"), [
    (0.001, {}, 0.003), (0.01, {}, None), (0.0005, {"lr": 0.0005}, None), (0.001, {"epochs": 1000}, None)])
def test_short_trainings_get_a_higher_learning_rate_unless_it_is_high_already_or_the_users(work, monkeypatch, capsys, usual, overrides, rate):
    write_transfer_report(work)
    work.asked["overrides"] = {"epochs": 50, "iterations": 6, "val_iterations": 2} | overrides
    monkeypatch.setattr(work.steps, "python", lambda *_, **__: json.dumps({"step_seconds": 0.1, "mib": None, "lr": usual}))
    cost = work._measure(["0"], 2)
    assert cost.get("lr") == rate
    work._say_plan(cost, 2, "few cases")
    assert ("learning rate is 0.003, because the trainings are short" in capsys.readouterr().err) == bool(rate)
