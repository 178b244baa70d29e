"""All methods of an experiment in one figure: Dice against training cases, and against trained parameters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from ..datasets.views import COLOURS, INK, new_figure
from ..types import PathLike
from .panels import BEFORE, FULL, SCRATCH, draw_zero_shot
from .plots import save, tidy
from .study import Shots, Study, mean_score
from .training_log import median

_BEST, _REST = (COLOURS[1], COLOURS[0], COLOURS[2]), "0.75"


def shots_overview(study: Study, file: PathLike) -> None:
    """Draw Dice over the number of training cases, one named line per method, the best three in colour."""
    dice = {m: {n: mean.value for n, s in enumerate(study.shots) if (mean := mean_score(study.of(m, s)))}
            for m in study.methods if m != study.references["zero_shot"]}
    dice = {method: values for method, values in dice.items() if values}
    colours = _colours(study, {m: sum(v.values()) / len(v) for m, v in dice.items() if len(v) == len(study.shots)})
    figure, ((axis,),) = new_figure(8.2, max(4.6, 0.3 * len(dice) + 1.2))
    for method, values in dice.items():
        special = method in (study.references["scratch"], study.references["full_fine_tuning"])
        axis.plot(list(values), list(values.values()), label=method, color=colours.get(method, _REST), marker="o",
                  markersize=4, linestyle="--" if colours.get(method) == SCRATCH else "-",
                  linewidth=2.4 if method in colours else 1.3, zorder=3 if method in colours or special else 2)
    draw_zero_shot(study, axis, named_at="right")
    _name_at_right(axis, {m: (max(v), v[max(v)]) for m, v in dice.items()}, colours)
    axis.set_xticks(range(len(study.shots)), [study.shots_name(shots) for shots in study.shots])
    axis.set(xlabel="training cases", ylabel=_mean_over(study))
    _finish(axis, study.title("Dice by number of training cases"))
    save(figure, file, dpi=140)


def _mean_over(study: Study) -> str:
    return f"Dice, mean over test cases{', labels and draws' if study.repeated else ' and labels'}"


def methods_overview(study: Study, shots: Shots, file: PathLike) -> None:
    """Draw Dice with its interval over cases at one number of training cases, one row per method, the best on top."""
    means = {method: mean for method in study.methods if (mean := mean_score(study.of(method, shots)))}
    ordered = sorted(means, key=lambda method: means[method].value)
    colours = _colours(study, {}) | {name: BEFORE for name in ordered if name == study.references["zero_shot"]}
    figure, ((axis,),) = new_figure(7.8, 0.36 * len(ordered) + 1.2)
    for row, method in enumerate(ordered):
        colour = colours.get(method, COLOURS[1])
        low, high = means[method].interval
        axis.plot((low, high), (row, row), color=colour, linewidth=3, alpha=0.35, solid_capstyle="round")
        axis.plot(means[method].value, row, "o", color=colour, markersize=8,
                  label=f"{method} ({low:.3f} to {high:.3f})")
    axis.set_yticks(range(len(ordered)), ordered)
    axis.set(xlabel=_mean_over(study), ylim=(-0.7, len(ordered) - 0.3))
    _finish(axis, study.title(f"Dice with {study.cases_name(shots)}"), grid="x")
    save(figure, file, dpi=140)


def parameters_overview(study: Study, shots: Shots, file: PathLike) -> bool:
    """Draw Dice over the number of trained parameters (logarithmic) at one number of training cases, a dot per method.

    Returns False, and draws nothing, if no method's number of trained parameters is known.
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
        axis.plot(*point, "o", label=method, color=colours.get(method, "0.6"), markersize=8, zorder=3,
                  markeredgecolor="white")
    draw_zero_shot(study, axis, named_at="left")
    axis.margins(x=0.15, y=0.12)
    widen = max(1.0, (30 * min(x for x, _ in points.values()) / max(x for x, _ in points.values())) ** 0.5)
    axis.set_xlim(*(axis.get_xlim() * np.array([1 / widen, widen])))  # spans a factor of 30 or more
    axis.set(xlabel="trained parameters", ylabel=_mean_over(study))
    _finish(axis, study.title(f"Dice by trained parameters, {study.cases_name(shots)}"))
    _name_beside(figure, axis, points, colours)
    save(figure, file, dpi=140)
    return True


def _colours(study: Study, ranking: Mapping[str, float]) -> dict[str, str]:
    """Return the methods that have a colour: scratch, full fine-tuning, and the three others highest in `ranking`."""
    colours = {name: colour for kind, colour in (("scratch", SCRATCH), ("full_fine_tuning", FULL))
               if (name := study.references[kind])}
    best = sorted((m for m in ranking if m not in colours), key=lambda m: -ranking[m])
    return colours | dict(zip(best, _BEST))


def _name_at_right(axis: Any, points: Mapping[str, tuple[float, float]], colours: Mapping[str, str]) -> None:
    """Write all names in a column to the right of the axis, in the order of their values, with a line to each point."""
    from scipy.optimize import isotonic_regression

    low, high = axis.get_ylim()
    ordered = sorted(points.items(), key=lambda item: item[1][1])
    # Names move as little as needed to be a gap apart. Without the gaps, this is a least-squares fit in fixed order.
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

    figure.draw_without_rendering()  # lays out the axis, so that the sizes of names are known
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
