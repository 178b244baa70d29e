"""The picture of a completed case: the image, and on it what was drawn, what the donor predicts, and both together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.images import Case
from ..datasets.orientation import case_orientations
from ..datasets.views import THICK, overlays


def case_picture(name: str, case: Case, reader: Any, masks: Mapping[str, np.ndarray], file: Path, *,
                 labels: Mapping[int, str], spacing_mm: Sequence[float]) -> None:
    """Write the slice that holds most of the last mask, once as it is and once under each mask, as PNG.

    Args:
        name, case: name and files of the case.
        reader: nnU-Net's, for its images.
        masks: title -> integer mask (z, y, x).
        labels: value -> name; only those that a mask holds are named in the picture.
        spacing_mm: voxel size along the axes of the image.
    """
    image, _ = reader.read_images([str(path) for path in case.images])  # (channels, z, y, x)
    codes = case_orientations({name: case}, type(reader).__name__).get(name, "")  # of x, y and z, such as "RAS"
    flipped = tuple(axis for axis, code in enumerate(reversed(codes)) if code in "RAS")  # as radiologists see images
    axis = int(np.argmax(spacing_mm)) if max(spacing_mm) >= THICK * min(spacing_mm) else 0

    def turned(voxels: np.ndarray) -> np.ndarray:
        return np.moveaxis(np.flip(voxels, flipped), axis, 0).T  # (columns, rows, slices)

    upright = {title: turned(mask) for title, mask in masks.items()}
    *_, last = upright.values()
    rows_mm, columns_mm = (mm for other, mm in enumerate(spacing_mm) if other != axis)
    there = np.unique(np.concatenate([np.unique(mask) for mask in masks.values()]))
    overlays(turned(image[0]), upright, file, labels={labels[int(v)]: int(v) for v in there if int(v) in labels},
             slices=[int(np.argmax((last > 0).sum((0, 1))))], spacing_mm=[columns_mm, rows_mm, spacing_mm[axis]])
