"""What one run achieved and cost. Each run is one JSON file, which holds everything that a comparison needs."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import msgspec

from ..errors import ResultError
from ..files import parse_json, write_text_atomically

CaseScores: TypeAlias = dict[str, dict[str, dict[str, float]]]
"""Case -> label -> {"dice", "hd95_mm", "surface_dice"}, of predictions on the voxel grid of the original image."""

FORMAT = 1
# may hold nan and infinity:
_NUMBERS = ("cases", "donor_cases", "donor_before", "against_donor", "full_strength", "curve", "seconds",
            "strength_curve")


class RunResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One training, or one prediction without training ("zero-shot").

    experiment: the comparison that this run is part of, such as "virtual scanner".
    simulated: whether the images of the experiment are simulated.
    donor: the pretrained network that the training started from; "" for none.
    method: name to show.
    trainer: name of the trainer class; "" for zero-shot.
    shots: number of training cases.
    all: whether these are all training cases that there are.
    seed: seed of the draw of the training cases and of the training.
    cases: scores on the test cases.
    tolerance_mm: tolerance of the surface Dice, in mm.
    donor_cases, donor_before: scores on test cases of the donor's own data, after and before training; {} if they were
        not measured.
    against_donor: what became of each label of a donor that completed masks, on the test cases (`kept.label_changes`);
        {} if none did.
    strength: how much of what was learned the network keeps, from 0 to 1; None: all, nothing was chosen.
    strength_curve: (strength, mean Dice on unseen cases) of each strength that the choice compared.
    full_strength: "cases" and "donor_cases" with all that was learned; {} if not measured, or if all was kept.
    start_dice: mean pseudo Dice before training. curve: mean pseudo Dice of each epoch.
    seconds: duration of each epoch.
    stages: (first epoch, names of the trained parameter groups) of each stage; () if unknown.
    adapter_mib: size of the adapter file, in MiB. peak_memory_mib: peak memory of the training, in MiB.
    warning: what a reader of the scores must know; "" if nothing. error: what went wrong; "" if nothing did.
    """

    experiment: str
    method: str
    trainer: str
    shots: int
    seed: int
    cases: CaseScores
    tolerance_mm: float
    simulated: bool = False
    donor: str = ""
    all: bool = False
    donor_cases: CaseScores = {}
    donor_before: CaseScores = {}
    against_donor: CaseScores = {}
    strength: float | None = None
    strength_curve: list[tuple[float, float]] = []
    full_strength: dict[str, CaseScores] = {}
    start_dice: float | None = None
    curve: list[float] = []
    seconds: list[float] = []
    stages: tuple[tuple[int, tuple[str, ...]], ...] = ()
    trained_parameters: int | None = None
    total_parameters: int | None = None
    adapter_mib: float | None = None
    peak_memory_mib: float | None = None
    iterations_per_epoch: int | None = None
    machine: str = ""
    date: str = ""
    warning: str = ""
    error: str = ""
    format: int = FORMAT

    @property
    def at_full_strength(self) -> RunResult:
        """The same run as if all that was learned had been kept."""
        return msgspec.structs.replace(self, strength=1.0, full_strength={}, **self.full_strength)

    @property
    def is_zero_shot(self) -> bool:
        """Whether nothing was trained."""
        return not self.trainer or self.method.lower().replace(" ", "-") == "zero-shot"

    @property
    def is_scratch(self) -> bool:
        """Whether the training started from random weights."""
        return self.trainer.endswith("FromScratch")

    @property
    def is_full_fine_tuning(self) -> bool:
        """Whether the training started from the donor and trained every weight from the first epoch."""
        return self.trainer.endswith("TrainerFineTune")


def write_result(result: RunResult, path: str | Path) -> None:
    """Write one run as JSON, the whole file or nothing; nan becomes null, infinity becomes "inf"."""
    write_text_atomically(json.dumps(to_json(result), indent=1, allow_nan=False) + "\n", path)


def write_results(results: Iterable[RunResult], path: str | Path) -> None:
    """Write several runs as one JSON list."""
    write_text_atomically(json.dumps(to_json(list(results)), allow_nan=False) + "\n", path)


def read_results(source: str | Path) -> tuple[RunResult, ...]:
    """Read runs from the folder of a protocol, or from a file.

    source: a folder that holds runs/*.json, a .json file with one run or a list of runs, or a .jsonl file with one run
        per line.

    Raises:
        ResultError: there is no such file, or a file is damaged or not of this format; the message names it.
    """
    source = Path(source)
    if source.is_dir():
        files = sorted((source / "runs").glob("*.json"))
        if not files:
            raise ResultError(f"{source} has no runs/*.json; give the folder that a protocol was written to, a .json "
                              f"or .jsonl file of runs, or fold folders of nnU-Net.")
        return tuple(result for file in files for result in _read_file(file))
    return tuple(_read_file(source))


def _read_file(file: Path) -> list[RunResult]:
    try:
        text = file.read_text(encoding="utf-8")
        lines = [line for line in text.splitlines() if line.strip()] if file.suffix == ".jsonl" else [text]
        content = [parse_json(line) for line in lines]
    except (OSError, ValueError) as error:
        raise ResultError(f"{file} cannot be read as JSON ({error}). It is damaged, or no file of results: remove it, "
                          f"and run its part of the protocol again.") from error
    if file.suffix != ".jsonl" and isinstance(content[0], list):
        content = content[0]
    return [_result(entry, file) for entry in content]


def _result(entry: object, file: Path) -> RunResult:
    if not isinstance(entry, dict) or entry.get("format") != FORMAT:
        found = entry.get("format") if isinstance(entry, dict) else type(entry).__name__
        raise ResultError(f"{file} is not a run of format {FORMAT} (found: {found!r}); it may come from another "
                          f"version of nnunet-dante, or be another kind of file.")
    try:
        return msgspec.convert({k: _from_json(v) if k in _NUMBERS else v for k, v in entry.items()}, RunResult)
    except (TypeError, ValueError, msgspec.ValidationError) as error:
        raise ResultError(f"{file} is no complete run of format {FORMAT} ({error}). Run its part of the protocol "
                          f"again.") from error


def to_json(value: Any) -> Any:
    """Return `value` in JSON's own types: nan becomes null, infinity "inf"; numpy's numbers become Python's."""
    if isinstance(value, RunResult):
        value = msgspec.structs.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [to_json(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _from_json(value: Any) -> Any:
    """Return `value` with null read as nan and "inf" as infinity, at every depth."""
    if isinstance(value, dict):
        return {key: _from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return math.nan if value is None else float(value)
