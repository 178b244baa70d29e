"""continual.py: backward and forward transfer against hand computations."""

from __future__ import annotations

import pytest
import synthetic

from nnunet_dante.compare.continual import transfer_table
from nnunet_dante.compare.study import studies


def cases(**dice: float) -> dict:
    return {f"c{n}": {label: {"dice": value + 0.1 * n, "hd95_mm": 1.0, "surface_dice": 0.5}
                      for label, value in dice.items()} for n in range(2)}


def table(*results):
    (study,) = studies(results)
    return transfer_table(study)


def zero(**dice):
    found = cases(**dice)
    for case in found.values():
        case["new"] = {"dice": 0.0, "hd95_mm": float("inf"), "surface_dice": 0.0}
    return synthetic.result("zero-shot", 0, 0, cases=found)


def test_old_labels_are_compared_with_the_donor_and_new_ones_with_plain_fine_tuning():
    made = table(zero(old=0.7), synthetic.result("full", 4, 0, cases=cases(new=0.8)),
                 synthetic.result("full", 4, 1, cases=cases(new=0.6)),
                 synthetic.result("LoRA", 4, 0, cases=cases(old=0.68, new=0.79)),
                 synthetic.result("LoRA", 4, 1, cases=cases(old=0.72, new=0.63)))
    found = {record["method"]: (record["backward"], record["forward"]) for record in made.records}
    assert found["LoRA"] == pytest.approx((0.0, 0.01))
    assert found["full"] == pytest.approx((-0.75, 0.0))  # it has no old label any more
    assert made.head == ["method", "4"] and "Dice of old minus" in made.notes[0] and "new minus that of full" in made.notes[0]


def test_without_old_and_new_labels_there_is_no_table():
    assert table(synthetic.result("zero-shot", 0, 0, cases=cases(a=0.5)),
                 synthetic.result("full", 4, 0, cases=cases(a=0.6))) is None
    assert table(synthetic.result("full", 4, 0, cases=cases(a=0.6))) is None
