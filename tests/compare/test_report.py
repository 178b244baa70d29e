"""report.py: tables that say what they measure."""

from __future__ import annotations

import math

import numpy as np

from nnunet_dante.compare.report import cost_table, score_table, table
from nnunet_dante.compare.runs import Run
from nnunet_dante.compare.training_log import TrainingLog


def cells(text: str) -> list[list[str]]:
    return [[c.strip() for c in line.strip("|").split("|")] for line in text.splitlines() if not line.startswith("|--")]


def run(name: str, dice: list[float], *, trained: int | None = 250, start: float | None = 0.1) -> Run:
    log = TrainingLog(dice=np.array(dice)[:, None], seconds=np.full(len(dice), 1.5), start_dice=start)
    return Run(name=name, log=log, trained=trained, total=None if trained is None else 1000)


def test_a_table_is_markdown():
    assert table([["a", "b"], ["1", "2"]]) == "| a | b |\n|---|---|\n| 1 | 2 |"


def test_scores_name_missed_and_undefined_structures_and_the_mean_leaves_the_undefined_out():
    nan, inf = math.nan, math.inf
    text = score_table({
        "good": {"big_organ": {"dice": 0.9, "hd95_mm": 1.25}, "rare": {"dice": nan, "hd95_mm": nan}},
        "bad": {"big_organ": {"dice": 0.0, "hd95_mm": inf}, "rare": {"dice": nan, "hd95_mm": nan}}})
    assert cells(text) == [["method", "big organ: Dice (HD95)", "rare: Dice (HD95)", "mean Dice"],
                           ["good", "0.900 (1.2 mm)", "-", "0.900"], ["bad", "0.000 (missed)", "-", "0.000"]]


def test_costs_count_epochs_to_the_own_and_to_the_best_peak():
    slow = [0.1, 0.2, 0.2, 0.2]
    header, good, bad, stock = cells(cost_table([run("good", [0.1, 0.5, 0.8, 0.8]), run("bad", slow),
                                                 run("stock", slow, trained=None, start=None)]))
    row = dict(zip(header, good))
    assert row["share"] == "25.0%" and row["trained parameters"] == "250" and row["before training"] == "0.100"
    assert row["epochs to 85% of own peak"] == row["epochs to 85% of best peak"] == "3 (3)"
    assert dict(zip(header, bad))["epochs to 85% of own peak"].startswith("2 ")
    assert dict(zip(header, bad))["epochs to 85% of best peak"] == "never (never)"
    assert stock[1:4] == ["-", "-", "-"] and stock[-1] == "1.5"
