"""The tables of a report: scores by number of training cases and by label, speed, cost, and statistical tests."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from ..files import csv_text
from .results import RunResult
from .statistics import PairedTest, holm, paired_test
from .study import Mean, Shots, Study, case_means, mean_over_cases, mean_score, missed, over_draws
from .training_log import CURVES, SHARE, fewer, median, peak, reached

Value: TypeAlias = str | int | float | bool | None
Cell: TypeAlias = tuple[str, dict[str, Value]]
MISSING, UNDEFINED = "-", "not defined"
LEVEL = 0.05
TITLES = {"dice": "Dice", "hd95_mm": "95 % Hausdorff distance in mm", "surface_dice": "Surface Dice"}
_NOTES = {
    "dice": "Mean over the labels of a case, and over the test cases. In brackets: 95 % bootstrap interval over "
            "the test cases (cases are resampled, not runs). A label that is neither in the truth nor in the "
            "prediction does not count; a score is not defined if no label counts.",
    "hd95_mm": "Mean over the structures that were found. A missed structure has no distance; the share of missed "
               "structures stands beside the mean. A method that misses many structures looks better here than it is.",
    "surface_dice": "The share of both surfaces that lies within the tolerance of the other surface."}
_TARGETS = {"scratch": "scratch's peak", "own": "own peak"}


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table as text for people (head, rows), and the same as numbers for programs (records).

    name: name of its CSV file.
    title: what it shows, and of which data.
    notes: how to read it.
    """

    name: str
    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    records: Sequence[Mapping[str, Value]]
    notes: Sequence[str] = ()


def as_csv(table: Table) -> str:
    """Return a table's records as CSV with a header; undefined values are empty."""
    return csv_text(table.records)


def shots_table(study: Study, metric: str) -> Table:
    """Return the table of one score: methods are rows, numbers of training cases are columns."""
    def cell(runs: list[RunResult], shots: Shots) -> Cell:
        mean, (lost, structures) = mean_score(runs, metric), missed(runs)
        counts: dict[str, Value] = {"missed": lost, "structures": structures} if metric == "hd95_mm" else {}
        if mean is None:
            return "all missed" if lost and counts else UNDEFINED, counts
        said = mean_text(mean, digits=1 if metric == "hd95_mm" else 3)
        if lost and counts:
            said += f", {lost / structures:.0%} missed"
        if not runs[0].is_zero_shot and mean.draws < (expected := study.expected_draws(shots)):
            said += f" ({mean.draws} of {expected} runs)"
        return said, _numbers(mean) | counts

    text = TITLES[metric] + (f" at {tolerance(study)} mm" if metric == "surface_dice" else "")
    return by_shots(study, metric, f"{text} by number of training cases", cell, _NOTES[metric])


def strength_table(study: Study) -> Table | None:
    """Return the Dice with all that was learned and with what was kept of it; None where nothing was chosen."""
    def cell(runs: list[RunResult], shots: Shots) -> Cell | None:
        chosen = [run for run in runs if run.strength is not None]
        mean, full = mean_score(chosen), mean_score([run.at_full_strength for run in chosen])
        if mean is None or full is None:
            return None
        share = sum(run.strength or 0.0 for run in chosen) / len(chosen)
        return (f"{full.value:.3f} to {mean.value:.3f} ({share:.0%})",
                {"strength": share, "all": full.value, "kept": mean.value, "draws": len(chosen)})

    table = by_shots(study, "strength", "Dice with all that was learned, and with what was kept of it", cell,
                      "Dice at full strength, to Dice at the strength that was chosen on unseen cases; a little too "
                      "good if these are the test cases. In brackets: the mean share of what was learned that is kept.",
                      zero_shot=False)
    return table if table.records else None


def forgetting_table(study: Study) -> Table | None:
    """Return the table of the Dice that each method lost on the donor's own test cases; None if it was not measured."""
    def cell(runs: list[RunResult], shots: Shots) -> Cell | None:
        mean, full = _forgotten(runs), _forgotten([run.at_full_strength for run in runs])
        if mean is None or full is None:
            return None
        if not any(run.full_strength for run in runs):
            return mean_text(mean, digits=3, sign="+"), _numbers(mean)
        return (f"{mean_text(mean, digits=3, sign='+')}; all: {full.value:+.3f}",
                _numbers(mean) | {"full_strength": full.value})

    table = by_shots(study, "forgetting", "Dice lost on the donor's own data by number of training cases", cell,
                      "Dice of the donor before training minus Dice after training, on the same cases of the donor's "
                      "data; a positive number is a loss. In brackets: 95 % bootstrap interval over these cases. "
                      "\"all\": with all that was learned, if less was kept.", zero_shot=False)
    return table if table.records else None


def _forgotten(runs: Sequence[RunResult]) -> Mean | None:
    """Return by how much the Dice on the donor's own cases fell."""
    losses = []
    for run in runs:
        before, after = case_means(run.donor_before), case_means(run.donor_cases)
        losses.append({case: before[case] - after[case] for case in before.keys() & after.keys()})
    return mean_over_cases([loss for loss in losses if loss])


def by_shots(study: Study, name: str, title: str, cell: Callable[[list[RunResult], Shots], Cell | None], note: str, *,
              zero_shot: bool = True) -> Table:
    """Return a table: methods are rows, numbers of training cases are columns; zero-shot has the column "0".

    cell: returns the text and the numbers of a cell from its runs, or None if it is empty.
    """
    columns: list[Shots | None] = [*([None] if zero_shot and study.references["zero_shot"] else []), *study.shots]
    names = ["0" if shots is None else study.shots_name(shots) for shots in columns]
    rows, records = [], []
    for method in study.methods:
        row = [method]
        for shots, column in zip(columns, names):
            runs = study.of(method, shots)
            fits = bool(runs) and runs[0].is_zero_shot == (shots is None)
            said, numbers = (cell(runs, shots or (False, 0)) if fits else None) or (MISSING, {})
            row.append(said)
            if numbers:
                records.append(_record(study, method) | {"shots": column} | numbers)
        if zero_shot or any(text != MISSING for text in row[1:]):
            rows.append(row)
    return Table(name=name, title=study.title(title), head=["method", *names], rows=rows, records=records, notes=[note])


def label_table(study: Study, shots: Shots) -> Table:
    """Return the table of all three scores at one number of training cases: methods are rows, labels are columns."""
    rows, records = [], []
    for method in study.methods:
        runs, cells = study.of(method, shots), []
        for label in study.labels:
            means = {metric: mean_score(runs, metric, label) for metric in TITLES}
            lost, structures = missed(runs, label)
            cells.append(_triple(means, lost, structures) if runs else MISSING)
            if runs:
                records.append(_record(study, method) | {
                    "shots": study.shots_name(shots), "label": label, "missed": lost, "structures": structures,
                    **{metric: None if mean is None else mean.value for metric, mean in means.items()}})
        rows.append([method, *cells])
    return Table(name=f"labels_{study.shots_name(shots)}", rows=rows, records=records,
                 title=study.title(f"Scores by label with {study.cases_name(shots)}"),
                 head=["method", *(label.replace("_", " ") for label in study.labels)],
                 notes=[f"Dice / HD95 in mm / surface Dice at {tolerance(study)} mm; distances are over the "
                        f"structures that were found, and the share of missed structures is given if there are any."])


def tolerance(study: Study) -> str:
    """Return the tolerance of the surface Dice in mm, or all tolerances if the runs differ."""
    return " or ".join(f"{mm:g}" for mm in sorted({run.tolerance_mm for run in study.runs}))


def speed_table(study: Study, shots: Shots | None = None) -> Table:
    """Return the table of speed: start, peak, and epochs and seconds to a share of two peaks, as medians over runs.

    shots: number of training cases of the runs that count; None: all runs count.
    """
    rows, records = [], []
    for method in study.methods:
        runs = [run for run in study.of(method, shots) if run.curve]
        if not runs:
            continue
        facts = _speed(study, runs)
        records.append(_record(study, method) | {
            "runs": len(runs), "shots": "any" if shots is None else study.shots_name(shots), **facts})
        rows.append([method, _number(facts["start_dice"]), _number(facts["peak"]),
                     *(text for to in _TARGETS for text in _cells(facts, to, len(runs)))])
    where = "all numbers of training cases" if shots is None else study.cases_name(shots)
    return Table(
        name="speed" if shots is None else f"speed_{study.shots_name(shots)}", rows=rows, records=records,
        title=study.title(f"Epochs and seconds to {SHARE:.0%} of a peak, {where}"),
        head=["method", "pseudo Dice before training", "peak pseudo Dice",
              *(f"{what} to {SHARE:.0%} of {name}" for name in _TARGETS.values()
                for what in ("epochs", "seconds", "fewer epochs than scratch"))],
        notes=[f"Median over the runs, on the raw curve; in brackets: on nnU-Net's moving average, if it differs. "
               f"\"{MISSING}\": not defined. \"never\": infinitely late in the median; the number of these runs stands "
               "behind it. 0 epochs: the score before training already reached the target. Fewer epochs: each run is "
               "compared with the scratch run with the same training cases and seed. A run with a low peak reaches a "
               "share of its own peak quickly. If scratch hardly learned, its peak says little.",
               "nnU-Net computes the pseudo Dice on a few random patches of the preprocessed validation cases."])


def _speed(study: Study, runs: Sequence[RunResult]) -> dict[str, Any]:
    partners = [study.partner(run, study.references["scratch"]) for run in runs]
    facts: dict[str, Any] = {
        "start_dice": median([math.nan if run.start_dice is None else run.start_dice for run in runs]),
        "peak": median([peak(run) for run in runs])}
    for to in _TARGETS:
        for curve in CURVES:
            found = [reached(run, peak(partner if to == "scratch" else run, curve=curve), curve=curve)
                     for run, partner in zip(runs, partners)]
            facts |= {f"epochs_{to}_{curve}": median([f.epochs for f in found]),
                      f"seconds_{to}_{curve}": median([f.seconds for f in found]),
                      f"never_{to}_{curve}": sum(math.isinf(f.epochs) for f in found),
                      f"fewer_{to}_{curve}": median([fewer(run, partner, to=to, curve=curve)
                                                     for run, partner in zip(runs, partners)])}
    return facts


def _cells(facts: Mapping[str, Any], to: str, runs: int) -> list[str]:
    never = [facts[f"never_{to}_{curve}"] for curve in CURVES]
    cells = [_both(facts, f"{what}_{to}", ".3g") for what in ("epochs", "seconds")]
    if any(never):
        cells[0] += f", never: {never[0]} ({never[1]}) of {runs}"
    return [*cells, _both(facts, f"fewer_{to}", ".0f", " %")]


def _both(facts: Mapping[str, Any], name: str, form: str, unit: str = "") -> str:
    raw, smooth = (_number(facts[f"{name}_{curve}"], form, unit) for curve in CURVES)
    return raw if raw == smooth else f"{raw} ({smooth})"


def _number(value: float, form: str = ".3f", unit: str = "") -> str:
    if math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "never"
    form = ",.0f" if form == ".3g" and value >= 1000 else form  # no exponents
    return f"{value:{form}}{unit}"


def cost_table(study: Study) -> Table:
    """Return the table of costs, as medians over the runs of each trained method; unknown costs are left out."""
    full = study.references["full_fine_tuning"]
    columns: dict[str, tuple[str, str, Callable[[RunResult], float]]] = {
        "trained_parameters": ("trained parameters", ",.0f", lambda run: _known(run.trained_parameters)),
        "trained_share": ("share of the network", ".2%", lambda run: (
            _known(run.trained_parameters) / (run.total_parameters or math.nan))),
        "adapter_mib": ("adapter file, MiB", ".2f", lambda run: _known(run.adapter_mib)),
        "peak_memory_mib": ("peak memory, MiB", ",.0f", lambda run: _known(run.peak_memory_mib)),
        "seconds_per_epoch": ("seconds per epoch", ".3g", lambda run: median(run.seconds))}
    if full:
        columns["relative_seconds"] = (f"time relative to {full}", ".2f",
                                       lambda run: _relative_seconds(run, study.partner(run, full)))
    rows, records = [], []
    for method in study.methods:
        runs = [run for run in study.of(method) if not run.is_zero_shot]
        facts = {name: median([value(run) for run in runs]) for name, (_, _, value) in columns.items()}
        if all(map(math.isnan, facts.values())):
            continue
        total = median([_known(run.total_parameters) for run in runs])
        records.append(_record(study, method) | {"runs": len(runs), "total_parameters": total, **facts})
        rows.append([method, *(_number(facts[name], form) for name, (_, form, _) in columns.items())])
    return Table(
        name="cost", title=study.title("Cost of training"), rows=rows, records=records,
        head=["method", *(title for title, _, _ in columns.values())],
        notes=["Median over the runs. The time of an epoch is the median over the epochs of a run."
               + (" The relative time compares a run with the run of full fine-tuning with the same training cases and "
                  "seed on the same machine." if full else "")])


def _known(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _relative_seconds(run: RunResult, full: RunResult | None) -> float:
    if full is None or run.machine != full.machine:
        return math.nan
    return median(run.seconds) / (median(full.seconds) or math.nan)


def significance_table(study: Study, reference: str) -> Table:
    """Return the table of tests of every method against `reference`, at every number of training cases.

    These are Wilcoxon signed-rank tests. The pairs are test cases, each with its mean Dice over labels and draws.
    Holm's correction counts all tests of the table.
    """
    def dice(method: str, shots: Shots) -> dict[str, float]:
        return over_draws([case_means(run.cases) for run in study.of(method, shots)])

    tests: dict[tuple[str, Shots], PairedTest] = {}
    for shots in study.shots:
        theirs = dice(reference, shots)
        for method in study.methods:
            if method != reference and (found := paired_test(dice(method, shots), theirs)):
                tests[method, shots] = found
    corrected = dict(zip(tests, holm([test.p for test in tests.values()])))
    methods = [m for m in study.methods if any((m, shots) in tests for shots in study.shots)]
    rows = [[m, *(_tested(tests.get((m, s)), corrected.get((m, s), 1.0)) for s in study.shots)] for m in methods]
    records = [_record(study, method) | {
        "reference": reference, "shots": study.shots_name(shots), "difference": test.difference, "better": test.better,
        "cases": test.cases, "different": test.different, "p": test.p, "p_holm": corrected[method, shots]}
        for (method, shots), test in tests.items()]
    return Table(name=f"against_{reference}", title=study.title(f"Difference in Dice from {reference}"),
                 head=["method", *map(study.shots_name, study.shots)], rows=rows, records=records,
                 notes=[f"Mean difference, cases better of all cases, p after Holm's correction; † below {LEVEL}. "
                        "Two-sided Wilcoxon signed-rank test over the test cases, each with its mean Dice over labels"
                        + (" and draws. All draws have the same test cases, so their mean counts, and not each draw."
                           if study.repeated else "."), *_power(list(tests.values()))])


def _tested(test: PairedTest | None, p: float) -> str:
    if test is None:
        return MISSING
    number = f"p {p:.3f}" if p >= 0.001 else "p < 0.001"
    return f"{test.difference:+.3f}, {test.better}/{test.cases}, {number}{' †' if p < LEVEL else ''}"


def _power(tests: list[PairedTest]) -> list[str]:
    """Return a note that says whether the number of cases is large enough for significance."""
    if not tests:
        return []
    low, high = (pick(test.different for test in tests) for pick in (min, max))
    best = min(test.smallest_p for test in tests)
    said = (f"Only cases with different scores count: {low if low == high else f'{low} to {high}'} per test here. The "
            f"smallest possible p is {best:.2g}, and {min(1, best * len(tests)):.2g} where Holm multiplies by all "
            f"{len(tests)} tests.")
    if best >= LEVEL:
        return [f"{said} No difference can be significant here: there are too few cases to tell."]
    if any(test.smallest_p * len(tests) >= LEVEL for test in tests):
        return [f"{said} With so few cases, a real difference can stay without a †: a missing † says nothing."]
    return [f"{said} A missing † is no proof that two methods are equal."]


def _record(study: Study, method: str) -> dict[str, Value]:
    return {"experiment": study.name, "simulated": study.simulated, "method": method}


def mean_text(mean: Mean, *, digits: int, sign: str = "") -> str:
    """Return a mean with its interval, as tables show it."""
    low, high = mean.interval
    said = f"{mean.value:{sign}.{digits}f}"
    return said if low != low else f"{said} [{low:{sign}.{digits}f}, {high:{sign}.{digits}f}]"


def _numbers(mean: Mean) -> dict[str, Value]:
    return {"mean": mean.value, "low": mean.interval[0], "high": mean.interval[1], "cases": mean.cases,
            "draws": mean.draws}


def _triple(means: Mapping[str, Mean | None], lost: int, structures: int) -> str:
    dice, distance, surface = (means[metric] for metric in TITLES)
    if dice is None:
        return UNDEFINED
    far = "missed" if distance is None else f"{distance.value:.1f}"
    said = f"{dice.value:.3f} / {far} / {MISSING if surface is None else f'{surface.value:.3f}'}"
    return f"{said} ({lost / structures:.0%} missed)" if lost and distance is not None else said
