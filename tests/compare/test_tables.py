"""tables.py: cells and records against hand computations."""

from __future__ import annotations

import csv
import io
import math

import numpy as np
import pytest
import synthetic

from nnunet_dante.compare.study import Study, studies
from nnunet_dante.compare.tables import (
    Table,
    as_csv,
    cost_table,
    forgetting_table,
    label_table,
    shots_table,
    significance_table,
    speed_table,
    strength_table,
)

INF = math.inf


def cases(dice: float, number: int = 2) -> dict:
    """`number` cases, the n-th one 0.1 n better, with one label "l" that is 10 mm off."""
    return {f"c{n}": {"l": {"dice": dice + 0.1 * n, "hd95_mm": 10.0, "surface_dice": 0.5}}
            for n in range(number)}


def one(*results) -> Study:
    (study,) = studies(results)
    return study


def row(table, method: str) -> dict[str, str]:
    return next(dict(zip(table.head, cells)) for cells in table.rows if cells[0] == method)


def test_dice_stands_in_the_column_of_its_training_cases_zero_shot_under_0_and_gaps_are_marked():
    table = shots_table(one(
        synthetic.result("zero-shot", 0, 0, cases=cases(0.2)), synthetic.result("LoRA", 2, 0, cases=cases(0.5)),
        synthetic.result("LoRA", 2, 1, cases=cases(0.6)), synthetic.result("head", 4, 0, cases=cases(0.3))), "dice")
    assert table.head == ["method", "0", "2", "4"]
    assert row(table, "LoRA") == {"method": "LoRA", "0": "-", "2": "0.600 [0.550, 0.650]", "4": "-"}
    assert row(table, "zero-shot")["0"] == "0.250 [0.200, 0.300]" and row(table, "zero-shot")["2"] == "-"
    assert "simulated images" in table.title and "cases are resampled, not runs" in " ".join(table.notes)
    record = next(r for r in table.records if r["method"] == "LoRA")
    assert (record["shots"], record["cases"], record["draws"]) == ("2", 2, 2)
    assert record["mean"] == pytest.approx(0.6)


def test_fewer_draws_than_other_methods_have_are_said():
    table = shots_table(one(synthetic.result("LoRA", 2, 0), synthetic.result("LoRA", 2, 1),
                            synthetic.result("head", 2, 0), synthetic.result("head", 2, 1, error="stopped"),
                            synthetic.result("LoRA", 40, 0, all=True)), "dice")
    assert row(table, "head")["2"].endswith("(1 of 2 runs)")
    assert not row(table, "LoRA")["all (40)"].endswith("runs)")


def test_distances_are_over_found_structures_and_the_missed_share_stands_beside_them():
    found, lost = cases(0.5), {case: {"l": {"dice": 0.0, "hd95_mm": INF, "surface_dice": 0.0}} for case in ("c0", "c1")}
    table = shots_table(one(synthetic.result("LoRA", 2, 0, cases={"c0": found["c0"], "c1": lost["c1"]}),
                            synthetic.result("head", 2, 0, cases=lost)), "hd95_mm")
    assert row(table, "LoRA")["2"] == "10.0, 50% missed"
    assert row(table, "head")["2"] == "all missed"
    assert (table.records[0]["missed"], table.records[0]["structures"]) == (1, 2)


def test_labels_have_all_three_scores_or_say_missed():
    scores = {"c": {"liver": {"dice": 0.91234, "hd95_mm": 3.26, "surface_dice": 0.8},
                    "small_vessel": {"dice": 0.0, "hd95_mm": INF, "surface_dice": 0.0}}}
    table = label_table(one(synthetic.result("LoRA", 1, 0, cases=scores)), (False, 1))
    assert table.head == ["method", "liver", "small vessel"]
    assert table.rows == [["LoRA", "0.912 / 3.3 / 0.800", "0.000 / missed / 0.000"]]
    assert "with 1 training case " in table.title


def test_what_was_forgotten_is_before_minus_after_on_the_same_cases():
    result = synthetic.result("LoRA", 2, 0, donor_before=cases(0.8), donor_cases=cases(0.7))
    table = forgetting_table(one(result, synthetic.result("scratch", 2, 0)))
    assert table.rows == [["LoRA", "+0.100 [+0.100, +0.100]"]]
    assert forgetting_table(one(synthetic.result("scratch", 2, 0))) is None


def test_what_was_kept_stands_beside_all_that_was_learned():
    kept = {"cases": cases(0.8), "strength": 0.2, "full_strength": {"cases": cases(0.6), "donor_cases": cases(0.5)}}
    donor = {"donor_before": cases(0.9), "donor_cases": cases(0.85)}
    study = one(synthetic.result("LoRA", 2, 0, **kept, **donor),
                synthetic.result("LoRA", 2, 1, cases=cases(0.7), strength=1.0, **donor), synthetic.result("scratch", 2, 0))
    table = strength_table(study)
    assert table.rows == [["LoRA", "0.700 to 0.800 (60%)"]]
    assert table.records[0]["all"] == pytest.approx(0.7) and table.records[0]["draws"] == 2
    assert forgetting_table(study).rows == [["LoRA", "+0.050 [+0.050, +0.050]; all: +0.225"]]
    assert strength_table(one(synthetic.result("scratch", 2, 0))) is None


def test_cost_is_the_median_over_runs_and_time_is_relative_to_the_partner_on_the_same_machine():
    results = [synthetic.result("full", 2, seed, seconds=[9.0, 2.0, 2.0]) for seed in (0, 1)]
    results += [synthetic.result("LoRA", 2, 0, seconds=[9.0, 1.0, 1.0], adapter_mib=3.0),
                synthetic.result("LoRA", 2, 1, seconds=[9.0, 3.0, 3.0], adapter_mib=5.0, machine="other")]
    table = cost_table(one(*results, synthetic.result("zero-shot", 0, 0)))
    assert row(table, "LoRA") == {
        "method": "LoRA", "trained parameters": "120,000", "share of the network": "6.00%", "adapter file, MiB": "4.00",
        "peak memory, MiB": "924", "seconds per epoch": "2", "time relative to full": "0.50"}
    assert [r["method"] for r in table.records] == ["full", "LoRA"]


def test_differences_are_paired_by_case_and_corrected_for_all_tests_of_the_table():
    better = {f"c{n}": {"l": {"dice": 0.5 + 0.01 * (n + 1)}} for n in range(8)}
    same = {f"c{n}": {"l": {"dice": 0.5}} for n in range(8)}
    study = one(synthetic.result("full", 2, 0, cases=same), synthetic.result("LoRA", 2, 0, cases=better),
                synthetic.result("head", 2, 0, cases=same))
    table = significance_table(study, "full")
    assert row(table, "LoRA")["2"] == "+0.045, 8/8, p 0.016 †"  # 2 x 2 / 2**8
    assert row(table, "head")["2"] == "+0.000, 0/8, p 1.000"
    assert {r["method"]: r["p"] for r in table.records}["LoRA"] == pytest.approx(2 / 2**8)


@pytest.mark.parametrize(("number", "said"), [(5, "there are too few cases to tell"), (7, "With so few cases"),
                                              (13, "no proof that two methods are equal")])
def test_too_few_cases_to_reach_significance_are_said(number, said):
    study = studies(synthetic.results(number=number, shots=(2,)))[0]
    table = significance_table(study, "full")
    assert said in table.notes[1] and f"count: {number} per test" in table.notes[1]


def test_every_table_of_a_whole_protocol_agrees_with_numpy():
    results = synthetic.results()
    (study,) = studies(results)
    table = shots_table(study, "dice")
    for record in table.records:
        runs = [r for r in results if r.method == record["method"] and str(r.shots) == record["shots"]]
        dice = np.array([[[label["dice"] for label in case.values()] for case in r.cases.values()] for r in runs])
        assert record["mean"] == pytest.approx(dice.mean())
    assert len(table.records) == 1 + 12 * len(synthetic.SHOTS)


def test_cases_that_tie_do_not_make_significance_look_within_reach():
    """Ten cases, of which two differ: no p below 0.5 is possible."""
    same = {f"c{n}": {"l": {"dice": 0.5}} for n in range(10)}
    other = same | {f"c{n}": {"l": {"dice": 0.9}} for n in range(2)}
    table = significance_table(one(synthetic.result("full", 2, 0, cases=same),
                                   synthetic.result("LoRA", 2, 0, cases=other)), "full")
    assert "count: 2 per test" in table.notes[1] and "possible p is 0.5," in table.notes[1]
    assert "too few cases" in table.notes[1]


def test_a_score_without_any_defined_label_is_said_to_be_not_defined():
    nowhere = {"c": {"l": {"dice": math.nan, "hd95_mm": math.nan, "surface_dice": math.nan}}}
    study = one(synthetic.result("LoRA", 2, 0, cases=nowhere))
    for metric in ("dice", "hd95_mm", "surface_dice"):
        assert shots_table(study, metric).rows == [["LoRA", "not defined"]]
    assert label_table(study, study.shots[0]).rows == [["LoRA", "not defined"]]


def test_csv_has_every_column_and_leaves_what_is_undefined_empty():
    table = Table(name="t", title="", head=[], rows=[], records=[
        {"method": "A|B", "dice": 0.5, "low": math.nan}, {"method": "C", "dice": math.inf, "more": None, "runs": 3}])
    assert list(csv.DictReader(io.StringIO(as_csv(table)))) == [
        {"method": "A|B", "dice": "0.5", "low": "", "more": "", "runs": ""},
        {"method": "C", "dice": "inf", "low": "", "more": "", "runs": "3"}]


def trained(method="LoRA", curve=(0.5, 0.8, 0.9), start=0.1, seed=0, shots=2):
    seconds = [2.0] + [1.0] * (len(curve) - 1)
    return synthetic.result(method, shots, seed, curve=list(curve), seconds=seconds, start_dice=start)


def test_each_run_is_compared_to_the_scratch_run_of_its_own_training_cases_and_seed():
    results = [trained("scratch", (0.2, 0.4), 0.0, seed=0), trained("scratch", (0.4, 0.8), 0.0, seed=1),
               trained("LoRA", (0.35, 0.5), 0.0, seed=0), trained("LoRA", (0.3, 0.7), 0.0, seed=1), trained("head", (0.1, 0.3), 0.0),
               trained("LoRA", (0.9, 0.9), 0.0, seed=2)]
    (study,) = studies(results)
    record = {r["method"]: r for r in speed_table(study).records}
    assert record["LoRA"]["epochs_scratch_raw"] == 1.5  # 1 and 2; the third has no scratch run
    assert record["LoRA"]["fewer_scratch_raw"] == pytest.approx(25)  # 50 % and 0 %
    assert (record["head"]["epochs_scratch_raw"], record["head"]["never_scratch_raw"]) == (INF, 1)
    rows = {row[0]: row for row in speed_table(study, (False, 2)).rows}
    assert rows["head"][3] == "never, never: 1 (1) of 1"
    assert rows["scratch"][3].startswith("2")


def test_without_a_scratch_run_that_half_stays_empty():
    (study,) = studies([trained()])
    (row,) = speed_table(study).rows
    assert row[3:6] == ["-", "-", "-"] and row[6] == "2 (1)"
