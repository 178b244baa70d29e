"""Data sets that a dataset.json describes: nnU-Net's own, and those of the Medical Segmentation Decathlon."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...errors import DatasetError
from ...files import read_json
from ...models.labels import channel_names, head_names, plain_labels
from ..checks import shorten
from ..images import case_files, image_files
from .found import INTEGERS, Found, Layout, Part, unique_names
from .pairs import split_channels
from .volumes import ending_of


def find_described(source: Path) -> Layout | None:
    """Return the cases of a data set with a dataset.json; None if there is no such file, or it describes none.

    Raises:
        DatasetError: dataset.json cannot be read.
        TransferError: its labels or channels are not what nnU-Net knows.
    """
    path = source / "dataset.json"
    if not path.is_file():
        return None
    try:
        content = read_json(path)
    except ValueError as error:
        raise DatasetError(f"{path} cannot be read ({error}). Correct it, or take it out of the folder.") from error
    if not isinstance(content, dict):
        return None
    if isinstance(content.get("training"), list):
        return _decathlon(source, content)
    return _nnunet(source, content) if "file_ending" in content and "labels" in content else None


def _nnunet(source: Path, content: dict[str, Any]) -> Layout:
    content = plain_labels(content)
    head_names(content)
    channels = channel_names(content)
    files = case_files(source, content)
    cases = [Found(name, name, {c: Part.of(p, p.name) for c, p in zip(_keys(channels, case.images), case.images)},
                   {INTEGERS: Part.of(case.mask, case.mask.name)} if case.mask.is_file() else {})
             for name, case in files.items()]
    unseen = image_files(source / "imagesTs", content["file_ending"])
    cases += [Found(name, name, {c: Part.of(p, p.name) for c, p in zip(_keys(channels, paths), paths)}, {})
              for name, paths in unseen.items() if name not in files]
    return Layout(description="an nnU-Net data set", cases=cases, channels=channels, dataset_json=content)


def _keys(channels: Sequence[str], files: Sequence[object]) -> Sequence[str]:
    return channels if len(channels) == len(files) else [f"{i:04d}" for i in range(len(files))]


def _decathlon(source: Path, content: Mapping[str, Any]) -> Layout:
    try:
        pairs = [(_inside(source, e["image"]), _inside(source, e["label"])) for e in content["training"]]
        unseen = [_inside(source, e["image"] if isinstance(e, dict) else e) for e in content.get("test", [])]
        legend = {int(value): str(name) for value, name in content["labels"].items() if int(value)}
        channels = channel_names({"modality": content.get("modality", {"0": "image"})})
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DatasetError(f"{source}/dataset.json is no description of the Medical Segmentation Decathlon "
                           f"({error!r}). It needs training (a list of image and label) and labels.") from error
    missing = [p.name for pair in pairs for p in pair if not p.is_file()]
    names = unique_names([_stem(p) for p in (*(image for image, _ in pairs), *unseen)])
    masks: list[Path | None] = [*(mask for _, mask in pairs), *(None for _ in unseen)]
    cases = [Found(name, name, dict(zip(channels, (part for _, part in split_channels("", image, image.name)))),
                   {INTEGERS: Part.of(mask, mask.name)} if mask else {})
             for name, image, mask in zip(names, (*(i for i, _ in pairs), *unseen), masks)
             if image.is_file() and (mask is None or mask.is_file())]
    notes = [f"dataset.json names {len(missing)} files that are not there: {shorten(missing)}"] if missing else []
    return Layout(description="the Medical Segmentation Decathlon (dataset.json with a list of training cases)",
                  cases=cases, legend=legend, legend_from="dataset.json", channels=channels, notes=notes)


def _inside(source: Path, text: str) -> Path:
    path = Path(os.path.normpath(source / text))
    if not path.is_relative_to(os.path.normpath(source)):
        raise ValueError(f"{text!r} lies outside the folder")
    return path


def _stem(path: Path) -> str:
    return path.name.removesuffix(ending_of(path.name) or "")
