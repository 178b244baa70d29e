"""One training as a report sees it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .training_log import TrainingLog, read_training_log


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training's name and log, and how many parameters it trained of how many (None if the checkpoint is stock)."""

    name: str
    log: TrainingLog
    trained: int | None
    total: int | None


def read_run(name: str, fold_folder: Path, checkpoint: Mapping[str, Any]) -> Run:
    """Return the run of a fold folder; `checkpoint` is the content of its checkpoint_final.pth."""
    dante = checkpoint.get("dante") or {}
    return Run(name=name, log=read_training_log(fold_folder), trained=dante.get("trainable_parameters"),
               total=dante.get("total_parameters"))
