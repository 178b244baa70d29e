"""study.py: order, means over labels, draws and cases, and what is left out of them."""

from __future__ import annotations

import dataclasses
import math

import msgspec
import pytest
import synthetic

from nnunet_dante.compare.study import case_means, mean_score, missed, shots_of, studies
from nnunet_dante.errors import ResultError

NAN, INF = math.nan, math.inf


def cases(**dices: tuple[float, ...]) -> dict:
    """Case -> labels l0, l1, ... with these Dice; distances are 10 x (1 - Dice), infinite for 0."""
    return {case: {f"l{n}": {"dice": d, "hd95_mm": INF if d == 0 else 10 * (1 - d), "surface_dice": d}
                   for n, d in enumerate(values)} for case, values in dices.items()}


def run(method="LoRA", shots=2, seed=0, **changes):
    return synthetic.result(method, shots, seed, **changes)


def test_a_score_is_the_mean_over_labels_then_draws_then_cases():
    runs = [run(seed=0, cases=cases(a=(0.8, 0.6), b=(0.4, NAN))), run(seed=1, cases=cases(a=(0.9, 0.9), b=(0.6, 0.8)))]
    mean = mean_score(runs)
    a, b = (0.7 + 0.9) / 2, (0.4 + 0.7) / 2
    assert mean.value == pytest.approx((a + b) / 2)
    assert (mean.cases, mean.draws) == (2, 2)
    assert mean.interval == pytest.approx((b, a))  # of two cases, one quarter of the resamples is twice the same
    assert mean_score(runs, label="l1").value == pytest.approx(((0.6 + 0.9) / 2 + 0.8) / 2)


def test_undefined_labels_are_left_out_and_missed_ones_count_for_dice_but_have_no_distance():
    scores = cases(a=(0.0, 0.5), b=(NAN, NAN))
    assert case_means(scores) == {"a": 0.25}
    assert case_means(scores, "hd95_mm") == {"a": 5.0}
    assert missed([run(cases=scores)]) == (1, 2)
    assert missed([run(cases=scores)], "l1") == (0, 1)
    assert mean_score([run(cases=cases(b=(NAN, NAN)))]) is None


def test_a_case_that_one_draw_lacks_is_averaged_over_the_others():
    runs = [run(seed=0, cases=cases(a=(0.8,), b=(0.6,))), run(seed=1, cases=cases(a=(0.6,)))]
    assert mean_score(runs).value == pytest.approx((0.7 + 0.6) / 2)


def test_methods_come_references_first_and_shots_ascend_with_all_last():
    results = [run("LoRA", 4), run("head", 2), run("full", 4), run("scratch", 40, all=True), run("zero-shot", 0)]
    (study,) = studies(results)
    assert study.methods == ["zero-shot", "scratch", "full", "LoRA", "head"]
    assert [study.shots_name(shots) for shots in study.shots] == ["2", "4", "all (40)"]
    assert study.cases_name(study.shots[0]) == "2 training cases"


def test_of_several_variants_the_best_is_the_reference():
    results = [msgspec.structs.replace(run("scratch", cases=cases(a=(0.2,))), method="scratch, low rate"),
               run("scratch", cases=cases(a=(0.6,))), run("LoRA", cases=cases(a=(0.8,)))]
    (study,) = studies(results)
    assert study.references["scratch"] == "scratch" and study.variants("scratch") == ["scratch, low rate", "scratch"]
    assert study.references["zero_shot"] is None


def test_zero_shot_belongs_to_every_number_of_training_cases_and_failed_runs_to_none():
    results = [run("zero-shot", 0), run("LoRA", 2), run("LoRA", 4, error="out of memory")]
    (study,) = studies(results)
    assert study.of("zero-shot", (False, 4)) == [results[0]] and study.of("LoRA", (False, 4)) == []
    assert study.failed == (results[2],) and study.shots == [(False, 2), (False, 4)]


def test_all_cases_of_folds_of_different_size_are_one_column():
    results = [run(shots=8, seed=0, all=True), run(shots=9, seed=1, all=True)]
    (study,) = studies(results)
    assert len(study.of("LoRA", shots_of(results[0]))) == 2
    assert [study.shots_name(shots) for shots in study.shots] == ["all (8-9)"]


def test_a_draw_given_twice_is_refused():
    with pytest.raises(ResultError, match="LoRA of experiment 'virtual scanner' with 2 cases and seed 0 is given twice"):
        studies([run(), run()])


def test_with_several_donors_the_method_says_which_but_scratch_has_none():
    (study,) = studies([run(), run(donor="MR"), run("scratch", donor="MR"), run("scratch", seed=1)])
    assert study.methods == ["scratch", "LoRA from CT", "LoRA from MR"]
    assert studies(study.runs)[0].methods == study.methods


def test_experiments_stay_apart_and_simulated_ones_say_so():
    simulated, real = studies([run(), run(experiment="hospital")])
    assert simulated.title("Dice") == "Dice - virtual scanner, simulated images"
    assert real.title("Dice") == "Dice - hospital"
    assert dataclasses.replace(real, runs=(), failed=simulated.runs).simulated
