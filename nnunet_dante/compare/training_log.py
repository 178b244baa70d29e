"""How fast and at what cost a training got there, read from nnU-Net's own log."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike

from ..errors import ConfigurationError

_STAMP = r"^\S+ \S+: "
_EPOCH = re.compile(_STAMP + r"Epoch (\d{1,9})\s*$")
_DICE = re.compile(_STAMP + r"Pseudo dice \[(.*)\]")
_SECONDS = re.compile(_STAMP + r"Epoch time: (\d+\.?\d*) s")
_START = re.compile(_STAMP + r"Pseudo dice before training: (nan|[-+]?\d+\.?\d*(?:e[-+]?\d+)?)(?:\s|$)")
_GROUPS = re.compile(_STAMP + r"Trained groups: (.*\S)")
_NUMBER = re.compile(r"(?:np\.float\d+\()?(nan|[-+]?\d+\.?\d*(?:e[-+]?\d+)?)\)?")


@dataclass(frozen=True, kw_only=True)
class TrainingLog:
    """What nnU-Net logged, one entry an epoch.

    dice: pseudo Dice of each foreground label, shape (epochs, labels), nan where undefined. seconds: wall time.
    start_dice: mean pseudo Dice before the first step; None for trainers that do not measure it (stock nnU-Net).
    stages: (first epoch, names of the trained groups) of each stage; none for trainers without stages.
    """

    dice: np.ndarray
    seconds: np.ndarray
    start_dice: float | None = None
    stages: tuple[tuple[int, tuple[str, ...]], ...] = ()

    @property
    def mean_dice(self) -> np.ndarray:
        """Mean over the labels, shape (epochs,); nan where no label is defined."""
        defined = np.isfinite(self.dice)
        total = np.where(defined, self.dice, 0).sum(1)
        return np.divide(total, defined.sum(1), out=np.full(len(total), np.nan), where=defined.any(1))

    @property
    def seconds_per_epoch(self) -> float:
        """Median over the epochs: the first one, which warms up, and pauses do not count."""
        return float(np.median(self.seconds))


@dataclass(frozen=True, kw_only=True)
class Convergence:
    """When a curve first reached a share of its peak; epochs are counted as done, so the first one is 1."""

    peak: float
    peak_epoch: int
    target: float
    epochs: int | None


def read_training_log(fold_folder: Path) -> TrainingLog:
    """Read the `training_log_*.txt` of one fold folder; a resumed training has several, later epochs win.

    Raises:
        ConfigurationError: there is no log, or no finished epoch in it, or its epochs have different numbers of labels.
    """
    files = sorted(Path(fold_folder).glob("training_log_*.txt"))
    dice: dict[int, list[float]] = {}
    seconds: dict[int, float] = {}
    groups: dict[int, tuple[str, ...]] = {}
    start, epoch = None, -1
    for line in (line for file in files for line in file.read_text(errors="replace").splitlines()):
        if found := _EPOCH.match(line):
            epoch = int(found[1])
        elif found := _DICE.match(line):
            dice[epoch] = [float(number) for number in _NUMBER.findall(found[1])]
        elif found := _SECONDS.match(line):
            seconds[epoch] = float(found[1])
        elif found := _GROUPS.match(line):
            groups[epoch] = tuple(found[1].split(", "))
        elif found := _START.match(line):
            start = float(found[1])
    done = sorted(dice.keys() & seconds.keys())
    if not done:
        raise ConfigurationError(f"{fold_folder} has no training_log_*.txt with a finished epoch ({len(files)} logs "
                                 f"found); give a fold folder, such as TRAINER__PLANS__CONFIGURATION/fold_0.")
    if len(labels := {len(dice[e]) for e in done}) > 1:
        raise ConfigurationError(f"the training_log_*.txt of {fold_folder} have lines \"Pseudo dice\" of "
                                 f"{', '.join(map(str, sorted(labels)))} labels; one is damaged: copy it again.")
    return TrainingLog(dice=np.array([dice[e] for e in done]), seconds=np.array([seconds[e] for e in done]),
                       start_dice=start, stages=_stages(groups, done))


def _stages(groups: Mapping[int, tuple[str, ...]], done: Sequence[int]) -> tuple[tuple[int, tuple[str, ...]], ...]:
    """The epochs at which the trained groups change; epochs that did not finish do not count."""
    named = [epoch for epoch in done if epoch in groups]
    return tuple((epoch, groups[epoch]) for before, epoch in zip([None, *named], named)
                 if before is None or groups[before] != groups[epoch])


def ema(curve: ArrayLike) -> np.ndarray:
    """Return nnU-Net's moving average of a curve: 0.9 old + 0.1 new, from the first value on; nan changes nothing."""
    averaged: list[float] = []
    for value in np.asarray(curve, float):
        last = averaged[-1] if averaged else np.nan
        averaged.append(last if np.isnan(value) else value if np.isnan(last) else 0.9 * last + 0.1 * value)
    return np.array(averaged)


def smoothed(curve: ArrayLike, *, window: int = 3) -> np.ndarray:
    """Return the centred moving mean over `window` epochs, nan left out; at the ends the window is cut off.

    Pseudo Dice comes from a few random patches, so single epochs jump. nnU-Net's own moving average (0.9 old + 0.1
    new) lags by about ten epochs, which a count of epochs must not do.
    """
    values = np.asarray(curve, float)
    half = window // 2
    windows = [values[max(0, i - half):i + half + 1] for i in range(len(values))]
    return np.array([np.nanmean(w) if np.isfinite(w).any() else np.nan for w in windows])


def convergence(curve: ArrayLike, *, fraction: float = 0.85, reference: float | None = None) -> Convergence:
    """Return when `curve` (one value an epoch) first reached `fraction` of a peak.

    Without `reference` the peak is the curve's own, as in the Dante paper; a slow curve with a low peak then looks
    quick. To compare methods give all of them one reference, the highest peak. epochs is None if it was never reached.

    Give it the raw curve or a `smoothed` one: on the raw curve a single lucky epoch can be the peak.

    Raises:
        ConfigurationError: the curve has no finite value.
    """
    values = np.asarray(curve, float)
    if not np.isfinite(values).any():
        raise ConfigurationError(f"the curve has {len(values)} epochs and no finite value; nothing was learned or "
                                 f"validated, look into the training log.")
    best = int(np.nanargmax(values))
    target = fraction * (float(values[best]) if reference is None else reference)
    reached = np.flatnonzero(values >= target - 1e-12)
    return Convergence(peak=float(values[best]), peak_epoch=best + 1, target=target,
                       epochs=int(reached[0]) + 1 if reached.size else None)
