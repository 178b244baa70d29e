"""speed.py: epochs and seconds to 85 % of a peak, by hand."""

from __future__ import annotations

import math

import pytest
import synthetic

from nnunet_dante.compare.speed import fewer, median, peak, reached, speed_table
from nnunet_dante.compare.study import studies
from nnunet_dante.compare.training_log import ema

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


def test_each_run_is_compared_to_the_scratch_run_of_its_own_training_cases_and_seed():
    results = [run("scratch", (0.2, 0.4), 0.0, seed=0), run("scratch", (0.4, 0.8), 0.0, seed=1),
               run("LoRA", (0.35, 0.5), 0.0, seed=0), run("LoRA", (0.3, 0.7), 0.0, seed=1), run("head", (0.1, 0.3), 0.0),
               run("LoRA", (0.9, 0.9), 0.0, seed=2)]
    (study,) = studies(results)
    record = {r["method"]: r for r in speed_table(study).records}
    assert record["LoRA"]["epochs_scratch_raw"] == 1.5  # 1 and 2; the third has no scratch run
    assert record["LoRA"]["fewer_scratch_raw"] == pytest.approx(25)  # 50 % and 0 %
    assert (record["head"]["epochs_scratch_raw"], record["head"]["never_scratch_raw"]) == (INF, 1)
    rows = {row[0]: row for row in speed_table(study, (False, 2)).rows}
    assert rows["head"][3] == "never, never: 1 (1) of 1"
    assert rows["scratch"][3].startswith("2")


def test_without_a_scratch_run_that_half_stays_empty():
    (study,) = studies([run()])
    (row,) = speed_table(study).rows
    assert row[3:6] == ["-", "-", "-"] and row[6] == "2 (1)"
