"""training_log.py: facts from a checkpoint, and epochs and seconds to 85 % of a peak, by hand."""

from __future__ import annotations

import math

import folds
import numpy as np
import pytest
import synthetic

from nnunet_dante.compare.training_log import ema, fewer, median, peak, reached, training_facts
from nnunet_dante.errors import ResultError

NAN, INF = math.nan, math.inf


def run(method="LoRA", curve=(0.5, 0.8, 0.9), start=0.1, seed=0, shots=2):
    seconds = [2.0] + [1.0] * (len(curve) - 1)
    return synthetic.result(method, shots, seed, curve=list(curve), seconds=seconds, start_dice=start)


def test_epochs_are_counted_from_one_and_seconds_added_up():
    found = reached(run(), 0.9)
    assert (found.epochs, found.seconds) == (2, 3.0)  # 0.765 is reached by 0.8


def test_a_start_that_is_good_enough_needs_no_epoch_and_a_curve_that_never_gets_there_infinitely_many():
    assert reached(run(start=0.8), 0.9).epochs == 0 == reached(run(start=0.8), 0.9).seconds
    assert reached(run(), 1.5).epochs == INF == reached(run(), 1.5).seconds
    assert reached(run(start=None), 0.5).epochs == 1


def test_a_peak_of_nothing_cannot_be_reached_in_any_sense():
    assert math.isnan(reached(run(), 0.0).epochs) and math.isnan(reached(run(), NAN).epochs)
    assert math.isnan(peak(None)) and math.isnan(peak(run(curve=(NAN, NAN))))


def test_the_moving_average_is_nnunets():
    assert ema([0.5, 0.8, 0.9]) == pytest.approx([0.5, 0.9 * 0.5 + 0.08, 0.9 * 0.53 + 0.09])
    assert ema([NAN, 0.5, NAN, 0.6]) == pytest.approx([NAN, 0.5, 0.5, 0.51], nan_ok=True)
    assert peak(run(), curve="ema") == pytest.approx(0.567)
    assert reached(run(), 0.567, curve="ema").epochs == 1  # 0.482 is reached by the first value


def test_fewer_epochs_are_counted_against_the_scratch_run():
    scratch = run("scratch", curve=(0.1, 0.2, 0.3, 0.6, 0.8), start=0.0)  # 0.68 at epoch 5
    assert fewer(run(), scratch, to="scratch") == pytest.approx(100 * (1 - 2 / 5))
    assert fewer(run(curve=(0.1, 0.2, 0.3)), scratch, to="scratch") == -INF
    assert fewer(run(curve=(0.1, 0.2, 0.3)), scratch, to="own") == pytest.approx(100 * (1 - 3 / 5))
    assert math.isnan(fewer(run(), None, to="own"))
    assert fewer(scratch, scratch, to="scratch") == 0


def test_never_counts_as_the_worst_in_a_median_and_what_is_not_known_not_at_all():
    assert median([1, INF, 3]) == 3 and median([1, INF]) == INF and median([INF, INF]) == INF
    assert median([NAN, 2, 4]) == 3 and math.isnan(median([NAN]))
    assert median([-INF, 20, 40]) == 20 and median([-INF, 20]) == -INF


def test_curve_and_seconds_are_read_from_nnunets_own_logging():
    logging = folds.logging([0.2] * 12)  # twelve epochs: no matter how files are named or sorted
    logging["dice_per_class_or_region"][10] = [np.float32(0.4), np.float64(0.8)]
    logging["dice_per_class_or_region"][11] = [NAN, NAN]
    facts = training_facts({"logging": logging})
    assert facts["curve"] == pytest.approx([0.2] * 10 + [0.6, NAN], nan_ok=True) and facts["seconds"] == [2.0] * 12
    assert (facts["start_dice"], facts["stages"], facts["trained_parameters"]) == (None, (), None)


def test_an_epoch_that_only_began_does_not_count():
    logging = folds.logging([0.1, 0.2])
    logging["epoch_start_timestamps"].append(110.0)
    assert len(training_facts({"logging": logging})["seconds"]) == 2
    assert training_facts({})["curve"] == []


def test_start_and_stages_are_this_packages_own():
    facts = training_facts({"dante": {"start_dice": {"a": 0.25, "b": NAN}, "total_parameters": 70,
                                      "stages": [(0, ("head",)), (3, ("head", "decoder.0"))]}})
    assert (facts["start_dice"], facts["total_parameters"]) == (0.25, 70)
    assert facts["stages"] == ((0, ("head",)), (3, ("head", "decoder.0")))


@pytest.mark.parametrize("damage", [
    {"logging": []}, {"logging": [1]}, {"logging": {"dice_per_class_or_region": 3}}, {"dante": 7},
    {"logging": {"dice_per_class_or_region": [["high"]]}}, {"logging": {"epoch_end_timestamps": [None]}},
    {"dante": {"stages": [3]}}, {"dante": {"start_dice": [1]}}, {"dante": {"start_dice": {"a": "b"}}}])
def test_a_damaged_record_is_an_error_by_name_or_empty(damage):
    try:
        assert training_facts(damage)["curve"] == []
    except ResultError as error:
        assert "record of its training is damaged" in str(error)
