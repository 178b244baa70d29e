from __future__ import annotations

import math

import pytest

from nnunet_dante.training.plateau import on_plateau


def first_stop(losses, patience):
    return next((n for n in range(len(losses) + 1) if on_plateau(losses[:n], patience=patience)), None)


def test_a_falling_loss_goes_on_and_a_flat_one_stops_as_soon_as_it_can_be_seen():
    falling = [1 - 0.001 * epoch for epoch in range(200)]
    assert first_stop(falling, 20) is None
    assert first_stop([0.5] * 100, 20) == 30
    assert first_stop([0.5] * 100, 5) == 15


def test_a_curve_that_flattens_stops_after_the_patience():
    """Falls until epoch 50, then flat: windows 20 epochs apart are both flat once 80 epochs are done."""
    losses = [1 - 0.01 * min(epoch, 50) for epoch in range(200)]
    stop = first_stop(losses, 20)
    assert 70 < stop <= 80


def test_a_rising_loss_stops_and_noise_is_averaged():
    assert first_stop([0.5 + 0.01 * e for e in range(50)], 20) == 30
    noisy = [1 - 0.002 * e + 0.05 * (-1) ** e for e in range(200)]
    assert first_stop(noisy, 20) is None


@pytest.mark.parametrize("gain", [0.0009, 0.0011])
def test_the_threshold_is_a_thousandth_over_the_patience(gain):
    losses = [1 - gain / 20 * e for e in range(100)]
    assert (first_stop(losses, 20) is None) == (gain > 1e-3)


def test_off_never_stops_and_nan_is_no_plateau():
    assert first_stop([0.5] * 100, 0) is None
    assert first_stop([math.nan] * 100, 20) is None
