"""budget.py: the length of the trainings follows from a measured step; a measurement leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nnunet_dante.adaptation.budget import MOST_STEPS, Length, faster_rate, length_for, measure, minutes, minutes_for
from nnunet_dante.errors import ConfigurationError


@pytest.mark.parametrize(("text", "value"), [("30min", 30), ("2h", 120), ("90s", 1.5), ("1.5 h", 90)])
def test_times_are_read_with_their_unit(text, value):
    assert minutes(text) == value


@pytest.mark.parametrize("text", ["", "30", "0min", "-5min", "half an hour", "nanmin"])
def test_other_times_are_refused(text):
    with pytest.raises(ConfigurationError, match="--budget is .*give a time such as 30min"):
        minutes(text)


def test_the_trainings_together_fit_into_the_budget():
    length = length_for(60, 6, step_seconds=0.5, start_seconds=20)
    seconds = 6 * (20 + length.epochs * (length.iterations * 0.5 + length.val_iterations * 0.25))
    assert 0.7 * 60 * 60 < seconds < 0.85 * 60 * 60
    assert (length.epochs, length.iterations, length.val_iterations) == (49, 17, 3)
    assert minutes_for(length, 6, step_seconds=0.5, start_seconds=20) == pytest.approx(60, rel=0.05)


def test_short_budgets_have_fewer_epochs_and_long_ones_no_more_steps_than_the_trainers_have():
    short = length_for(3, 2, step_seconds=0.5, start_seconds=20)
    assert short.iterations == 10 and short.epochs < 50
    long = length_for(10_000, 2, step_seconds=0.5, start_seconds=20)
    assert long.epochs * long.iterations == MOST_STEPS


def test_a_budget_that_is_too_short_says_how_much_is_needed():
    with pytest.raises(ConfigurationError, match=r"--budget 1min leaves 0 steps for each of 6 .* at least 6min"):
        length_for(1, 6, step_seconds=0.5, start_seconds=20)
    assert length_for(6, 6, step_seconds=0.5, start_seconds=20)


@pytest.mark.parametrize(("steps", "rate"), [(60, 0.003), (1300, 0.003), (2000, 0.002), (4000, 0.001), (25_000, 0.00016)])
def test_short_trainings_have_a_higher_learning_rate(steps, rate):
    assert faster_rate(Length(epochs=10, iterations=steps // 10, val_iterations=1)) == pytest.approx(rate)


def test_a_step_is_measured_and_no_results_are_left(prepared, capsys):
    measure(prepared.dataset, "3d_fullres", "nnUNetDantePlans", "nnUNetTrainerGradualUnfreezing", "0", "cpu")
    cost = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert 0 < cost["step_seconds"] < 60 and set(cost) == {"step_seconds", "mib", "lr"} and cost["lr"] == 0.001
    assert not list(Path(prepared.root, "nnUNet_results", prepared.dataset).rglob("fold_0"))


def test_a_measurement_leaves_the_results_of_an_earlier_training_alone(prepared):
    model = "nnUNetTrainerGradualUnfreezing__nnUNetDantePlans__3d_fullres"
    fold = prepared.root / "nnUNet_results" / prepared.dataset / model / "fold_0"
    fold.mkdir(parents=True)
    (fold / "checkpoint_final.pth").write_bytes(b"of an earlier training")
    measure(prepared.dataset, "3d_fullres", "nnUNetDantePlans", "nnUNetTrainerGradualUnfreezing", "0", "cpu")
    assert [file.read_bytes() for file in fold.iterdir()] == [b"of an earlier training"]
    assert [folder.name for folder in fold.parents[1].iterdir()] == [model]
