"""What all figures share, and pictures of cases: the image, the truth, and the masks of a few methods.

matplotlib is imported only when a figure is drawn, and the user's choice of its backend is not changed.
"""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..datasets.views import COLOURS, upright, viewing_plane
from ..files import atomic_path
from ..models.labels import has_regions, plain_labels
from ..types import PathLike
from .sources import CaseFiles, Source
from .study import Shots, Study, case_means, mean_score, shots_of

INK = "0.25"
_MARGIN = 0.25  # around the box of all labels on each side, as a share of its size
_QUANTILES = (0.3, 0.8)  # which slices are shown, as quantiles of the labelled voxels; two slices fit a screen


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
                  loc="outside lower center", ncols=len(shown), frameon=False, fontsize=11, labelcolor=INK)
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


def tidy(axis: Any, *, grid: str = "y") -> None:
    """Keep only the left and lower line of an axis' frame, and draw a pale grid behind the data."""
    axis.grid(axis=grid, color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def save(figure: Any, file: PathLike, *, dpi: int = 130) -> None:
    """Write a figure as PNG, the whole file or nothing."""
    with atomic_path(file) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")


def choose_cases(study: Study, sources: Sequence[Source]) -> tuple[dict[str, Source], dict[str, str], str]:
    """Choose which masks of an experiment to show.

    Returns {method: source}, {kind: case} and the name of the draw. The kinds are "Worst" and "Median". The methods are
    zero-shot, scratch, full fine-tuning and the best others, if their masks are still there.
    """
    drawable = [s for s in sources if not s.result.error and s.masks is not None and s.files is not None]
    draw = _draw(study, drawable)
    if draw is None:
        return {}, {}, ""
    column, seed = draw
    fitting = {s.result.method: s for s in drawable if s.result.is_zero_shot or (
        shots_of(s.result) == column and s.result.seed == seed)}
    special = [m for kind in ("zero_shot", "scratch", "full_fine_tuning") if (m := study.references[kind]) in fitting]
    scores = {m: mean.value for m in fitting if m not in special and (mean := mean_score(study.of(m, column)))}
    best = sorted(scores, key=lambda m: -scores[m])[:max(2, 4 - len(special))]
    shown = {name: fitting[name] for name in [*special, *best]}
    means = [case_means(source.result.cases) for source in shown.values()]
    common = set(means[0]).intersection(*means) if means else set()
    ranked = sorted(common, key=lambda case: (np.mean([mean[case] for mean in means]), case))
    cases = {"Worst": ranked[0], "Median": ranked[len(ranked) // 2]} if ranked else {}
    if len(set(cases.values())) == 1:
        cases = {"Only": ranked[0]} if len(ranked) == 1 else {"Worst": ranked[0]}
    return shown, cases, f"{study.cases_name(column)}, seed {seed}"


def _draw(study: Study, sources: Sequence[Source]) -> tuple[Shots, int] | None:
    """Return the number of training cases and the seed that have the most masks.

    Among equals, it is the number nearest the middle.
    """
    counts = Counter((shots_of(s.result), s.result.seed) for s in sources if not s.result.is_zero_shot)
    distance = {shots: abs(n - len(study.shots) // 2) for n, shots in enumerate(study.shots)}
    return min(counts, key=lambda key: (-counts[key], distance.get(key[0], 0), key[1]), default=None)


def case_picture(shown: Mapping[str, Source], case: str, file: Path, title: str) -> None:
    """Write the overlays of one case.

    Raises:
        Exception: any error about images that are missing, damaged or of another shape.
    """
    files = next(iter(shown.values())).files
    assert files is not None
    truth_file = files.truth(case)
    plane = viewing_plane(truth_file)
    truth, spacing_mm = upright(truth_file, plane)
    masks = {"truth": truth, **{name: upright(s.files.masks(s.masks)[case], plane)[0]
                                for name, s in shown.items() if s.masks is not None and s.files is not None}}
    box, slices = _view(truth)
    overlays(upright(files.image(case), plane)[0][box],
             {name: np.rint(mask[box]).astype(int) for name, mask in masks.items()}, file, labels=label_values(files),
             slices=slices, spacing_mm=spacing_mm, title=title,
             captions={name: f"mean Dice {case_means(s.result.cases)[case]:.2f}" for name, s in shown.items()})


def label_values(files: CaseFiles) -> dict[str, int]:
    """Return label name -> value in a mask; for a region, this is the value that nnU-Net writes for it."""
    plain = plain_labels(dict(files.content))
    values = {name: value for name, value in plain["labels"].items() if name not in ("background", "ignore")}
    return dict(zip(values, plain["regions_class_order"])) if has_regions(plain) else values


def _view(truth: np.ndarray) -> tuple[tuple[slice, ...], list[int]]:
    """Return the box around all labels with a margin, and slices through it; for an empty mask, the whole image."""
    where = np.argwhere(truth > 0)
    if not len(where):
        return (slice(None),) * 3, [truth.shape[2] // 2]
    low, high = where.min(0), where.max(0) + 1
    margin = np.ceil(_MARGIN * (high - low)).astype(int)
    box = tuple(slice(max(0, a - m), b + m) for a, b, m in zip(low[:2], high[:2], margin[:2]))
    slices = dict.fromkeys(int(k) for k in np.quantile(where[:, 2], _QUANTILES, method="nearest"))
    return (*box, slice(None)), list(slices)
