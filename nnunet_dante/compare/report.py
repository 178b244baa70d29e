"""Tables for a report in Markdown; every number comes with what it is measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .runs import Run
from .training_log import convergence, smoothed


def score_table(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return Dice and 95 % Hausdorff distance (mm) of {method: scores}; the mean leaves out labels absent in both."""
    names = list(next(iter(results.values())))
    lines = [["method", *(f"{n.replace('_', ' ')}: Dice (HD95)" for n in names), "mean Dice"]]
    for method, by_label in results.items():
        dices = [by_label[n]["dice"] for n in names if by_label[n]["dice"] == by_label[n]["dice"]]
        mean = f"{sum(dices) / len(dices):.3f}" if dices else "-"
        lines.append([method, *(_scores(by_label[n]) for n in names), mean])
    return table(lines)


def cost_table(runs: Sequence[Run], *, share: float = 0.85) -> str:
    """Return convergence and cost of each run.

    Epochs are counted on the raw curve and, behind it, on the `smoothed` one; towards the run's own peak, and towards
    the highest peak of all runs, where a method that never gets far cannot look quick.
    """
    best = max(float(np.nanmax(run.log.mean_dice)) for run in runs)
    smooth_best = max(float(np.nanmax(smoothed(run.log.mean_dice))) for run in runs)
    lines = [["method", "trained parameters", "share", "before training", "peak", f"epochs to {share:.0%} of own peak",
              f"epochs to {share:.0%} of best peak", "s / epoch"]]
    for run in runs:
        raw, smooth = run.log.mean_dice, smoothed(run.log.mean_dice)
        trained = "-" if run.trained is None else f"{run.trained:,}"
        part = "-" if run.trained is None or not run.total else f"{run.trained / run.total:.1%}"
        start = "-" if run.log.start_dice is None else f"{run.log.start_dice:.3f}"
        own = [convergence(curve, fraction=share).epochs for curve in (raw, smooth)]
        common = [convergence(curve, fraction=share, reference=peak).epochs
                  for curve, peak in ((raw, best), (smooth, smooth_best))]
        lines.append([run.name, trained, part, start, f"{np.nanmax(raw):.3f}", _epochs(own), _epochs(common),
                      f"{run.log.seconds_per_epoch:.1f}"])
    return table(lines)


def _epochs(counts: Sequence[int | None]) -> str:
    raw, smooth = ("never" if n is None else str(n) for n in counts)
    return f"{raw} ({smooth})"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a Markdown table, the first one being the header."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def _scores(scores: Mapping[str, float]) -> str:
    dice, distance = scores["dice"], scores["hd95_mm"]
    if dice != dice:
        return "-"
    return f"{dice:.3f} ({'missed' if distance == float('inf') else f'{distance:.1f} mm'})"
