"""The axes along which a training mirrors its images: those of the donor's training, unless the user chooses others.

Axes are numbered as in nnU-Net: in the order of the preprocessed image (`transpose_forward` of the plans), and for 2d
configurations within the slice. None means "unknown": the donor's checkpoint has no entry, and nnU-Net then mirrors
along all axes. An empty tuple means "no mirroring".
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import nibabel
import numpy as np

from ..errors import ConfigurationError

CHOICES = ("donor", "none", "all")
_SIDE = re.compile(r"(?<![a-z])(?:(left|lt|l)|(?:right|rt|r))(?![a-z])")

Axes = tuple[int, ...]


def chosen_axes(choice: str, donor_axes: Axes | None, *, dimension: int) -> Axes | None:
    """Return the axes for a choice: "donor" for the donor's own axes, "none" or "all".

    Raises:
        ConfigurationError: `choice` is none of these.
    """
    if choice not in CHOICES:
        raise ConfigurationError(f"mirroring is {choice!r}; choose one of {', '.join(CHOICES)}.")
    return {"donor": donor_axes, "none": (), "all": tuple(range(dimension))}[choice]


def describe_axes(choice: str, donor_axes: Axes | None, axes: Axes | None) -> str:
    """Return the text about mirroring for the report of a transfer."""
    if choice != "donor":
        return f"{_listed(axes)} (--mirroring {choice}; the donor was trained with {_listed(donor_axes)})"
    if axes is None:
        return "the donor's checkpoint does not say; nnU-Net's default: all axes"
    return f"{_listed(axes)}, as the donor was trained"


def _listed(axes: Axes | None) -> str:
    if axes is None:
        return "unknown axes"
    return f"axes {', '.join(map(str, axes))}" if axes else "no mirroring"


def side_pairs(names: Iterable[str]) -> list[tuple[str, str]]:
    """Return pairs of names that differ only in left and right, such as ("kidney_left", "kidney_right")."""
    found: dict[str, dict[str, str]] = {}
    for name in names:
        words = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
        if side := _SIDE.search(words):
            rest = f"{words[:side.start()]}*{words[side.end():]}"
            found.setdefault(rest, {})["left" if side[1] else "right"] = name
    return [(sides["left"], sides["right"]) for sides in found.values() if len(sides) == 2]


def side_axis(image: Path, *, transpose: Sequence[int], dimension: int) -> int | None:
    """Return the axis of the preprocessed image that runs between left and right; None if a 2d network does not see it.

    nnU-Net reads the voxel axes of a NIfTI file in reverse order. If a file does not tell its orientation, its first
    axis is taken as the one between left and right.
    """
    try:
        codes = nibabel.aff2axcodes(nibabel.load(image).affine)  # type: ignore[attr-defined]
        voxel_axis = next(axis for axis, code in enumerate(codes) if code in ("L", "R"))
    except Exception:  # no file that nibabel reads
        voxel_axis = 0
    axis = int(np.flatnonzero(np.asarray(transpose) == 2 - voxel_axis)[0]) - (3 - dimension)
    return axis if axis >= 0 else None


def side_warnings(names: Iterable[str], axes: Axes | None, *, side_axis: int | None, known: bool) -> Iterator[str]:
    """Yield a warning if images are mirrored between left and right although labels tell the sides apart.

    known: the donor's checkpoint says along which axes it was trained.
    """
    pairs = side_pairs(names)
    if not pairs or side_axis is None or (axes is not None and side_axis not in axes):
        return
    shown = "; ".join(f"{left} and {right}" for left, right in pairs[:3]) + ("; ..." if len(pairs) > 3 else "")
    donor = "as the donor's training did" if known else "because the donor does not say how it was trained"
    yield (f"labels that differ only in their side ({shown}) would be mirrored from left to right in training and "
           f"prediction (axis {side_axis}), {donor}; the network then confuses the sides. Transfer again with "
           "--mirroring none")
