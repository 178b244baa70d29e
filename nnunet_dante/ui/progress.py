"""How far the trainings of a run are: Dice, losses, learning rate and trained parts by epoch, from nnU-Net's logs."""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Container, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_EPOCH = re.compile(r"Epoch (\d+) *$")
_NUMBERS = {"Current learning rate": "lr", "train_loss": "loss", "val_loss": "val_loss",
            "Epoch time": "seconds", "Most memory so far": "mib"}
_NUMBER = re.compile(r"(?<![\w.])(?:nan|-?\d+\.?\d*(?:e[-+]?\d+)?)")
_START = re.compile(r"Pseudo dice before training: \S+ (\{.*\})")
_TIME = re.compile(r"^\d{4}-\d\d-\d\d[ T_]\d\d:\d\d:\d\d[.\d]*: ?")
_MOST_BYTES = 64 << 20


@dataclass
class Epoch:
    """What nnU-Net says of one epoch; nan where it has not said it yet.

    dice: by label. groups: what was trained. mib: the most memory that the training has taken until its end.
    """

    lr: float = math.nan
    loss: float = math.nan
    val_loss: float = math.nan
    seconds: float = math.nan
    mib: float = math.nan
    dice: tuple[float, ...] = ()
    groups: str = ""

    @property
    def mean_dice(self) -> float:
        """The mean over the labels that have a Dice."""
        known = [value for value in self.dice if not math.isnan(value)]
        return sum(known) / len(known) if known else math.nan


@dataclass(kw_only=True)
class Training:
    """One training. start_dice: of the donor, by label, on the cases of the training's own validation."""

    trainer: str
    fold: str
    folder: Path
    total: int
    finished: bool = False
    start_dice: dict[str, float] = field(default_factory=dict)
    epochs: list[Epoch] = field(default_factory=list)

    @property
    def title(self) -> str:
        """What it is called for people."""
        where = "all cases" if self.fold == "all" else f"fold {self.fold}"
        return f"{self.trainer.removeprefix('nnUNetTrainer')}, {where}"

    @property
    def seconds_left(self) -> float:
        """Its time left, by the epochs so far; nan before the first one."""
        return 0.0 if self.finished else max(0, self.total - len(self.epochs)) * self.epoch_seconds

    @property
    def epoch_seconds(self) -> float:
        """The mean time of an epoch; nan before the first one."""
        return sum(epoch.seconds for epoch in self.epochs) / len(self.epochs) if self.epochs else math.nan


def read_log(text: str, training: Training) -> None:
    """Add what a log of nnU-Net says; epochs that were repeated after a stop count once, as they were last."""
    epoch: Epoch | None = None
    for line in text.splitlines():
        line = _TIME.sub("", line).strip()
        if found := _EPOCH.fullmatch(line):
            number = int(found[1])
            del training.epochs[number:]
            epoch = Epoch()
            training.epochs.append(epoch)
        elif found := _START.match(line):
            training.start_dice = _labels(found[1])
        elif epoch is not None:
            _read_line(line, epoch)
    while training.epochs and math.isnan(training.epochs[-1].seconds):
        training.epochs.pop()  # it has not ended


def _read_line(line: str, epoch: Epoch) -> None:
    for words, name in _NUMBERS.items():
        if line.startswith(words) and (numbers := _NUMBER.findall(line[len(words):])):
            setattr(epoch, name, float(numbers[0]))
    if line.startswith("Pseudo dice ["):
        epoch.dice = tuple(map(float, _NUMBER.findall(line)))
    elif line.startswith("Trained groups:"):
        epoch.groups = line.partition(":")[2].strip()


def _labels(text: str) -> dict[str, float]:
    try:
        found = ast.literal_eval(re.sub(r"\bnan\b", "None", text))
        return {str(label): float(dice) for label, dice in found.items() if dice is not None}
    except (SyntaxError, ValueError, TypeError, MemoryError, RecursionError):
        return {}


def read_trainings(results: Path, begun: Sequence[str], *, finished: Container[str], epochs: int) -> list[Training]:
    """Return the trainings of a run in the order in which they began.

    Args:
        results: the folder of the data set in nnUNet_results.
        begun: the trainings, each as "TRAINER FOLD".
        finished: those that are finished, in the same way.
        epochs: how many a training has; 0 if that is not known yet.
    """
    found = []
    for name in begun:
        trainer, _, fold = name.partition(" ")
        for folder in results.glob(f"{trainer}__nnUNetDantePlans__*/fold_{fold}"):
            training = Training(trainer=trainer, fold=fold, folder=folder, total=epochs, finished=name in finished)
            for file in sorted(folder.glob("training_log_*.txt"), key=lambda file: file.stat().st_mtime):
                if file.stat().st_size < _MOST_BYTES:
                    read_log(file.read_text(errors="replace"), training)
            found.append(training)
    return found
