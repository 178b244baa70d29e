"""The curves of a run come from nnU-Net's own logs."""

from __future__ import annotations

import math

import pytest

from nnunet_dante.ui.progress import Training, read_log, read_trainings

LOG = """2026-01-02 10:00:00.000000: Pseudo dice before training: 0.4000 {'organ': 0.4, 'lesion': nan}
2026-01-02 10:00:01.000000:
2026-01-02 10:00:01.100000: Epoch 0
2026-01-02 10:00:01.200000: Current learning rate: 0.001
2026-01-02 10:00:01.200000: Trained groups: head
2026-01-02 10:00:05.000000: train_loss -0.1
2026-01-02 10:00:05.000000: val_loss -0.2
2026-01-02 10:00:05.000000: Pseudo dice [np.float32(0.5), np.float64(nan)]
2026-01-02 10:00:05.000000: Epoch time: 4.0 s
2026-01-02 10:00:05.000000: Most memory so far: 512 MiB
2026-01-02 10:00:06.100000: Epoch 1
2026-01-02 10:00:06.200000: Current learning rate: 1e-05
2026-01-02 10:00:06.200000: Trained groups: head, decoder
2026-01-02 10:00:09.000000: train_loss -0.3
2026-01-02 10:00:09.000000: val_loss nan
2026-01-02 10:00:09.000000: Pseudo dice [0.7, 0.1]
2026-01-02 10:00:09.000000: Epoch time: 2.0 s
"""


def _training(tmp_path, **more):
    return Training(trainer="nnUNetTrainerLoRA", fold="0", folder=tmp_path, total=10, **more)


def test_a_log_is_read(tmp_path):
    training = _training(tmp_path)
    read_log(LOG, training)
    first, second = training.epochs
    assert training.start_dice == {"organ": 0.4}
    assert (first.lr, first.loss, first.val_loss, first.groups) == (0.001, -0.1, -0.2, "head")
    assert first.dice[0] == 0.5 and math.isnan(first.dice[1]) and first.mean_dice == 0.5
    assert first.mib == 512 and math.isnan(second.mib)
    assert second.lr == 1e-05 and math.isnan(second.val_loss) and second.mean_dice == pytest.approx(0.4)
    assert training.epoch_seconds == 3 and training.seconds_left == 24 and training.title == "LoRA, fold 0"


def test_an_epoch_that_has_not_ended_does_not_count(tmp_path):
    training = _training(tmp_path)
    read_log(LOG + "2026-01-02 10:00:10.0: Epoch 2\n2026-01-02 10:00:10.0: Current learning rate: 0.1\n", training)
    assert len(training.epochs) == 2


def test_epochs_that_were_repeated_after_a_stop_count_once(tmp_path):
    training = _training(tmp_path)
    read_log(LOG, training)
    read_log(LOG.replace("Epoch 0", "Epoch 1", 1).replace("0.5)", "0.9)").partition("2026-01-02 10:00:06.1")[0], training)
    assert [epoch.mean_dice for epoch in training.epochs] == [0.5, 0.9]


@pytest.mark.parametrize("text", ["", "\0\1\2", "Epoch time: 3 s", "Epoch 7 \nPseudo dice [", "Pseudo dice before training: 1 {[[[",
                                  "Epoch 0\nEpoch time: x", "Epoch 0\nCurrent learning rate:\ntrain_loss\n"])
def test_what_is_no_log_gives_nothing(tmp_path, text):
    training = _training(tmp_path)
    read_log(text, training)
    assert training.epochs == [] and math.isnan(training.seconds_left)


def test_trainings_of_other_runs_are_left_out(tmp_path):
    for fold in ("all", "0", "1"):
        folder = tmp_path / "nnUNetTrainerLoRA__nnUNetDantePlans__2d" / f"fold_{fold}"
        folder.mkdir(parents=True)
        (folder / "training_log_2026_1_2.txt").write_text(LOG)
    found = read_trainings(tmp_path, ["nnUNetTrainerLoRA 0", "nnUNetTrainerLoRA all", "nnUNetTrainerLoRA 9"],
                           finished={"nnUNetTrainerLoRA 0"}, epochs=10)
    assert [(training.fold, training.finished, len(training.epochs)) for training in found] == [("0", True, 2), ("all", False, 2)]
    assert read_trainings(tmp_path / "not there", [], finished=(), epochs=0) == []
