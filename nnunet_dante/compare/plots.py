"""Figures, and pictures of cases: the image, the truth, and the masks of a few methods.

matplotlib is imported when a figure is drawn, and its backend stays as the user chose it.
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
from .sources import CaseFiles, Source
from .study import Shots, Study, case_means, mean_score, shots_of

# Okabe and Ito's colours, told apart by most people with a colour vision deficiency; black and grey are left out,
# they are the image. Neighbours in this order also differ in lightness.
COLOURS = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
INK = "0.25"
_MARGIN = 0.25  # of the labelled box, on each side
_QUANTILES = (0.3, 0.8)  # of the labelled voxels by slice; two, so that the picture fits a screen
_THICK = 1.5  # a voxel so many times as long as wide makes the image a stack of slices
_PLANES = ("PIL", "LIP", "LPS")  # axes of a sagittal, coronal and axial view: to the right, down, through the slices


def overlays(image: np.ndarray, masks: Mapping[str, np.ndarray], file: PathLike, *, labels: Mapping[str, int],
             slices: Sequence[int], spacing_mm: Sequence[float], captions: Mapping[str, str] | None = None,
             title: str = "") -> None:
    """Write slices of an image, one row per slice: the image alone, then under each mask, with a colour per label.

    image: shape (horizontal, vertical, slices), so that image[:, :, k].T is seen upright.
    masks: title -> label map of the image's shape. file: the PNG to write.
    labels: name -> integer in the masks. slices: indices of the slices to show.
    spacing_mm: voxel size along the image's axes. captions: title of a mask -> a line below it.
    title: of the whole picture.
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


def tidy(axis: Any, *, grid: str = "y") -> None:
    """Leave of an axis' frame the left and lower line, and a pale grid behind the data."""
    axis.grid(axis=grid, color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def save(figure: Any, file: PathLike, *, dpi: int = 130) -> None:
    """Write a figure as PNG, whole or not at all."""
    with atomic_path(file) as temporary:
        figure.savefig(temporary, dpi=dpi, format="png")


def choose_cases(study: Study, sources: Sequence[Source]) -> tuple[dict[str, Source], dict[str, str], str]:
    """Choose what to show of an experiment: method -> source, kind ("Worst", "Median") -> case, and of which draw.

    The methods are zero-shot, scratch, full fine-tuning and the best others, as far as their masks are still there.
    """
    drawable = [s for s in sources if not s.result.error and s.masks is not None and s.files is not None]
    draw = _draw(study, drawable)
    if draw is None:
        return {}, {}, ""
    column, seed = draw
    fitting = {s.result.method: s for s in drawable if s.result.is_zero_shot or (
        shots_of(s.result) == column and s.result.seed == seed)}
    special = [m for kind in ("zero_shot", "scratch", "full_fine_tuning") if (m := study.special(kind)) in fitting]
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
    """Return the number of training cases, and the seed, with the most masks; of equals that nearest the middle."""
    counts: dict[tuple[Shots, int], int] = {}
    for source in sources:
        if not source.result.is_zero_shot:
            key = (shots_of(source.result), source.result.seed)
            counts[key] = counts.get(key, 0) + 1
    distance = {shots: abs(n - len(study.shots) // 2) for n, shots in enumerate(study.shots)}
    return min(counts, key=lambda key: (-counts[key], distance.get(key[0], 0), key[1]), default=None)


def case_picture(shown: Mapping[str, Source], case: str, file: Path, title: str) -> None:
    """Write the overlays of one case.

    Raises:
        Exception: whatever goes wrong with images that are missing, damaged or of another shape.
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
    """Return label name -> value in a mask; of a region the value that nnU-Net writes for it."""
    names = [name for name in files.content["labels"] if name not in ("background", "ignore")]
    if order := files.content.get("regions_class_order"):
        return dict(zip(names, map(int, order)))
    return {name: int(files.content["labels"][name]) for name in names}


def viewing_plane(file: Path) -> str:
    """Return the axes of a mask's view (see `_PLANES`).

    Thick slices are shown as they were taken. Where voxels are almost cubes, the view is the one that shows most of
    what is labelled: it looks along the labels' shortest extent.
    """
    voxels, size_mm = upright(file, "LPS")
    labelled = np.argwhere(voxels > 0)
    if voxels.shape[2] > 1 and max(size_mm) >= _THICK * min(size_mm):
        return _PLANES[int(np.argmax(size_mm))]  # thick from left to right: sagittal slices
    if voxels.shape[2] > 1 and len(labelled):
        return _PLANES[int(np.argmin(np.ptp(labelled, axis=0) * size_mm))]
    return "LPS"


def upright(file: Path, plane: str) -> tuple[np.ndarray, list[float]]:
    """Return a volume with its axes in the directions `plane`, and its voxel size in mm along them."""
    volume = SimpleITK.ReadImage(str(file))
    if volume.GetNumberOfComponentsPerPixel() > 1:  # a colour image
        volume = SimpleITK.VectorIndexSelectionCast(volume, 0)
    if volume.GetDimension() == 3:
        volume = SimpleITK.DICOMOrient(volume, plane)
    voxels = SimpleITK.GetArrayFromImage(volume).T
    spacing_mm = [*volume.GetSpacing(), 1.0][:3]
    return (voxels if voxels.ndim == 3 else voxels[:, :, None]), spacing_mm


def _view(truth: np.ndarray) -> tuple[tuple[slice, ...], list[int]]:
    """Return the labelled box with a margin, and slices through it; all there is of an empty mask."""
    where = np.argwhere(truth > 0)
    if not len(where):
        return (slice(None),) * 3, [truth.shape[2] // 2]
    low, high = where.min(0), where.max(0) + 1
    margin = np.ceil(_MARGIN * (high - low)).astype(int)
    box = tuple(slice(max(0, a - m), b + m) for a, b, m in zip(low[:2], high[:2], margin[:2]))
    slices = dict.fromkeys(int(k) for k in np.quantile(where[:, 2], _QUANTILES, method="nearest"))
    return (*box, slice(None)), list(slices)
