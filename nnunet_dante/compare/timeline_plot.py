"""Which parts of the network are trained at which epoch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..types import PathLike
from .plots import COLOURS, INK, new_figure, save, set_title
from .results import RunResult
from .study import Study


def unfreezing_timeline(study: Study, file: PathLike) -> bool:
    """Write groups (rows, the head on top) against epochs, coloured while trained; methods that do the same share one.

    Returns whether there was anything to draw: not without stages, nor where every method trains the same throughout.
    """
    shown: dict[tuple, list[str]] = {}
    for method in study.methods:
        run = next((run for run in reversed(study.of(method)) if run.stages and run.curve), None)
        if run is not None:
            shown.setdefault((_key(run), len(run.curve)), []).append(method)
    if not shown or all(len(stages) == 1 for stages, _ in shown) and len(shown) == 1:
        return False
    groups = _groups([key for key, _ in shown])
    columns = min(3, len(shown))
    rows = -(-len(shown) // columns)
    figure, axes = new_figure(max(6.5, 3.2 * columns), (0.22 * len(groups) + 0.75) * rows + 0.8, rows=rows,
                              columns=columns, sharey=True)
    for axis, ((key, epochs), methods) in zip(axes.flat, shown.items()):
        axis.pcolormesh(np.arange(epochs + 1), np.arange(len(groups) + 1), _open(key, groups, epochs), vmin=0, vmax=1,
                        cmap=_two_colours())
        axis.hlines(np.arange(1, len(groups)), 0, epochs, color="white", linewidth=2)
        axis.set_yticks(np.arange(len(groups)) + 0.5, groups, fontsize=8)
        axis.set_title(_wrapped(methods), fontsize=10, color=INK, loc="left")
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


def _key(run: RunResult) -> tuple[tuple[int, tuple[str, ...]], ...]:
    return tuple((int(first), tuple(groups)) for first, groups in run.stages)


def _groups(keys: Sequence[tuple]) -> list[str]:
    """All groups, in the order of the longest list, which is the network's, head first."""
    lists = sorted((groups for key in keys for _, groups in key), key=len, reverse=True)
    return list(dict.fromkeys(group for groups in lists for group in groups))


def _open(key: tuple, groups: Sequence[str], epochs: int) -> np.ndarray:
    """Return 1 where a group is trained, shape (groups, epochs)."""
    trained = np.zeros((len(groups), epochs))
    for first, names in key:
        trained[:, first:] = np.isin(groups, names)[:, None]
    return trained


def _two_colours():
    from matplotlib.colors import ListedColormap

    return ListedColormap(["0.92", COLOURS[1]])


def _wrapped(names: Sequence[str], *, width: int = 34) -> str:
    import textwrap

    return textwrap.fill(", ".join(names), width)
