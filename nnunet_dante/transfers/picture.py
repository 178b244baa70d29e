"""The picture of a completed case: the image, and on it what was drawn, what the donor predicts, and both together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from ..files import atomic_path

_THICK = 1.5  # a voxel so many times as long as wide makes the image a stack of slices


def case_picture(image: np.ndarray, masks: Mapping[str, np.ndarray], file: Path, *, labels: Mapping[int, str],
                 spacing_mm: Sequence[float], codes: str) -> None:
    """Write the slice that holds most of the last mask, once as it is and once under each mask, as PNG.

    Args:
        image: (z, y, x), as nnU-Net reads it.
        masks: title -> integer mask (z, y, x).
        labels: value -> name.
        spacing_mm: voxel size along the axes of the image.
        codes: where the axes x, y and z lead in the patient, such as "RAS"; "" if unknown.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    upright = tuple(axis for axis, code in enumerate(reversed(codes)) if code in "RAS")  # as radiologists see images
    axis = int(np.argmax(spacing_mm)) if max(spacing_mm) >= _THICK * min(spacing_mm) else 0
    *_, last = masks.values()
    across = tuple(other for other in range(3) if other != axis)
    k = int(np.argmax((np.flip(last, upright) > 0).sum(across)))
    rows_mm, columns_mm = (spacing_mm[other] for other in across)
    shown = [int(value) for value in np.unique(np.concatenate([np.unique(mask) for mask in masks.values()]))
             if value in labels]
    figure = Figure(figsize=(3 * (len(masks) + 1), 3.6), layout="constrained")
    panels = figure.subplots(1, len(masks) + 1)
    for panel, (title, mask) in zip(panels, {"image": np.zeros_like(last), **masks}.items()):
        cut = np.flip(mask, upright).take(k, axis)  # (rows, columns)
        colours = colormaps["tab10"]((cut - 1) % 10)
        colours[..., 3] = 0.5 * np.isin(cut, shown)
        panel.imshow(np.flip(image, upright).take(k, axis), cmap="gray", aspect=rows_mm / columns_mm)
        panel.imshow(colours, interpolation="nearest", aspect=rows_mm / columns_mm)
        panel.set_title(title)
        panel.set_axis_off()
    figure.legend(handles=[Patch(color=colormaps["tab10"]((value - 1) % 10), label=labels[value]) for value in shown],
                  loc="outside lower center", ncols=6, frameon=False)
    with atomic_path(file) as temporary:
        figure.savefig(temporary, format="png", dpi=100)
