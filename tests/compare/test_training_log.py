"""convergence.py: reading nnU-Net's log, and epochs to a share of the peak."""

from __future__ import annotations

import numpy as np
import pytest

from nnunet_dante.compare.training_log import convergence, read_training_log, smoothed
from nnunet_dante.errors import ConfigurationError

LOG = """\
2026-01-01 00:00:00.000001: Using splits from existing split file: x
Pseudo dice is explained in line without a stamp [0.9]
2026-01-01 00:00:00.000001: Pseudo dice before training: 0.1250 {'a': 0.25, 'b': 0.0}
2026-01-01 00:00:00.000001: Epoch 0
2026-01-01 00:00:00.000002: Current learning rate: 0.01
2026-01-01 00:00:01.000000: train_loss 0.5
2026-01-01 00:00:01.000001: Pseudo dice [np.float32(0.2), np.float32(nan)]
2026-01-01 00:00:01.000002: Epoch time: 9.5 s
2026-01-01 00:00:01.000003: Epoch 1
2026-01-01 00:00:02.000001: Pseudo dice [0.4, 5e-05]
2026-01-01 00:00:02.000002: Epoch time: 1.5 s
"""


def test_the_log_gives_dice_seconds_and_the_start(tmp_path):
    (tmp_path / "training_log_2026_1_1_00_00_00.txt").write_text(LOG)
    log = read_training_log(tmp_path)
    np.testing.assert_array_equal(log.dice, [[0.2, np.nan], [0.4, 5e-05]])
    np.testing.assert_allclose(log.mean_dice, [0.2, 0.200025])
    assert log.start_dice == 0.125
    assert log.seconds_per_epoch == 5.5


def test_after_a_resume_the_later_log_wins_and_an_unfinished_epoch_does_not_count(tmp_path):
    (tmp_path / "training_log_2026_1_1_00_00_00.txt").write_text(LOG)
    (tmp_path / "training_log_2026_1_1_00_00_09.txt").write_text(
        "2026-01-01 00:00:09.000001: Epoch 1\n2026-01-01 00:00:09.000002: Pseudo dice [0.6, 0.8]\n"
        "2026-01-01 00:00:09.000003: Epoch time: 2.5 s\n2026-01-01 00:00:09.000004: Epoch 2\n"
        "2026-01-01 00:00:09.000005: Pseudo dice [1.0, 1.0]\n")
    log = read_training_log(tmp_path)
    np.testing.assert_array_equal(log.dice, [[0.2, np.nan], [0.6, 0.8]])
    assert log.seconds.tolist() == [9.5, 2.5]


def test_stages_are_the_epochs_at_which_the_trained_groups_change(tmp_path):
    lines = ["2026-01-01 00:00:00.1: Pseudo dice [0.5]", "2026-01-01 00:00:00.1: Epoch time: 1.0 s"]
    opened = ["head ", "head ", "head, decoder.0 ", "head, decoder.0, stem "]
    (tmp_path / "training_log_1.txt").write_text("\n".join(
        f"2026-01-01 00:00:00.1: Epoch {epoch}\n2026-01-01 00:00:00.1: Trained groups: {groups}\n" + "\n".join(
            lines if epoch < 3 else []) for epoch, groups in enumerate(opened)))
    assert read_training_log(tmp_path).stages == ((0, ("head",)), (2, ("head", "decoder.0")))  # epoch 3 did not finish


def test_a_folder_without_a_finished_epoch_is_refused(tmp_path):
    with pytest.raises(ConfigurationError, match="no training_log"):
        read_training_log(tmp_path)


@pytest.mark.parametrize("line", ["Pseudo dice [.]", "Pseudo dice [0.1]", "Pseudo dice [0.1, 0.2, 0.3]", "Epoch time: . s",
                                  f"Epoch {'9' * 5000}", "Pseudo dice before training: ..."])
def test_a_damaged_line_is_left_out_or_the_log_is_refused(tmp_path, line):
    (tmp_path / "training_log_1.txt").write_text(f"{LOG}2026-01-01 00:00:00.1: {line}\n")
    try:
        log = read_training_log(tmp_path)
    except ConfigurationError as error:
        assert "labels" in str(error)
    else:
        assert log.dice.shape == (2, 2) and log.start_dice == 0.125


def test_epochs_count_from_one_and_the_first_to_reach_the_target_counts():
    result = convergence([0.1, 0.5, 0.9, 0.6, 1.0])
    assert (result.peak, result.peak_epoch, result.target, result.epochs) == (1.0, 5, 0.85, 3)


def test_a_curve_that_starts_at_its_peak_needs_one_epoch():
    assert convergence([0.8, 0.8, 0.8]).epochs == 1


def test_a_reference_peak_makes_a_slow_curve_honest():
    slow = [0.05, 0.1, 0.1, 0.1]
    assert convergence(slow).epochs == 2
    assert convergence(slow, reference=0.8).epochs is None


def test_smoothing_keeps_a_line_a_line_and_takes_a_lucky_epoch_away():
    line = np.linspace(0, 1, 11)
    np.testing.assert_allclose(smoothed(line, window=5)[2:-2], line[2:-2])
    lucky = [0.1, 0.9, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.8, 0.8, 0.8, 0.8]
    assert convergence(lucky).epochs == 2
    assert convergence(smoothed(lucky)).epochs == 9


def test_smoothing_leaves_nan_out_and_a_window_of_one_changes_nothing():
    np.testing.assert_allclose(smoothed([0.2, np.nan, 0.4], window=3), [0.2, 0.3, 0.4])
    np.testing.assert_array_equal(smoothed([0.2, 0.7, 0.4], window=1), [0.2, 0.7, 0.4])


def test_a_curve_without_numbers_is_refused():
    with pytest.raises(ConfigurationError, match="no finite value"):
        convergence([np.nan, np.nan])
