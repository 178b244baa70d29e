"""What a user names to be compared, read as results, each with the place of its predicted masks if there is one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..errors import ResultError
from .fold import nnunet_folder, read_fold
from .results import RunResult, read_results
from .study import shots_of
from .training_log import read_training_log


@dataclass(frozen=True, kw_only=True)
class Source:
    """A result and, where they are still there, its masks, its data set below nnUNet_raw, and its dataset.json."""

    result: RunResult
    masks: Path | None = None
    raw: Path | None = None
    dataset_json: Path | None = None


def read_sources(paths: Iterable[Path], *, tolerance_mm: float) -> list[Source]:
    """Read fold folders, protocol folders and files of results.

    Raises:
        ResultError: a path is none of them, or damaged.
    """
    folds: list[tuple[Path, Source]] = []
    sources: list[Source] = []
    for path in paths:
        if (path / "runs").is_dir():
            sources += _protocol(path)
        elif path.is_dir():
            folds.append((path.resolve().parent, _fold(path, tolerance_mm)))
        else:
            sources += [Source(result=result) for result in read_results(path)]
    return _told_apart(folds) + sources


def _fold(path: Path, tolerance_mm: float) -> Source:
    result = read_fold(path, tolerance_mm=tolerance_mm)
    return Source(result=result, masks=path / "validation", raw=nnunet_folder("nnUNet_raw", result.experiment),
                  dataset_json=path.resolve().parent / "dataset.json")


def _protocol(folder: Path) -> list[Source]:
    """Read FOLDER/runs; masks are in FOLDER/predictions/RUN, the training log below FOLDER/nnUNet_results."""
    sources = []
    for file in sorted((folder / "runs").glob("*.json")):
        model = next((folder / "nnUNet_results").glob(f"*/*__{file.stem.replace('__', '-')}__*"), None)
        masks = folder / "predictions" / file.stem
        for result in read_results(file):
            sources.append(Source(
                result=result if model is None else _with_stages(result, model),
                masks=masks if masks.is_dir() else None,
                raw=None if model is None else nnunet_folder("nnUNet_raw", model.parent.name),
                dataset_json=None if model is None else model / "dataset.json"))
    if not sources:
        raise ResultError(f"{folder / 'runs'} holds no results; run the protocol first: nnunet-dante benchmark.")
    return sources


def _with_stages(result: RunResult, model: Path) -> RunResult:
    """Results without stages take them from the log, if it is still there."""
    logs = [] if result.stages or not result.curve else sorted(model.glob("fold_*/training_log_*.txt"))
    return replace(result, stages=read_training_log(logs[0].parent).stages) if logs else result


def _told_apart(folds: Sequence[tuple[Path, Source]]) -> list[Source]:
    """Where one trainer ran with several plans or configurations, the method says which."""
    def key(source: Source) -> tuple:
        return source.result.experiment, source.result.method, shots_of(source.result), source.result.seed

    counts = Counter(key(source) for _, source in folds)
    doubled = {key(source)[:2] for _, source in folds if counts[key(source)] > 1}
    told = []
    for model, source in folds:
        if key(source)[:2] in doubled:
            _, plans, configuration = model.name.split("__")
            source = replace(source, result=replace(
                source.result, method=f"{source.result.method} ({plans}, {configuration})"))
        told.append(source)
    return told


def label_values(dataset_json: Path) -> dict[str, int]:
    """Return label name -> value in a mask; of a region the value that nnU-Net writes for it."""
    content = json.loads(dataset_json.read_text(encoding="utf-8"))
    names = [name for name in content["labels"] if name not in ("background", "ignore")]
    if order := content.get("regions_class_order"):
        return dict(zip(names, order))
    return {name: content["labels"][name] for name in names}
