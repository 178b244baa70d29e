"""evidence.py: rows for programs."""

from __future__ import annotations

import json

import pytest
import synthetic

from nnunet_dante.compare.evidence import evidence_rows
from nnunet_dante.compare.study import mean_score


def test_one_row_for_each_experiment_shots_and_trained_method_with_its_baselines():
    results = synthetic.results(shots=(1, 4))
    rows = evidence_rows(results)
    assert len(rows) == 2 * 12
    row = next(r for r in rows if r["method"] == "LoRA" and r["shots"] == 4)
    runs = {m: [r for r in results if r.method == m and r.shots in (0, 4)] for m in ("LoRA", "scratch", "zero-shot")}
    assert row["dice"] == pytest.approx(mean_score(runs["LoRA"]).value)
    assert row["scratch"] == pytest.approx(mean_score(runs["scratch"]).value)
    assert row["zero_shot"] == pytest.approx(mean_score(runs["zero-shot"]).value)
    assert row["dice_interval"][0] < row["dice"] < row["dice_interval"][1]
    assert (row["experiment"], row["simulated"], row["draws"], row["cases"]) == ("virtual scanner", True, 3, 13)
    json.dumps(rows, allow_nan=False)


def test_without_baselines_they_are_none():
    (row,) = evidence_rows([synthetic.result("LoRA", 2, 0)])
    assert row["scratch"] is None and row["zero_shot"] is None
