"""Tables for a report in Markdown; every number comes with what it is measured on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from .convergence import convergence
from .runs import Run


def score_table(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """Return Dice and 95 % Hausdorff distance (mm) of {method: scores}; the mean leaves out labels absent in both."""
    names = list(next(iter(results.values())))
    lines = [["method", *(f"{n.replace('_', ' ')}: Dice (HD95)" for n in names), "mean Dice"]]
    for method, by_label in results.items():
        dices = [by_label[n]["dice"] for n in names if by_label[n]["dice"] == by_label[n]["dice"]]
        mean = f"{sum(dices) / len(dices):.3f}" if dices else "-"
        lines.append([method, *(f"{by_label[n]['dice']:.3f} ({_mm(by_label[n]['hd95_mm'])})" for n in names), mean])
    return table(lines)


def cost_table(runs: Sequence[Run], *, share: float = 0.85) -> str:
    """Return convergence and cost of each run."""
    lines = [["method", "trained parameters", "share", "before training", "peak", f"epochs to {share:.0%} of own peak",
              "s / epoch"]]
    for run in runs:
        trained = "-" if run.trained is None else f"{run.trained:,}"
        part = "-" if run.trained is None or not run.total else f"{run.trained / run.total:.1%}"
        start = "-" if run.log.start_dice is None else f"{run.log.start_dice:.3f}"
        found = convergence(run.log.mean_dice, fraction=share)
        reached = "-" if found.epochs is None else f"{found.epochs} of {len(run.log.dice)}"
        lines.append([run.name, trained, part, start, f"{found.peak:.3f}", reached,
                      f"{run.log.seconds_per_epoch:.1f}"])
    return table(lines)


def table(rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a Markdown table, the first one being the header."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|" + "---|" * len(rows[0]), *body])


def _mm(distance: float) -> str:
    return "-" if distance != distance else "missed" if distance == float("inf") else f"{distance:.1f} mm"
