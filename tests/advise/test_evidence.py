"""evidence.py: the nearest measured results, and whether they may decide."""

from __future__ import annotations

import json

import pytest

from nnunet_dante.advise.evidence import Row, nearest, read_evidence
from nnunet_dante.errors import ConfigurationError
from nnunet_dante.training import trainers


def row(experiment="mild", *, shots=2, trainer="nnUNetTrainerLoRA", dice=0.832, zero_shot=0.86, **changes) -> Row:
    usual = {"simulated": False, "method": trainer, "dice_interval": (dice - 0.01, dice + 0.01), "scratch": 0.5,
             "draws": 3, "cases": 13, "source": "here"}
    return Row(experiment=experiment, shots=shots, trainer=trainer, dice=dice, zero_shot=zero_shot, **(usual | changes))


FULL = row(trainer="nnUNetTrainerFineTune", dice=0.841)
ROWS = (row(), FULL, row(shots=8, dice=0.88), row("severe", zero_shot=0.02, dice=0.7), row("new", new_labels=True))


@pytest.mark.parametrize(("shots", "zero_shot", "new", "experiment", "theirs", "near"), [
    (2, 0.86, False, "mild", 2, True), (4, 0.9, False, "mild", 2, True), (6, 0.8, False, "mild", 8, True),
    (2, 0.1, False, "severe", 2, True), (2, 0.4, False, "severe", 2, False), (64, 0.86, False, "mild", 8, False),
    (2, 0.0, True, "new", 2, True), (2, None, True, "new", 2, True)])
def test_nearest_by_zero_shot_dice_and_shots(shots, zero_shot, new, experiment, theirs, near):
    found = nearest(ROWS, shots=shots, zero_shot=zero_shot, new_labels=new)
    assert (found.best.experiment, found.best.shots, found.near) == (experiment, theirs, near)


def test_nothing_measured_of_the_kind():
    assert nearest((), shots=2, zero_shot=0.5, new_labels=False) is None
    assert nearest(ROWS[:2], shots=2, zero_shot=0.5, new_labels=True) is None


def test_methods_come_best_first_and_may_all_be_worse_than_no_training():
    found = nearest(ROWS, shots=2, zero_shot=0.86, new_labels=False)
    assert found.rows == (FULL, ROWS[0]) and not found.training_helps
    assert nearest(ROWS, shots=8, zero_shot=0.86, new_labels=False).training_helps


def test_as_good_as_the_best_is_inside_its_interval():
    assert nearest(ROWS, shots=2, zero_shot=0.86, new_labels=False).as_good_as_best("nnUNetTrainerLoRA")
    clear = nearest((row(), row(trainer="nnUNetTrainerFineTune", dice=0.9)), shots=2, zero_shot=0.86, new_labels=False)
    assert not clear.as_good_as_best("nnUNetTrainerLoRA") and not clear.as_good_as_best("nnUNetTrainerHeadOnly")
    assert clear.as_good_as_best("nnUNetTrainerFineTune")


def test_the_rows_that_come_along_can_be_read_and_name_trainers():
    assert all(hasattr(trainers, r.trainer) and r.shots > 0 and 0 <= r.dice <= 1 and r.source for r in read_evidence())


@pytest.mark.parametrize("content", ["{", '[{"method": "LoRA"}]', '["LoRA"]'])
def test_damaged_evidence(tmp_path, content):
    (tmp_path / "evidence.json").write_text(content)
    with pytest.raises(ConfigurationError, match="is no evidence file"):
        read_evidence(tmp_path / "evidence.json")


def test_rows_survive_the_file(tmp_path):
    (tmp_path / "evidence.json").write_text(json.dumps([vars(r) for r in ROWS]))
    assert [vars(r) | {"dice_interval": tuple(r.dice_interval)} for r in read_evidence(tmp_path / "evidence.json")] == [
        vars(r) for r in ROWS]
