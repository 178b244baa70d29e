"""How a volume is looked at: the plane that shows it best, its slices upright, and masks drawn on it.

matplotlib is imported only when a figure is drawn, and the user's choice of its backend is not changed.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK

from ..files import atomic_path
from ..types import PathLike

# Okabe and Ito's colours, which most people with a colour vision deficiency can tell apart. Black and grey are left
# out, because images have them. Neighbours in this order also differ in lightness.
COLOURS = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
INK = "0.25"
THICK = 1.5  # if voxels are so many times longer along one axis, the image is a stack of slices along it
# Axes of a sagittal, coronal and axial view, as the directions to the right, down, and from slice to slice.
_PLANES = ("PIL", "LIP", "LPS")


def viewing_plane(mask: Path | SimpleITK.Image) -> str:
    """Return the axes in which a mask is shown, one of `_PLANES`.

    Thick slices are shown as they were taken. If voxels are almost cubes, the view is the one that shows most of the
    labels: it looks along the direction in which they are shortest.
    """
    voxels, size_mm = upright(mask, "LPS")
    labelled = voxels > 0
    if voxels.shape[2] > 1 and max(size_mm) >= THICK * min(size_mm):
        return _PLANES[int(np.argmax(size_mm))]  # thick from left to right: sagittal slices
    if voxels.shape[2] > 1 and labelled.any():
        extent = [np.ptp(np.flatnonzero(labelled.any(others))) for others in ((1, 2), (0, 2), (0, 1))]  # x, y, z
        return _PLANES[int(np.argmin(np.multiply(extent, size_mm)))]
    return "LPS"


def upright(volume: Path | SimpleITK.Image, plane: str) -> tuple[np.ndarray, list[float]]:
    """Return a volume, or the file of one, with its axes in the directions `plane`, and its voxel size in mm."""
    image = SimpleITK.ReadImage(str(volume)) if isinstance(volume, Path) else volume
    image = first_component(image)
    if image.GetDimension() == 3:
        image = SimpleITK.DICOMOrient(image, plane)
    voxels = SimpleITK.GetArrayFromImage(image).T
    spacing_mm = [*image.GetSpacing(), 1.0][:3]
    return (voxels if voxels.ndim == 3 else voxels[:, :, None]), spacing_mm


def first_component(image: SimpleITK.Image) -> SimpleITK.Image:
    """Return an image of numbers as it is, and of a colour image the first colour."""
    return SimpleITK.VectorIndexSelectionCast(image, 0) if image.GetNumberOfComponentsPerPixel() > 1 else image


def overlays(image: np.ndarray, masks: Mapping[str, np.ndarray], file: PathLike, *, labels: Mapping[str, int],
             slices: Sequence[int], spacing_mm: Sequence[float], captions: Mapping[str, str] | None = None,
             title: str = "") -> None:
    """Draw slices of an image, one row per slice: first the image alone, then the image with each mask on it.

    image: shape (horizontal, vertical, slices); image[:, :, k].T is slice k, upright.
    masks: title -> label map of the image's shape.
    file: the PNG file to write.
    labels: name -> integer in the masks; each label has its own colour.
    slices: indices of the slices to show.
    spacing_mm: voxel size along the image's axes.
    captions: title of a mask -> a line below the title.
    title: title of the whole picture.
    """
    from matplotlib.patches import Patch

    shown = {name: value for name, value in labels.items() if value != 0}
    colours = dict(zip(shown.values(), COLOURS * len(shown)))
    columns: dict[str, np.ndarray | None] = {"image": None, **masks}
    width, height = (n * mm for n, mm in zip(image.shape[:2], spacing_mm))
    figure, axes = new_figure(2.6 * len(columns), 2.6 * height / width * len(slices) + 0.9, rows=len(slices),
                              columns=len(columns))
    low, high = np.percentile(image, (1, 99))
    # The square root makes soft tissue visible that is dark because of a few very bright voxels (fluid, metal).
    grey = np.sqrt(np.clip((image - low) / max(high - low, 1e-9), 0, 1))
    for column, (name, mask) in enumerate(columns.items()):
        caption = (captions or {}).get(name, "")
        axes[0][column].set_title(f"{name}\n{caption}", fontsize=11, color=INK)
        for row, k in enumerate(slices):
            axis, extent = axes[row][column], (0, width, height, 0)
            axis.imshow(grey[:, :, k].T, cmap="gray", vmin=0, vmax=1, extent=extent, interpolation="bicubic")
            if mask is not None:
                _paint(axis, mask[:, :, k].T, colours, extent)
            axis.set_axis_off()
    if title:
        set_title(figure, title)
    figure.legend(handles=[Patch(color=colours[value], label=name.replace("_", " ")) for name, value in shown.items()],
                  loc="outside lower center", ncols=max(1, min(6, len(shown))), frameon=False, fontsize=11,
                  labelcolor=INK)
    save(figure, file)


def _paint(axis: Any, mask: np.ndarray, colours: Mapping[int, str], extent: Sequence[float]) -> None:
    """Tint each label so that the image stays visible below, and draw its outline along the voxels' edges."""
    from matplotlib.colors import to_rgba

    fine = mask.repeat(8, 0).repeat(8, 1)  # on the voxels' own grid, outlines would cut corners
    down, across = ((np.arange(n) + 0.5) / n * size for n, size in zip(fine.shape, (extent[2], extent[1])))
    painted = np.zeros((*mask.shape, 4))
    for value, colour in colours.items():
        painted[mask == value] = to_rgba(colour, 0.45)
        if (mask == value).any():
            axis.contour(across, down, fine == value, levels=[0.5], colors=[colour], linewidths=1.3)
    axis.imshow(painted, interpolation="nearest", extent=extent)


def new_figure(width: float, height: float, *, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """Return a figure that needs no window system, and its rows of axes. `width` and `height` are in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def set_title(figure: Any, text: str) -> None:
    """Write a title above a whole figure, broken into lines that fit its width."""
    figure.suptitle(textwrap.fill(text, int(9 * figure.get_figwidth())), fontsize=12, color=INK, x=0.01, ha="left")


def save(figure: Any, file: PathLike, *, dpi: int = 130) -> None:
    """Write a figure as PNG, the whole file or nothing."""
    with atomic_path(file) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")
