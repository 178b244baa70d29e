"""How fast a training learned and what it cost: facts from its checkpoint, and epochs to a share of the peak.

There are two targets. One is `SHARE` of the peak of the scratch run with the same training cases and seed; it is the
same for every method. The other is `SHARE` of the run's own peak, as in the Dante paper; by it, a slow run with a low
peak looks quick. Epochs are counted on the raw curve and on nnU-Net's moving average of it. 0 epochs: the score before
training already reached the target. inf: the run never reached it. nan: not defined, because there is no such peak.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ResultError
from .results import RunResult

SHARE = 0.85


def training_facts(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a checkpoint says about its training, as fields of `RunResult`.

    curve and seconds come from nnU-Net's own logging and have one value per epoch. The others come from the entry
    "dante" that this package writes; they are unknown for checkpoints of stock nnU-Net.

    Raises:
        ResultError: the checkpoint's logging is damaged.
    """
    logging, dante = checkpoint.get("logging") or {}, checkpoint.get("dante") or {}
    try:
        dice = [np.asarray(labels, float).ravel() for labels in logging.get("dice_per_class_or_region", ())]
        ended, begun = (list(map(float, logging.get(f"epoch_{name}_timestamps", ()))) for name in ("end", "start"))
        epochs = min(len(dice), len(ended))  # an epoch that only began does not count
        stages = tuple((int(first), tuple(map(str, groups))) for first, groups in dante.get("stages") or ())
        start = _mean_defined([*map(float, (dante.get("start_dice") or {}).values())])
        kept = dante.get("strength") or {}
        strengths = [(float(strength), float(dice)) for strength, dice in kept.get("curve") or ()]
    except (AttributeError, TypeError, ValueError) as error:
        raise ResultError(f"the checkpoint's record of its training is damaged ({error}); copy it again.") from error
    return {"curve": [_mean_defined(labels) for labels in dice[:epochs]],
            "seconds": [end - begin for begin, end in zip(begun, ended[:epochs])],
            "start_dice": None if math.isnan(start) else start, "stages": stages,
            "strength": kept.get("value"), "strength_curve": strengths,
            "trained_parameters": dante.get("trainable_parameters"), "total_parameters": dante.get("total_parameters"),
            "peak_memory_mib": dante.get("peak_memory_mib")}


def _mean_defined(values: ArrayLike) -> float:
    """Return the mean of the finite values; nan if there are none."""
    defined = np.asarray(values, float)
    defined = defined[np.isfinite(defined)]
    return float(defined.mean()) if defined.size else math.nan


def ema(curve: ArrayLike) -> np.ndarray:
    """Return nnU-Net's moving average of a curve: 0.9 old + 0.1 new, starting at the first value; nan is skipped."""
    averaged: list[float] = []
    for value in np.asarray(curve, float):
        last = averaged[-1] if averaged else np.nan
        averaged.append(last if np.isnan(value) else value if np.isnan(last) else 0.9 * last + 0.1 * value)
    return np.array(averaged)


CURVES = {"raw": lambda curve: np.asarray(curve, float), "ema": ema}


@dataclass(frozen=True, kw_only=True)
class Reached:
    """Epochs and seconds of training until a target was first reached."""

    epochs: float
    seconds: float


def reached(run: RunResult, peak: float, *, curve: str = "raw") -> Reached:
    """Return when a run first reached 85 % of `peak`, on its "raw" curve or on nnU-Net's moving average, "ema"."""
    if not peak > 0:
        return Reached(epochs=math.nan, seconds=math.nan)
    target = SHARE * peak - 1e-12
    if run.start_dice is not None and run.start_dice >= target:
        return Reached(epochs=0, seconds=0)
    found = np.flatnonzero(CURVES[curve](run.curve) >= target)
    if not found.size:
        return Reached(epochs=math.inf, seconds=math.inf)
    epochs = int(found[0]) + 1
    return Reached(epochs=epochs, seconds=sum(run.seconds[:epochs]) if len(run.seconds) >= epochs else math.nan)


def peak(run: RunResult | None, *, curve: str = "raw") -> float:
    """Return the highest value of a run's curve; nan if there is no run or no value."""
    values = CURVES[curve](run.curve) if run is not None else np.array([])
    return float(np.nanmax(values)) if np.isfinite(values).any() else math.nan


def fewer(run: RunResult, scratch: RunResult | None, *, to: str, curve: str = "raw") -> float:
    """Return by how many per cent a run needs fewer epochs than its scratch run; -inf if it never reaches the target.

    to: "scratch" if both runs must reach a share of the scratch run's peak, "own" if each has its own peak.
    """
    if scratch is None:
        return math.nan
    theirs = reached(scratch, peak(scratch, curve=curve), curve=curve).epochs
    ours = reached(run, peak(scratch if to == "scratch" else run, curve=curve), curve=curve).epochs
    return 100 * (1 - ours / theirs) if theirs else math.nan


def median(values: Sequence[float]) -> float:
    """Return the median of the values that are not nan; nan if there are none. inf and -inf mean "never" and count."""
    known = sorted(value for value in values if not math.isnan(value))
    if not known:
        return math.nan
    low, high = known[(len(known) - 1) // 2], known[len(known) // 2]
    return low if low == high else (low + high) / 2
