"""What the results say in short, for programs that suggest a method."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from .results import RunResult
from .study import mean_score, studies


def evidence_rows(results: Iterable[RunResult]) -> list[dict[str, Any]]:
    """Return one row for each experiment, number of training cases and trained method.

    Keys: experiment, simulated, shots, method, trainer, dice, dice_interval (95 % bootstrap over cases), zero_shot and
    scratch (Dice there, None if not run), draws, cases. Dice: mean over labels, draws and test cases.
    """
    rows = []
    for study in studies(results):
        zero_shot, scratch = study.special("zero_shot"), study.special("scratch")
        before = mean_score(study.of(zero_shot)) if zero_shot else None
        for shots in study.shots:
            baseline = mean_score(study.of(scratch, shots)) if scratch else None
            for method in study.methods:
                runs = study.of(method, shots)
                mean = mean_score(runs)
                if mean is None or runs[0].is_zero_shot:
                    continue
                rows.append({"experiment": study.name, "simulated": study.simulated, "shots": runs[0].shots,
                             "method": method, "trainer": runs[0].trainer, "dice": mean.value,
                             "dice_interval": list(mean.interval),
                             "zero_shot": None if before is None else before.value,
                             "scratch": None if baseline is None else baseline.value,
                             "draws": mean.draws, "cases": mean.cases})
    return rows
