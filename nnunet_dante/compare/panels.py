"""Figures with one panel per method and the references in each panel; and the stages of gradual unfreezing."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..datasets.views import COLOURS, INK, new_figure, set_title
from ..types import PathLike
from .plots import save, tidy
from .results import RunResult
from .study import Shots, Study, mean_score
from .training_log import SHARE, median, peak, reached

METHOD, SCRATCH, FULL, BEFORE = COLOURS[1], "black", "0.55", COLOURS[5]
_COLUMNS = 3
_OWN = {"color": METHOD, "marker": "o", "markerfacecolor": "white", "markersize": 7, "linestyle": "", "zorder": 4}


def shots_panels(study: Study, file: PathLike) -> None:
    """Draw Dice over the number of training cases, with the interval over cases, one panel per method."""
    references, methods = _references(study), _others(study)
    figure, axes = _grid(methods)
    positions = range(len(study.shots))
    for axis, method in zip(axes, methods):
        for name, style in references.items():
            axis.plot(positions, [_dice(study, name, shots)[0] for shots in study.shots], label=name, **style)
        values, low, high = np.array([_dice(study, method, shots) for shots in study.shots]).T
        axis.fill_between(positions, low, high, color=METHOD, alpha=0.18, linewidth=0)
        axis.plot(positions, values, label=method, color=METHOD, linewidth=2.2, marker="o", markersize=4)
        draw_zero_shot(study, axis)
        axis.set_title(method, fontsize=11, color=METHOD, loc="left", fontweight="bold")
        axis.set_xticks(list(positions), [study.shots_name(shots) for shots in study.shots])
    _finish(figure, axes, study, "Dice by number of training cases", "training cases", "Dice", references,
            {"zero-shot": {"color": BEFORE, "linestyle": ":"}} if study.references["zero_shot"] else {})
    save(figure, file)


def curve_panels(study: Study, shots: Shots, file: PathLike) -> None:
    """Draw pseudo Dice over epochs, one panel per method: the mean over draws, and a thin line for each draw.

    The value at epoch 0 is that before training. A dot marks the median epoch at which the method first reached 85 % of
    the scratch run's peak; a ring marks the same for 85 % of its own peak.
    """
    references = _references(study)
    methods = [method for method in _others(study) if any(run.curve for run in study.of(method, shots))]
    figure, axes = _grid(methods)
    scratch = study.of(study.references["scratch"], shots)
    target = SHARE * median([peak(run) for run in scratch])
    several = study.repeated or len(methods) + len(references) > 1
    legend: dict[str, Any] = {f"{SHARE:.0%} of own peak": _OWN} if several else {}
    told = ""
    if not math.isnan(target):
        epochs = median([reached(run, peak(run)).epochs for run in scratch])
        legend = {f"{SHARE:.0%} of scratch's peak (scratch: {epochs:g} epochs)":
                  {"color": BEFORE, "linestyle": ":", "marker": "o"}} | legend
        told = f" and epochs to {SHARE:.0%} of scratch's peak"
    for axis, method in zip(axes, methods):
        runs = [run for run in study.of(method, shots) if run.curve]
        for name, style in references.items():
            axis.plot(*_mean_curve(study.of(name, shots)), label=name, **style)
        for run in runs:
            axis.plot(*_mean_curve([run]), color=METHOD, linewidth=0.7, alpha=0.4)
        axis.plot(*_mean_curve(runs), label=method, color=METHOD, linewidth=2.2)
        own = median([reached(run, peak(run)).epochs for run in runs]), SHARE * median([peak(run) for run in runs])
        if several:
            axis.plot(*own, **_OWN)
        axis.set_title(method + _mark(axis, study, runs, target), fontsize=11, color=METHOD, loc="left",
                       fontweight="bold")
        axis.xaxis.get_major_locator().set_params(integer=True, nbins=5)
    _finish(figure, axes, study, f"Learning curves{told}, {study.cases_name(shots)}", "epochs done", "pseudo Dice",
            references, legend)
    save(figure, file)


def _mark(axis: Any, study: Study, runs: Sequence[RunResult], target: float) -> str:
    """Draw the target and the epoch at which it was reached; return what the title says about it."""
    if math.isnan(target):
        return ""
    axis.axhline(target, label=f"{SHARE:.0%} of scratch's peak", color=BEFORE, linestyle=":", linewidth=1.2)
    scratch = study.references["scratch"]
    epochs = median([reached(run, peak(study.partner(run, scratch))).epochs for run in runs])
    if math.isnan(epochs):
        return ""
    if math.isinf(epochs):
        return ": never"
    axis.plot(epochs, target, "o", color=BEFORE, markersize=7, zorder=5, clip_on=False)
    return f": {epochs:g} epoch{'' if epochs == 1 else 's'}"


def _mean_curve(runs: Sequence[RunResult]) -> tuple[np.ndarray, np.ndarray]:
    """Return epochs, and the mean over runs at each. Epoch 0 is the start; a run counts where it has a value."""
    curves = [[math.nan if run.start_dice is None else run.start_dice, *run.curve] for run in runs if run.curve]
    values = np.full((len(curves), max(map(len, curves), default=0)), np.nan)
    for row, curve in zip(values, curves):
        row[:len(curve)] = curve
    defined = np.isfinite(values)
    epochs = np.flatnonzero(defined.any(0))
    return epochs, np.where(defined, values, 0).sum(0)[epochs] / defined.sum(0)[epochs]


def _others(study: Study) -> list[str]:
    """Return the methods that get a panel: those that are trained and no reference, or else all that are trained."""
    trained = [m for m in study.methods if m != study.references["zero_shot"]]
    return [m for m in trained if m not in _references(study)] or trained


def _references(study: Study) -> dict[str, dict[str, Any]]:
    styles = {"scratch": {"color": SCRATCH, "linestyle": "--", "linewidth": 1.4},
              "full_fine_tuning": {"color": FULL, "linewidth": 2.2}}
    return {name: style for kind, style in styles.items() if (name := study.references[kind])}


def _dice(study: Study, method: str, shots: Shots) -> tuple[float, float, float]:
    mean = mean_score(study.of(method, shots))
    return (math.nan, math.nan, math.nan) if mean is None else (mean.value, *mean.interval)


def draw_zero_shot(study: Study, axis: Any, *, named_at: str = "") -> None:
    """Draw the score without training as a dotted line; `named_at` "left" or "right" writes its name there."""
    name = study.references["zero_shot"]
    before = mean_score(study.of(name))
    if before is None:
        return
    axis.axhline(before.value, label=name, color=BEFORE, linestyle=":", linewidth=1.5)
    if named_at:
        axis.annotate(name, (0.01 if named_at == "left" else 0.99, before.value), xycoords=("axes fraction", "data"),
                      xytext=(0, 3), textcoords="offset points", color=BEFORE, va="bottom", ha=named_at,
                      fontweight="bold")


def _grid(methods: Sequence[str]) -> tuple[Any, list[Any]]:
    columns = min(_COLUMNS, max(1, len(methods)))
    rows = max(1, math.ceil(len(methods) / columns))
    figure, axes = new_figure(max(7.8, 3.1 * columns), 2.1 * rows + 1, rows=rows, columns=columns, sharex=True,
                              sharey=True)
    flat = list(axes.flat)
    for axis in flat[len(methods):]:
        axis.set_visible(False)
    return figure, flat[:len(methods)]


def _finish(figure: Any, axes: Sequence[Any], study: Study, title: str, x: str, y: str, references: dict[str, Any],
            more: dict[str, Any]) -> None:
    from matplotlib.lines import Line2D

    for number, axis in enumerate(axes):
        tidy(axis)
        last = number + _COLUMNS >= len(axes)
        axis.tick_params(labelbottom=last)
        axis.set(xlabel=x if last else "", ylabel="" if number % _COLUMNS else y)
    set_title(figure, study.title(title))
    handles = [Line2D([], [], label=name, **style) for name, style in {**references, **more}.items()]
    if handles:
        fitting = int(figure.get_figwidth() / 2.3)
        figure.legend(handles=handles, loc="outside lower right", ncols=min(len(handles), fitting), frameon=False,
                      fontsize=10, labelcolor=INK)


def unfreezing_timeline(study: Study, file: PathLike) -> bool:
    """Draw which groups of parameters are trained at which epoch, the head on top, one panel per distinct schedule.

    Returns False, and draws nothing, if no stages are known or if every method trains the same groups all the time.
    """
    from matplotlib.colors import ListedColormap

    shown: dict[tuple, list[str]] = {}
    for method in study.methods:
        run = next((run for run in reversed(study.of(method)) if run.stages and run.curve), None)
        if run is not None:
            shown.setdefault((tuple(run.stages), len(run.curve)), []).append(method)
    if not shown or all(len(stages) == 1 for stages, _ in shown) and len(shown) == 1:
        return False
    # The longest list of groups has the order of the network, head first.
    lists = sorted((groups for stages, _ in shown for _, groups in stages), key=len, reverse=True)
    groups = list(dict.fromkeys(group for groups in lists for group in groups))
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = new_figure(max(6.5, 3.2 * columns), (0.22 * len(groups) + 0.75) * rows + 0.8, rows=rows,
                              columns=columns, sharey=True)
    for axis, ((stages, epochs), methods) in zip(axes.flat, shown.items()):
        trained = np.zeros((len(groups), epochs))
        for first, names in stages:
            trained[:, first:] = np.isin(groups, names)[:, None]
        axis.pcolormesh(np.arange(epochs + 1), np.arange(len(groups) + 1), trained, vmin=0, vmax=1,
                        cmap=ListedColormap(["0.92", METHOD]))
        axis.hlines(np.arange(1, len(groups)), 0, epochs, color="white", linewidth=2)
        axis.set_yticks(np.arange(len(groups)) + 0.5, groups, fontsize=8)
        axis.set_title(textwrap.fill(", ".join(methods), 34), fontsize=10, color=INK, loc="left")
        axis.set_ylim(len(groups), 0)
        axis.spines[:].set_visible(False)
        axis.tick_params(length=0)
        axis.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    for axis in axes.flat[len(shown):]:
        axis.set_visible(False)
    set_title(figure, study.title("Trained groups by epoch"))
    figure.supxlabel("epochs done", fontsize=10, color=INK)
    save(figure, file)
    return True
