"""The worst and the median case of an experiment as pictures: image, truth, and the masks of a few methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import SimpleITK

from .comparison import slug
from .document import Block, Picture, Text
from .plots import overlays
from .sources import Source, label_values
from .study import Shots, Study, case_means, mean_score, shots_of

_MARGIN = 0.25  # of the labelled box, on each side
_QUANTILES = (0.25, 0.6)  # two slices, so that the picture fits a screen


def case_pictures(sources: Sequence[Source]) -> Callable[[Study, Path], list[Block]]:
    """Return a function that draws the worst and median case of an experiment, for `write_comparison`."""
    def draw(study: Study, out: Path) -> list[Block]:
        mine = [s for s in sources if s.result.experiment == study.name and not s.result.error]
        return _draw(study, mine, out)

    return draw


def _draw(study: Study, sources: Sequence[Source], out: Path) -> list[Block]:
    if not (shots := _shots(study, sources)):
        return [Text("No pictures of cases: predicted masks or images of these runs were not found.")]
    column, seed = shots
    shown = _shown(study, sources, column, seed)
    dice = {case: np.mean([case_means(source.result.cases)[case] for source in shown.values()])
            for case in sorted(set.intersection(*(set(case_means(s.result.cases)) for s in shown.values())))}
    ranked = sorted(dice, key=lambda case: dice[case])
    blocks: list[Block] = []
    chosen = {ranked[len(ranked) // 2]: "Median", ranked[0]: "Worst"} if ranked else {}
    for case, kind in reversed(chosen.items()):
        name = slug(f"{study.name} {kind} case")
        title = study.title(f"{kind} case, {case}; {study.cases_name(column)}, seed {seed}")
        _overlay(shown, case, out / "plots" / f"{name}.png", title)
        blocks.append(Picture(f"plots/{name}.png", f"{title}. Ranked by the mean Dice of the methods shown."))
    return blocks


def _drawable(source: Source) -> bool:
    return all(place is not None and place.exists() for place in (source.masks, source.raw, source.dataset_json))


def _shots(study: Study, sources: Sequence[Source]) -> tuple[Shots, int] | None:
    """The middle number of training cases, and the draw, with the most masks."""
    counts: dict[tuple[Shots, int], int] = {}
    for source in sources:
        if _drawable(source) and not source.result.is_zero_shot:
            key = (shots_of(source.result), source.result.seed)
            counts[key] = counts.get(key, 0) + 1
    middle = len(study.shots) // 2
    order = {shots: abs(n - middle) for n, shots in enumerate(study.shots)}
    return min(counts, key=lambda key: (-counts[key], order.get(key[0], 0), key[1]), default=None)


def _shown(study: Study, sources: Sequence[Source], column: Shots, seed: int) -> dict[str, Source]:
    """Zero-shot, scratch, full fine-tuning and the best other method, as far as their masks are there."""
    fitting = {s.result.method: s for s in sources if _drawable(s) and (
        s.result.is_zero_shot or (shots_of(s.result) == column and s.result.seed == seed))}
    kinds = (study.special(kind) for kind in ("zero_shot", "scratch", "full_fine_tuning"))
    special = [name for name in kinds if name in fitting]
    scores = {m: mean.value for m in fitting if m not in special and (mean := mean_score(study.of(m, column)))}
    best = sorted(scores, key=lambda m: -scores[m])[:max(1, 4 - len(special))]
    return {name: fitting[name] for name in [*special, *best]}


def _overlay(shown: Mapping[str, Source], case: str, file: Path, title: str) -> None:
    source = next(iter(shown.values()))
    assert source.raw is not None and source.dataset_json is not None
    labels = label_values(source.dataset_json)
    images = sorted((source.raw / "imagesTr").glob(f"{case}_0000*")) or sorted(
        (source.raw / "imagesTs").glob(f"{case}_0000*"))
    truths = sorted((source.raw / "labelsTr").glob(f"{case}.*")) or sorted((source.raw / "labelsTs").glob(f"{case}.*"))
    image, spacing_mm = _upright(images[0])
    truth, _ = _upright(truths[0])
    masks = {"truth": truth, **{name: _upright(next(s.masks.glob(f"{case}.*")))[0]
                                for name, s in shown.items() if s.masks is not None}}
    box, slices = _view(truth)
    captions = {name: f"mean Dice {case_means(s.result.cases)[case]:.2f}" for name, s in shown.items()}
    overlays(image[box], {name: np.rint(mask[box]).astype(int) for name, mask in masks.items()}, file, labels=labels,
             slices=slices, spacing_mm=spacing_mm, captions=captions, title=title)


def _upright(file: Path) -> tuple[np.ndarray, list[float]]:
    """Return a volume with axes (left, posterior, superior), so that a transposed slice is a radiologist's view."""
    volume = SimpleITK.ReadImage(str(file))
    if volume.GetNumberOfComponentsPerPixel() > 1:  # a colour image
        volume = SimpleITK.VectorIndexSelectionCast(volume, 0)
    if volume.GetDimension() == 3:
        volume = SimpleITK.DICOMOrient(volume, "LPS")
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
    labelled = np.unique(where[:, 2])
    slices = dict.fromkeys(int(k) for k in np.quantile(labelled, _QUANTILES, method="nearest"))
    return (*box, slice(None)), list(slices)
