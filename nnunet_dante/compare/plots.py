"""Pictures a person wants to look at. matplotlib is imported when one is drawn, without touching its backend."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..files import atomic_path
from ..types import PathLike
from .runs import Run
from .training_log import convergence

# Okabe and Ito's colours, told apart by most people with a colour vision deficiency; black and grey are left out,
# they are the image. Neighbours in this order also differ in lightness.
COLOURS = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
INK = "0.25"


def learning_curves(runs: Sequence[Run], file: PathLike, *, share: float = 0.85) -> None:
    """Write the pseudo Dice of each run over its epochs, epoch 0 being the score before training.

    A ring marks the peak, a dot the first epoch at `share` of it, both of the raw curve.
    """
    figure, ((axis,),) = new_figure(7.2, 4.2)
    ends = []
    for run, colour in zip(runs, COLOURS * len(runs)):
        curve, first = run.log.mean_dice, [] if run.log.start_dice is None else [run.log.start_dice]
        found = convergence(curve, fraction=share)
        axis.plot(range(1 - len(first), len(curve) + 1), [*first, *curve], color=colour, linewidth=2.2)
        axis.plot(found.peak_epoch, found.peak, "o", color=colour, markerfacecolor="white", markersize=10,
                  markeredgewidth=2, zorder=3, clip_on=False)
        if found.epochs is not None:
            axis.plot(found.epochs, curve[found.epochs - 1], "o", color=colour, markersize=6, zorder=4,
                      clip_on=False)
        ends.append((float(curve[-1]), len(curve), run.name, colour))
    _name_lines(axis, ends)
    last = max(len(run.log.dice) for run in runs)
    axis.set(xlabel="epochs done (0: before training)", ylabel="pseudo Dice, mean over labels", ylim=(0, 1),
             xlim=(-0.02 * last, last))
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.set_title(f"Learning curves    ○ peak    ● first epoch at {share:.0%} of it", fontsize=10, color=INK,
                   loc="left")
    axis.grid(axis="y", color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)
    save(figure, file, dpi=160)


def _name_lines(axis: Any, ends: Sequence[tuple[float, int, str, str]], *, gap: float = 0.06) -> None:
    """Write each name beside the end of its line, pushed apart where lines end close together."""
    height = -1.0
    for value, epoch, name, colour in sorted(ends):
        height = max(value, height + gap)
        axis.annotate(name, (epoch, value), xytext=(epoch * 1.02, height), color=colour, fontweight="bold",
                      va="center", annotation_clip=False)


def overlays(image: np.ndarray, masks: Mapping[str, np.ndarray], file: PathLike, *, labels: Mapping[str, int],
             slices: Sequence[int], spacing_mm: Sequence[float], captions: Mapping[str, str] | None = None,
             title: str = "") -> None:
    """Write slices of an image alone and under each mask: a column a mask, a row a slice, labels by colour.

    image, masks: (horizontal, vertical, slice), so that image[:, :, k].T is seen upright. masks: title -> label map.
    captions: title of a mask -> a line below it. title: of the picture.
    """
    shown = {name: value for name, value in labels.items() if value != 0}
    colours = dict(zip(shown.values(), COLOURS * len(shown)))
    columns: dict[str, np.ndarray | None] = {"image": None, **masks}
    width, height = (n * mm for n, mm in zip(image.shape[:2], spacing_mm))
    figure, axes = new_figure(2.6 * len(columns), 2.6 * height / width * len(slices) + 0.9, rows=len(slices),
                           columns=len(columns))
    low, high = np.percentile(image, (1, 99))
    # The square root lifts dark soft tissue, which a few very bright voxels (fluid, metal) would drown.
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
    _legend(figure, {name: colours[value] for name, value in shown.items()})
    save(figure, file, dpi=130)


def _paint(axis: Any, mask: np.ndarray, colours: Mapping[int, str], extent: Sequence[float]) -> None:
    """Tint each label and draw its exact voxel outline: the image stays visible below."""
    from matplotlib.colors import to_rgba

    fine = mask.repeat(8, 0).repeat(8, 1)  # on this grid the outline follows the voxels; on their own it cuts corners
    down, across = ((np.arange(n) + 0.5) / n * size for n, size in zip(fine.shape, (extent[2], extent[1])))
    painted = np.zeros((*mask.shape, 4))
    for value, colour in colours.items():
        painted[mask == value] = to_rgba(colour, 0.45)
        if (mask == value).any():
            axis.contour(across, down, fine == value, levels=[0.5], colors=[colour], linewidths=1.3)
    axis.imshow(painted, interpolation="nearest", extent=extent)


def _legend(figure: Any, colours: Mapping[str, str]) -> None:
    from matplotlib.patches import Patch

    figure.legend(handles=[Patch(color=colour, label=name.replace("_", " ")) for name, colour in colours.items()],
                  loc="outside lower center", ncols=len(colours), frameon=False, fontsize=11, labelcolor=INK)


def new_figure(width: float, height: float, *, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Any, Any]:
    """Return a figure of so many inches that belongs to no window system, and its rows of axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False, **options)


def set_title(figure: Any, text: str) -> None:
    """Write a title over a whole figure, in as many lines as its width needs."""
    figure.suptitle(textwrap.fill(text, int(9 * figure.get_figwidth())), fontsize=12, color=INK, x=0.01, ha="left")


def save(figure: Any, file: PathLike, *, dpi: int = 130) -> None:
    """Write a figure as PNG, whole or not at all."""
    with atomic_path(file) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")
