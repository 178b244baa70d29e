"""How many epochs and seconds a run needed to a share of a peak, and how many fewer than training from scratch.

Two targets: `share` of the peak of the scratch run with the same training cases and seed, the same height for every
method; and `share` of the run's own peak, as in the Dante paper, where a slow run with a low peak looks quick. Each on
the raw curve and on nnU-Net's moving average. 0 epochs: the score before training was there already. inf: never. nan:
cannot be said, because nothing was learned by the run whose peak it is, or no such run exists.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .document import MISSING, Table, Value
from .results import RunResult
from .study import Shots, Study
from .training_log import ema

SHARE = 0.85
CURVES = {"raw": lambda curve: np.asarray(curve, float), "ema": ema}
_TARGETS = {"scratch": "scratch's peak", "own": "own peak"}


@dataclass(frozen=True, kw_only=True)
class Reached:
    """Epochs and seconds of training until a target was first reached."""

    epochs: float
    seconds: float


def reached(run: RunResult, peak: float, *, curve: str = "raw", share: float = SHARE) -> Reached:
    """Return when a run first reached `share` of `peak`, on its "raw" curve or nnU-Net's "ema" of it."""
    if not peak > 0:
        return Reached(epochs=math.nan, seconds=math.nan)
    target = share * peak - 1e-12
    if run.start_dice is not None and run.start_dice >= target:
        return Reached(epochs=0, seconds=0)
    found = np.flatnonzero(CURVES[curve](run.curve) >= target)
    if not found.size:
        return Reached(epochs=math.inf, seconds=math.inf)
    epochs = int(found[0]) + 1
    seconds = sum(run.seconds[:epochs]) if len(run.seconds) >= epochs else math.nan
    return Reached(epochs=epochs, seconds=seconds)


def peak(run: RunResult | None, *, curve: str = "raw") -> float:
    """Return the highest value of a run's curve; nan without one."""
    values = CURVES[curve](run.curve) if run is not None else np.array([])
    return float(np.nanmax(values)) if np.isfinite(values).any() else math.nan


def fewer(run: RunResult, scratch: RunResult | None, *, to: str, curve: str = "raw") -> float:
    """Return by how many per cent a run needs fewer epochs than its scratch run; -inf if it never gets there.

    to: "scratch" for the scratch run's peak, "own" for the own peak of either.
    """
    if scratch is None:
        return math.nan
    theirs = reached(scratch, peak(scratch, curve=curve), curve=curve).epochs
    ours = reached(run, peak(scratch if to == "scratch" else run, curve=curve), curve=curve).epochs
    return 100 * (1 - ours / theirs) if theirs else math.nan


def median(values: Sequence[float]) -> float:
    """Return the median without nan; "never" (inf or -inf) counts as the worst there is, nan where nothing is left."""
    known = sorted(value for value in values if not math.isnan(value))
    if not known:
        return math.nan
    low, high = known[(len(known) - 1) // 2], known[len(known) // 2]
    return low if low == high else (low + high) / 2


def speed_table(study: Study, shots: Shots | None = None) -> Table:
    """Return start, peak, and epochs and seconds to a share of two peaks, as medians over the runs of a method.

    shots: only runs with this number of training cases; None: all runs.
    """
    scratch = study.special("scratch")
    rows, records = [], []
    for method in study.methods:
        runs = [run for run in study.of(method, shots) if run.curve]
        if not runs:
            continue
        facts = _facts(study, runs, scratch)
        records.append({"experiment": study.name, "simulated": study.simulated, "method": method, "runs": len(runs),
                        "shots": "any" if shots is None else study.shots_name(shots), **facts})
        rows.append([method, _number(facts["start_dice"]), _number(facts["peak"]),
                     *(text for to in _TARGETS for text in _cells(facts, to, len(runs)))])
    where = "all numbers of training cases" if shots is None else study.cases_name(shots)
    return Table(
        name="speed" if shots is None else f"speed_{study.shots_name(shots)}", rows=rows, records=records,
        title=study.title(f"Epochs and seconds to {SHARE:.0%} of a peak, {where}"),
        head=["method", "pseudo Dice before training", "peak pseudo Dice",
              *(f"{what} to {SHARE:.0%} of {name}" for name in _TARGETS.values()
                for what in ("epochs", "seconds", "fewer epochs than scratch"))],
        notes=[f"Median over the runs; raw curve, in brackets nnU-Net's moving average. \"{MISSING}\": not defined. "
               "\"never\" counts as infinitely late in the median, and the number of such runs stands behind it. "
               "0 epochs: the score before training was there already. Fewer epochs: each run against the scratch run "
               "with the same training cases and seed. Towards their own peak, runs with a low peak look quick; and "
               "where scratch hardly learned, its peak says little.",
               "Pseudo Dice is nnU-Net's: of a few random patches of the validation cases, in the preprocessed space."])


def _facts(study: Study, runs: Sequence[RunResult], scratch: str | None) -> dict[str, Value]:
    facts: dict[str, Value] = {
        "start_dice": median([math.nan if run.start_dice is None else run.start_dice for run in runs]),
        "peak": median([peak(run) for run in runs])}
    partners = [study.partner(run, scratch) for run in runs]
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


def _cells(facts: dict[str, Value], to: str, runs: int) -> list[str]:
    never = [facts[f"never_{to}_{curve}"] for curve in CURVES]
    cells = [_both(facts, f"{what}_{to}", ".3g") for what in ("epochs", "seconds")]
    if any(never):
        cells[0] += f", never: {never[0]} ({never[1]}) of {runs}"
    return [*cells, _both(facts, f"fewer_{to}", ".0f", "%")]


def _both(facts: dict[str, Value], name: str, form: str, unit: str = "") -> str:
    raw, smooth = (_number(facts[f"{name}_{curve}"], form, unit) for curve in CURVES)
    return raw if raw == smooth else f"{raw} ({smooth})"


def _number(value: Value, form: str = ".3f", unit: str = "") -> str:
    assert isinstance(value, int | float)
    if math.isnan(value):
        return MISSING
    if math.isinf(value):
        return "never"
    form = ",.0f" if form == ".3g" and value >= 1000 else form  # no exponents
    return f"{value:{form}}{' ' if unit else ''}{unit}"
