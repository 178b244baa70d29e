"""What one run of a protocol achieved and cost, as one JSON file; everything a comparison needs is in it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import ResultError
from ..files import parse_json, write_text_atomically

CaseScores: TypeAlias = Mapping[str, Mapping[str, Mapping[str, float]]]
"""Case -> label -> {"dice", "hd95_mm", "surface_dice"}, of predictions on the voxel grid of the original image."""

FORMAT = 1
_SCORES, _CURVES = ("cases", "donor_cases", "donor_before"), ("curve", "seconds")


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """One training, or one zero-shot prediction, of a protocol.

    experiment: what the shots, draws and methods belong to, such as "virtual scanner". simulated: its images are.
    donor: the pretrained network; "" for none. method: display name. trainer: class name; "" for zero-shot.
    shots: number of training cases. all: these are all there are. seed: of the draw of cases and of the training.
    cases: scores on the test cases. tolerance_mm: of the surface Dice. donor_cases, donor_before: scores on test cases
    of the donor's own data after training and of the untouched donor, {} if not measured.
    start_dice: mean pseudo Dice before training. curve: mean pseudo Dice of each epoch, raw. seconds: of each epoch.
    stages: (first epoch, trained groups) of each stage, as `TrainingLog.stages`; [] if unknown.
    adapter_mib: size of the adapter file, MiB. peak_memory_mib: of the training, MiB.
    error: what went wrong; "" if nothing did.
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
    donor_cases: CaseScores = field(default_factory=dict)
    donor_before: CaseScores = field(default_factory=dict)
    start_dice: float | None = None
    curve: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    stages: Sequence[Sequence[Any]] = field(default_factory=list)
    trained_parameters: int | None = None
    total_parameters: int | None = None
    adapter_mib: float | None = None
    peak_memory_mib: float | None = None
    iterations_per_epoch: int | None = None
    machine: str = ""
    date: str = ""
    error: str = ""
    format: int = FORMAT

    @property
    def is_zero_shot(self) -> bool:
        """Nothing was trained."""
        return not self.trainer or self.method.lower().replace(" ", "-") == "zero-shot"

    @property
    def is_scratch(self) -> bool:
        """The training started from random weights."""
        return self.trainer.endswith("FromScratch")

    @property
    def is_full_fine_tuning(self) -> bool:
        """The training started from the donor and trained every weight from the first epoch."""
        return self.trainer.endswith("TrainerFineTune")


def write_result(result: RunResult, path: str | Path) -> None:
    """Write one run as JSON, whole or not at all: nan as null, infinity as "inf"."""
    write_text_atomically(json.dumps(_to_json(result), indent=1, allow_nan=False) + "\n", path)


def write_results(results: Iterable[RunResult], path: str | Path) -> None:
    """Write several runs as one JSON list."""
    write_text_atomically(json.dumps(_to_json(list(results)), allow_nan=False) + "\n", path)


def read_results(source: str | Path) -> tuple[RunResult, ...]:
    """Read the runs of a protocol: FOLDER/runs/*.json, or a .json file (one run or a list), or .jsonl (one a line).

    Raises:
        ResultError: nothing is there, or a file is damaged or not of this format; names the file.
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
        raise ResultError(f"{file} cannot be read as JSON ({error}). It is damaged or no result: remove it and run its "
                          f"part of the protocol again.") from error
    if file.suffix != ".jsonl" and isinstance(content[0], list):
        content = content[0]
    return [_result(entry, file) for entry in content]


def _result(entry: object, file: Path) -> RunResult:
    known = {f.name: f for f in dataclasses.fields(RunResult)}
    if not isinstance(entry, dict) or entry.get("format") != FORMAT:
        found = entry.get("format") if isinstance(entry, dict) else type(entry).__name__
        raise ResultError(f"{file} is not a run of format {FORMAT} (found: {found!r}); it may come from another "
                          f"version of nnunet-dante, or be another kind of file.")
    missing = [name for name, f in known.items() if name not in entry and f.default is f.default_factory]
    if wrong := [*missing, *(entry.keys() - known.keys())]:
        raise ResultError(f"{file} lacks, or has beyond format {FORMAT}, the entries {', '.join(sorted(wrong))}; run "
                          f"its part of the protocol again.")
    try:
        values = {name: _from_json(value) if name in (*_SCORES, *_CURVES) else value for name, value in entry.items()}
    except ValueError as error:
        raise ResultError(f"{file} holds a score that is no number ({error}); run its part of the protocol "
                          f"again.") from error
    return RunResult(**values)


def _to_json(value: Any) -> Any:
    """JSON has neither nan nor infinity."""
    if isinstance(value, RunResult):
        value = dataclasses.asdict(value)
    if isinstance(value, Mapping):
        return {str(key): _to_json(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_to_json(item) for item in value]
    if isinstance(value, (str, bool)) or value is None:
        return value
    if hasattr(value, "item"):  # numpy's numbers are not JSON's
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


def _from_json(value: Any) -> Any:
    """The numbers below `value`: null is nan, "inf" infinity."""
    if isinstance(value, dict):
        return {key: _from_json(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_from_json(item) for item in value]
    return math.nan if value is None else float(value)
