"""All methods of an experiment in one figure: Dice against training cases, and against trained parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..types import PathLike
from .panels import BEFORE, FULL, SCRATCH
from .plots import COLOURS, INK, new_figure, save, tidy
from .study import Shots, Study, mean_score
from .training_log import median

_BEST, _REST = (COLOURS[1], COLOURS[0], COLOURS[2]), "0.75"


def shots_overview(study: Study, file: PathLike) -> None:
    """Write Dice over the number of training cases, named at the end of each line; the best three in colour."""
    dice = {m: {n: mean.value for n, s in enumerate(study.shots) if (mean := mean_score(study.of(m, s)))}
            for m in study.methods if m != study.special("zero_shot")}
    dice = {method: values for method, values in dice.items() if values}
    colours = _colours(study, {m: sum(v.values()) / len(v) for m, v in dice.items() if len(v) == len(study.shots)})
    figure, ((axis,),) = new_figure(8.2, max(4.6, 0.3 * len(dice) + 1.2))
    for method, values in dice.items():
        special = method in (study.special("scratch"), study.special("full_fine_tuning"))
        axis.plot(list(values), list(values.values()), color=colours.get(method, _REST), marker="o", markersize=4,
                  linestyle="--" if colours.get(method) == SCRATCH else "-",
                  linewidth=2.4 if method in colours else 1.3, zorder=3 if method in colours or special else 2)
    _draw_zero_shot(study, axis, side="right")
    _name_at_right(axis, {m: (max(v), v[max(v)]) for m, v in dice.items()}, colours)
    axis.set_xticks(range(len(study.shots)), [study.shots_name(shots) for shots in study.shots])
    axis.set(xlabel="training cases", ylabel="Dice, mean over test cases, labels and draws")
    _finish(axis, study.title("Dice by number of training cases"))
    save(figure, file, dpi=140)


def methods_overview(study: Study, shots: Shots, file: PathLike) -> None:
    """Write Dice with its interval over cases, one row per method, the best on top, at one number of training cases."""
    means = {method: mean for method in study.methods if (mean := mean_score(study.of(method, shots)))}
    ordered = sorted(means, key=lambda method: means[method].value)
    colours = _colours(study, {}) | {name: BEFORE for name in ordered if name == study.special("zero_shot")}
    figure, ((axis,),) = new_figure(7.8, 0.36 * len(ordered) + 1.2)
    for row, method in enumerate(ordered):
        colour = colours.get(method, COLOURS[1])
        axis.plot(means[method].interval, (row, row), color=colour, linewidth=3, alpha=0.35, solid_capstyle="round")
        axis.plot(means[method].value, row, "o", color=colour, markersize=8)
    axis.set_yticks(range(len(ordered)), ordered)
    axis.set(xlabel="Dice, mean over test cases, labels and draws", ylim=(-0.7, len(ordered) - 0.3))
    _finish(axis, study.title(f"Dice with {study.cases_name(shots)}"), grid="x")
    save(figure, file, dpi=140)


def parameters_overview(study: Study, shots: Shots, file: PathLike) -> bool:
    """Write Dice over the number of trained parameters (log), one dot per method, at one number of training cases.

    Returns whether there was anything to draw: parameters may not be known.
    """
    points: dict[str, tuple[float, float]] = {}
    for method in study.methods:
        runs = study.of(method, shots)
        trained, mean = [run.trained_parameters for run in runs if run.trained_parameters], mean_score(runs)
        if trained and mean is not None and not runs[0].is_zero_shot:
            points[method] = (median(trained), mean.value)
    if not points:
        return False
    colours = _colours(study, {method: dice for method, (_, dice) in points.items()})
    figure, ((axis,),) = new_figure(8.2, max(4.2, 0.28 * len(points) + 1.2))
    axis.set_xscale("log")
    for method, point in points.items():
        axis.plot(*point, "o", color=colours.get(method, "0.6"), markersize=8, zorder=3, markeredgecolor="white")
    _draw_zero_shot(study, axis, side="left")
    axis.margins(x=0.15, y=0.12)
    widen = max(1.0, (30 * min(x for x, _ in points.values()) / max(x for x, _ in points.values())) ** 0.5)
    axis.set_xlim(*(axis.get_xlim() * np.array([1 / widen, widen])))  # at least a decade and a half
    axis.set(xlabel="trained parameters", ylabel="Dice, mean over test cases, labels and draws")
    _finish(axis, study.title(f"Dice by trained parameters, {study.cases_name(shots)}"))
    _name_beside(figure, axis, points, colours)
    save(figure, file, dpi=140)
    return True


def _draw_zero_shot(study: Study, axis: Any, *, side: str) -> None:
    """Draw the score without training as a dotted line, named at its "left" or "right" end."""
    name = study.special("zero_shot")
    if name and (before := mean_score(study.of(name))):
        axis.axhline(before.value, color=BEFORE, linestyle=":", linewidth=1.6)
        axis.annotate(name, (0.01 if side == "left" else 0.99, before.value), xycoords=("axes fraction", "data"),
                      xytext=(0, 3), textcoords="offset points", color=BEFORE, va="bottom", ha=side, fontweight="bold")


def _colours(study: Study, ranking: Mapping[str, float]) -> dict[str, str]:
    """Black for scratch, grey for full fine-tuning, colours for the best three others; the rest stays pale."""
    colours = {name: colour for kind, colour in (("scratch", SCRATCH), ("full_fine_tuning", FULL))
               if (name := study.special(kind))}
    best = sorted((m for m in ranking if m not in colours), key=lambda m: -ranking[m])
    return colours | dict(zip(best, _BEST))


def _name_at_right(axis: Any, points: Mapping[str, tuple[float, float]], colours: Mapping[str, str]) -> None:
    """Write all names in a column right of the axis, in the order of their values, with a line to each point."""
    from scipy.optimize import isotonic_regression

    low, high = axis.get_ylim()
    ordered = sorted(points.items(), key=lambda item: item[1][1])
    # Moved as little as needed to be a gap apart: least squares under an order, once the gaps are taken off.
    gaps = min(0.062, 1 / max(1, len(points))) * np.arange(len(points))
    wanted = np.array([(y - low) / (high - low) for _, (_, y) in ordered])
    heights = np.clip(isotonic_regression(wanted - gaps).x, 0, 1 - gaps.max(initial=0)) + gaps
    for (method, point), height in zip(ordered, heights):
        colour = colours.get(method, "0.45")
        axis.annotate(method, point, xytext=(1.06, height), textcoords="axes fraction", color=colour, va="center",
                      fontweight="bold" if method in colours else "normal", annotation_clip=False,
                      arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6, "shrinkB": 4,
                                  "relpos": (0, 0.5)})


def _name_beside(figure: Any, axis: Any, points: Mapping[str, tuple[float, float]],
                 colours: Mapping[str, str]) -> None:
    """Write each name as close to its point as it fits without covering a point or another name."""
    from matplotlib.text import Text
    from matplotlib.transforms import Bbox

    figure.draw_without_rendering()  # lays the axis out; sizes of names are known from here on
    figure.set_layout_engine("none")
    dots = {method: axis.transData.transform(point) for method, point in points.items()}
    taken = [Bbox.from_extents(*(dot - 7), *(dot + 7)) for dot in dots.values()]
    taken += [thing.get_window_extent().padded(3) for thing in (*axis.lines[len(points):], *axis.texts)]  # zero-shot
    places = sorted(((side, line) for side in (1, -1) for line in range(-9, 10)), key=lambda p: (abs(p[1]), -p[0]))
    frame = axis.get_window_extent()
    for method in sorted(points, key=lambda m: -points[m][1]):
        colour = colours.get(method, "0.4")
        for side, line in places:
            name = axis.annotate(
                method, points[method], xytext=(11 * side, 11 * line), textcoords="offset points", color=colour,
                ha="left" if side > 0 else "right", va="center", fontweight="bold" if method in colours else "normal",
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.6, "alpha": 0.6, "shrinkB": 3,
                            "relpos": (0 if side > 0 else 1, 0.5)} if line else None)
            name.update_positions(figure.canvas.get_renderer())
            box = Text.get_window_extent(name)  # without the line to the point
            if not box.count_overlaps(taken) and frame.containsx(box.x0) and box.x1 < figure.bbox.x1 and (
                    frame.containsy(box.y0) and frame.containsy(box.y1)):
                taken.append(box)
                break
            name.remove()
        else:
            axis.annotate(method, points[method], color=colour)


def _finish(axis: Any, title: str, *, grid: str = "y") -> None:
    axis.set_title(title, fontsize=12, color=INK, loc="left")
    tidy(axis, grid=grid)
