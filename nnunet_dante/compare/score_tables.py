"""Scores against the number of training cases, by label, and what was forgotten of the donor's data."""

from __future__ import annotations

from collections.abc import Callable

from .document import MISSING, Table, Value
from .results import RunResult
from .study import Mean, Shots, Study, case_means, mean_over_cases, mean_score, missed

TITLES = {"dice": "Dice", "hd95_mm": "95 % Hausdorff distance in mm", "surface_dice": "Surface Dice"}
_OVER = ("Mean over the labels of a case, the draws, and the test cases. In brackets: 95 % bootstrap interval over the "
         "test cases (cases are resampled, not runs). Labels that neither truth nor prediction holds do not count.")
_NOTES = {
    "dice": (_OVER,),
    "hd95_mm": ("Over structures that were found; the share missed altogether, which have no distance, stands "
                "beside it. A method that misses much looks better here than it is.",),
    "surface_dice": ("The share of both surfaces that lies within the tolerance of the other.",),
}


def shots_table(study: Study, metric: str) -> Table:
    """Return a score of every method (rows) at every number of training cases (columns)."""
    def cell(runs: list[RunResult], shots: Shots) -> tuple[str, dict[str, Value]] | None:
        mean, (lost, structures) = mean_score(runs, metric), missed(runs)
        if mean is None:
            return ("all missed", {"missed": lost, "structures": structures}) if lost and metric == "hd95_mm" else None
        said = _mean(mean, digits=1 if metric == "hd95_mm" else 3)
        if metric == "hd95_mm" and lost:
            said += f", {lost / structures:.0%} missed"
        if not runs[0].is_zero_shot and mean.draws < (expected := study.expected_draws(shots)):
            said += f" ({mean.draws} of {expected} draws)"
        return said, _numbers(mean) | ({"missed": lost, "structures": structures} if metric == "hd95_mm" else {})

    text = TITLES[metric] + (f" at {tolerance(study)} mm" if metric == "surface_dice" else "")
    return _by_shots(study, metric, f"{text} by number of training cases", cell, _NOTES[metric])


def label_table(study: Study, shots: Shots) -> Table:
    """Return all three scores of every method (rows) for every label (columns) at one number of training cases."""
    rows, records = [], []
    for method in study.methods:
        runs, cells = study.of(method, shots), []
        for label in study.labels:
            means = {metric: mean_score(runs, metric, label) for metric in TITLES}
            lost, structures = missed(runs, label)
            cells.append(_triple(means, lost, structures))
            if runs:
                records.append({"experiment": study.name, "simulated": study.simulated, "method": method,
                                "shots": study.shots_name(shots), "label": label, "missed": lost,
                                "structures": structures,
                                **{metric: None if mean is None else mean.value for metric, mean in means.items()}})
        rows.append([method, *cells])
    return Table(name=f"labels_{study.shots_name(shots)}", rows=rows, records=records,
                 title=study.title(f"Scores by label with {study.cases_name(shots)}"),
                 head=["method", *(label.replace("_", " ") for label in study.labels)],
                 notes=[f"Dice / HD95 in mm / surface Dice at {tolerance(study)} mm; distances are over structures "
                        f"found, and the share missed is given where there is one."])


def forgetting_table(study: Study) -> Table | None:
    """Return how much Dice each method lost on the donor's own test cases; None if that was not measured."""
    def cell(runs: list[RunResult], shots: Shots) -> tuple[str, dict[str, Value]] | None:
        losses = []
        for run in runs:
            before, after = case_means(run.donor_before), case_means(run.donor_cases)
            losses.append({case: before[case] - after[case] for case in before.keys() & after.keys()})
        mean = mean_over_cases([loss for loss in losses if loss])
        return None if mean is None else (_mean(mean, digits=3, sign="+"), _numbers(mean))

    title = "Dice lost on the donor's own data by number of training cases"
    table = _by_shots(study, "forgetting", title, cell, (
        "Dice of the untouched donor minus Dice after training, on the same cases of the donor's data; positive: "
        "something was forgotten. In brackets: 95 % bootstrap interval over these cases.",), zero_shot=False)
    return table if table.records else None


def tolerance(study: Study) -> str:
    """Return the tolerance of the surface Dice in mm; several, should runs differ."""
    return " or ".join(f"{mm:g}" for mm in sorted({run.tolerance_mm for run in study.runs}))


def _by_shots(study: Study, name: str, title: str,
              cell: Callable[[list[RunResult], Shots], tuple[str, dict[str, Value]] | None],
              notes: tuple[str, ...], *, zero_shot: bool = True) -> Table:
    """Methods x shots; what takes no training is in a column "0"."""
    columns: list[Shots | None] = [*([None] if zero_shot and study.special("zero_shot") else []), *study.shots]
    rows, records = [], []
    for method in study.methods:
        row = [method]
        for shots in columns:
            runs = study.of(method, shots)
            fits = bool(runs) and runs[0].is_zero_shot == (shots is None)
            found = cell(runs, shots or (False, 0)) if fits else None
            row.append(MISSING if found is None else found[0])
            if found is not None:
                records.append({"experiment": study.name, "simulated": study.simulated, "method": method,
                                "shots": "0" if shots is None else study.shots_name(shots), **found[1]})
        if zero_shot or any(text != MISSING for text in row[1:]):
            rows.append(row)
    names = ["0" if shots is None else study.shots_name(shots) for shots in columns]
    return Table(name=name, title=study.title(title), head=["method", *names], rows=rows, records=records, notes=notes)


def _mean(mean: Mean, *, digits: int, sign: str = "") -> str:
    low, high = mean.interval
    said = f"{mean.value:{sign}.{digits}f}"
    return said if low != low else f"{said} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def _numbers(mean: Mean) -> dict[str, Value]:
    return {"mean": mean.value, "low": mean.interval[0], "high": mean.interval[1], "cases": mean.cases,
            "draws": mean.draws}


def _triple(means: dict[str, Mean | None], lost: int, structures: int) -> str:
    dice, distance, surface = (means[metric] for metric in TITLES)
    if dice is None:
        return MISSING
    far = "missed" if distance is None else f"{distance.value:.1f}"
    said = f"{dice.value:.3f} / {far} / {'-' if surface is None else f'{surface.value:.3f}'}"
    return f"{said} ({lost / structures:.0%} missed)" if lost and distance is not None else said
