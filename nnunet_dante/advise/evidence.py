"""Measured results of fine-tuning, and those of them that are nearest to a situation.

`evidence.json` is a list with one object for each experiment, number of shots and method:

    {"experiment": "virtual scanner", "simulated": true, "shots": 4, "method": "LoRA", "trainer": "nnUNetTrainerLoRA",
     "dice": 0.71, "dice_interval": [0.68, 0.74], "zero_shot": 0.01, "scratch": 0.69, "draws": 3, "cases": 13,
     "new_labels": false, "source": "benchmarks/..."}

method: display name. dice: mean over draws and test cases; dice_interval: its uncertainty, or null. zero_shot: Dice of
the donor without training, or null. scratch: Dice of a random start with as many shots, or null. cases: test cases.
new_labels: whether the donor lacks some of the labels (may be left out: false). source: script or report of the row.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigurationError

FILE = Path(__file__).with_name("evidence.json")
NEAR_DICE, NEAR_FACTOR = 0.2, 2.0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One measured result; the fields are those of evidence.json."""

    experiment: str
    simulated: bool
    shots: int
    method: str
    trainer: str
    dice: float
    dice_interval: tuple[float, float] | None
    zero_shot: float | None
    scratch: float | None
    draws: int
    cases: int
    source: str
    new_labels: bool = False


@dataclass(frozen=True, kw_only=True)
class Measured:
    """All methods of one experiment at one number of shots, best first.

    near: whether zero-shot Dice differs by at most NEAR_DICE and the shots by at most NEAR_FACTOR, so that the rows may
    decide; otherwise they only inform.
    """

    rows: tuple[Row, ...]
    near: bool

    @property
    def best(self) -> Row:
        """The method with the highest Dice."""
        return self.rows[0]

    @property
    def training_helps(self) -> bool:
        """Whether any method ended above the donor without training."""
        return self.best.zero_shot is None or self.best.dice > self.best.zero_shot

    def as_good_as_best(self, trainer: str) -> bool:
        """Whether the trainer was measured and lies inside the interval of the best, or is the best."""
        floor = self.best.dice_interval[0] if self.best.dice_interval else self.best.dice
        return any(row.trainer == trainer and row.dice >= floor for row in self.rows)


def read_evidence(path: Path = FILE) -> tuple[Row, ...]:
    """Return the rows of an evidence file.

    Raises:
        ConfigurationError: the file is no such list.
    """
    try:
        rows = [Row(**row) for row in json.loads(path.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError) as error:
        raise ConfigurationError(f"{path} is no evidence file ({error}). Install nnunet-dante again.") from error
    return tuple(rows)


def nearest(rows: Sequence[Row], *, shots: int, zero_shot: float | None, new_labels: bool) -> Measured | None:
    """Return the experiment and number of shots nearest in zero-shot Dice and shots, None if there is none of its kind.

    Distance: |difference of zero-shot Dice| / NEAR_DICE + |log of the ratio of shots| / log NEAR_FACTOR. New labels are
    compared only with new labels, and by shots alone: a mean over labels that the donor has not says little.
    """
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if row.new_labels == new_labels:
            groups.setdefault((row.experiment, row.shots), []).append(row)
    if not groups:
        return None

    def distances(group: list[Row]) -> tuple[float, float]:
        theirs = group[0].zero_shot
        apart = 0.0 if new_labels or zero_shot is None or theirs is None else abs(zero_shot - theirs)
        return apart / NEAR_DICE, abs(math.log(shots / group[0].shots)) / math.log(NEAR_FACTOR)

    group = min(groups.values(), key=lambda g: sum(distances(g)))
    return Measured(rows=tuple(sorted(group, key=lambda row: -row.dice)), near=max(distances(group)) <= 1 + 1e-9)
