"""Segmentations of 3D Slicer (`.seg.nrrd`), which name their segments.

The header of the file holds, for each segment, its name, its value, and the layer in which it was drawn; segments that
overlap are drawn in several layers. Source: 3D Slicer's description of the format ("Segmentations", Developer Guide).
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import SimpleITK

from ...errors import DatasetError
from .found import Found, Part

_NAME = re.compile(r"Segment(\d+)_Name")


def with_segments(cases: Iterable[Found]) -> list[Found]:
    """Return the cases; a mask of 3D Slicer becomes one mask for each of its segments, by name."""
    return [_with_segments(case) for case in cases]


def _with_segments(case: Found) -> Found:
    mask = next(iter(case.masks.values()), None)
    if len(case.masks) != 1 or mask is None or mask.ending.lower() not in (".nrrd", ".nhdr"):
        return case
    if not (segments := _segments(mask.files[0])):
        return case
    if twice := [name for name, n in Counter(name for name, _, _ in segments).items() if n > 1]:
        raise DatasetError(f"{mask.text} has several segments of the name {twice[0]!r}. Rename them in 3D Slicer.")
    return replace(case, masks={name: Part(mask.files, f"{mask.text} ({name})", partial(_drawn, mask, layer, value))
                                for name, value, layer in segments})


def _segments(path: Path) -> Sequence[tuple[str, int, int]]:
    """Return name, value and layer of each segment; none, if the file is no segmentation of 3D Slicer."""
    reader = SimpleITK.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        reader.ReadImageInformation()
        texts = {key: reader.GetMetaData(key).strip() for key in reader.GetMetaDataKeys()}
        found = [(match[1], texts[key]) for key in texts if (match := _NAME.fullmatch(key)) and texts[key]]
        return [(name, int(texts.get(f"Segment{n}_LabelValue", 1)), int(texts.get(f"Segment{n}_Layer", 0)))
                for n, name in found]
    except (RuntimeError, ValueError):  # a damaged file is named later, when its voxels are read
        return []


def _drawn(mask: Part, layer: int, value: int) -> SimpleITK.Image:
    voxels = mask.load()
    layers = voxels.GetNumberOfComponentsPerPixel()
    if layer >= layers:
        raise ValueError(f"a segment lies in layer {layer}, but the file has {layers}")
    return (SimpleITK.VectorIndexSelectionCast(voxels, layer) if layers > 1 else voxels) == value
