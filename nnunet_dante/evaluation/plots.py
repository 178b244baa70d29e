"""Pictures a person wants to look at. matplotlib is imported when one is drawn, without touching its backend."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..types import PathLike
from .convergence import convergence
from .runs import Run

# Okabe and Ito's colours, told apart by most people with a colour vision deficiency; yellow is too pale on grey.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2")


def learning_curves(runs: Sequence[Run], file: PathLike, *, share: float = 0.85) -> None:
    """Write the pseudo Dice of each run over its epochs, epoch 0 being the score before training.

    A ring marks the peak, a dot the first epoch at `share` of it.
    """
    figure, axis = _figure(6.4, 3.8)
    for run, colour in zip(runs, COLOURS * len(runs)):
        curve, first = run.log.mean_dice, [] if run.log.start_dice is None else [run.log.start_dice]
        found = convergence(curve, fraction=share)
        axis.plot(range(1 - len(first), len(curve) + 1), [*first, *curve], color=colour, linewidth=2, label=run.name)
        axis.plot(found.peak_epoch, found.peak, "o", color=colour, markerfacecolor="none", markersize=9)
        if found.epochs is not None:
            axis.plot(found.epochs, curve[found.epochs - 1], "o", color=colour, markersize=6)
    axis.set(xlabel="epoch (0: before training)", ylabel="pseudo Dice, mean of labels", ylim=(0, 1))
    axis.set_title(f"dot: {share:.0%} of the run's own peak, ring: peak", fontsize=9, color="0.4", loc="left")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(frameon=False, fontsize=9)
    figure.savefig(file, dpi=150)


def overlays(image: np.ndarray, masks: Mapping[str, np.ndarray], file: PathLike, *, labels: Mapping[str, int],
             slices: Sequence[int], spacing_mm: Sequence[float], captions: Mapping[str, str] | None = None) -> None:
    """Write slices of an image alone and under each mask: a column a mask, a row a slice, labels by colour.

    image, masks: (horizontal, vertical, slice), so that image[:, :, k].T is seen upright. masks: title -> label map.
    captions: title -> a line below the title.
    """
    shown = {name: value for name, value in labels.items() if value != 0}
    colours = {value: COLOURS[i % len(COLOURS)] for i, value in enumerate(shown.values())}
    columns: dict[str, np.ndarray | None] = {"image": None, **masks}
    height = image.shape[1] * spacing_mm[1] / (image.shape[0] * spacing_mm[0])
    figure, axes = _figure(2.1 * len(columns), 2.1 * height * len(slices) + 0.9, rows=len(slices), columns=len(columns))
    low, high = np.percentile(image, (0.5, 99.5))
    for column, (title, mask) in enumerate(columns.items()):
        caption = (captions or {}).get(title, "")
        axes[0][column].set_title(f"{title}\n{caption}", fontsize=9)
        for row, k in enumerate(slices):
            axis = axes[row][column]
            axis.imshow(image[:, :, k].T, cmap="gray", vmin=low, vmax=high, aspect=spacing_mm[1] / spacing_mm[0])
            if mask is not None:
                _paint(axis, mask[:, :, k].T, colours, spacing_mm[1] / spacing_mm[0])
            axis.set_axis_off()
    from matplotlib.patches import Patch

    figure.legend(handles=[Patch(color=colours[v], label=n.replace("_", " ")) for n, v in shown.items()],
                  loc="outside lower center", ncols=len(shown), frameon=False, fontsize=9)
    figure.savefig(file, dpi=130)


def _paint(axis: Any, mask: np.ndarray, colours: Mapping[int, str], aspect: float) -> None:
    from matplotlib.colors import to_rgba

    painted = np.zeros((*mask.shape, 4))
    for value, colour in colours.items():
        painted[mask == value] = to_rgba(colour, 0.6)
    axis.imshow(painted, interpolation="nearest", aspect=aspect)


def _figure(width: float, height: float, *, rows: int = 1, columns: int = 1) -> tuple[Any, Any]:
    """Return a figure that belongs to no window system, with one axis or rows of axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False)
    return figure, axes[0][0] if rows == columns == 1 else axes
