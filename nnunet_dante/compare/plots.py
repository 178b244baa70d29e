"""Pictures of cases: the image, the truth, and the masks of a few methods; and how plots look and say their values."""

from __future__ import annotations

import html
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK

from ..datasets.views import overlays, upright, viewing_plane
from ..datasets.views import save as save_png
from ..files import write_text_atomically
from ..models.labels import has_regions, plain_labels
from ..types import PathLike
from .sources import CaseFiles, Source
from .study import Shots, Study, case_means, mean_score, shots_of

_MARGIN = 0.25  # around the box of all labels on each side, as a share of its size
_QUANTILES = (0.3, 0.8)  # which slices are shown, as quantiles of the labelled voxels; two slices fit a screen
_MOST_POINTS = 40  # of a line that say their values
_LARGEST_SVG = 1_000_000  # characters; a larger plot stays a PNG, so that the page stays small


def tidy(axis: Any, *, grid: str = "y") -> None:
    """Keep only the left and lower line of an axis' frame, and draw a pale grid behind the data."""
    axis.grid(axis=grid, color="0.9")
    axis.set_axisbelow(True)
    axis.spines[["top", "right"]].set_visible(False)


def save(figure: Any, file: PathLike, *, dpi: int = 130) -> None:
    """Write a figure as PNG, and beside it as SVG, in which each point of a line that has a label says its values."""
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG

    save_png(figure, file, dpi=dpi)
    written, place = io.StringIO(), Path(file).with_suffix(".svg")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": place.stem, "path.simplify_threshold": 0.3}):
        FigureCanvasSVG(figure).print_svg(written, metadata={"Date": None})
    text = written.getvalue().replace("</svg>", f"{''.join(_values(figure))}</svg>")
    if len(text) > _LARGEST_SVG:
        place.unlink(missing_ok=True)  # of an earlier report
    else:
        write_text_atomically(text, place)


def drawn(picture: Path) -> str:
    """Return a plot as SVG for the inside of a web page, or "" where there is only a PNG file."""
    place = picture.with_suffix(".svg")
    if not place.is_file():
        return ""
    text = place.read_text(encoding="utf-8")
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>| xmlns(:xlink)?=\"[^\"]*\"", "", text, flags=re.S)
    return re.sub(r'( id="| xlink:href="#|url\(#)', rf"\g<1>{place.stem}-", text[text.index("<svg"):])


def _values(figure: Any) -> Iterator[str]:
    """Yield invisible circles and lines as SVG that say what is drawn below them when the pointer rests there."""
    scale, height = 72 / figure.dpi, figure.bbox.height
    names = [next(filter(None, found), "") for found in zip(*((a.get_xlabel(), a.get_ylabel()) for a in figure.axes))]
    x_name, y_name = (name.split(",")[0] for name in names)
    for axis in filter(lambda axis: axis.get_visible(), figure.axes):
        for line in (line for line in axis.lines if not str(line.get_label()).startswith("_")):
            data = np.asarray(line.get_xydata(), float)
            data = data[np.isfinite(data).all(1)]
            if not len(data):
                continue
            data = data[np.unique(np.linspace(0, len(data) - 1, min(len(data), _MOST_POINTS)).astype(int))]
            places = (line.get_transform().transform(data) * (1, -1) + (0, height)) * scale
            whole = line.get_transform() != axis.transData  # from side to side, so that only y is a value
            name = str(line.get_label())
            said = [[_said(axis.yaxis, y, y_name), *([] if whole else [_said(axis.xaxis, x, x_name)])] for x, y in data]
            titles = [f"<title>{html.escape(', '.join([name, *(w for w in words if not name.startswith(w))]))}</title>"
                      for words in said]
            if whole:
                (x1, y), (x2, _) = places
                yield (f'<path d="M{x1:.1f} {y:.1f}H{x2:.1f}" stroke="#fff" stroke-opacity="0" stroke-width="8">'
                       f"{titles[0]}</path>")
            else:
                yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="6" fill-opacity="0">{title}</circle>'
                            for (x, y), title in zip(places, titles))


def _said(axis: Any, value: float, name: str) -> str:
    """Return the name that an axis writes at a value, or else the value; before it, what the axis shows."""
    from matplotlib.ticker import FixedFormatter

    if isinstance(axis.get_major_formatter(), FixedFormatter):
        text = dict(zip(axis.get_ticklocs(), axis.get_major_formatter().seq)).get(value, "")
    else:
        text = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{name} {text}".strip()


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
    return shown, cases, study.cases_name(column) + (f", seed {seed}" if study.repeated else "")


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
    image, masks, labels = case_files(shown, case)
    draw_masks(image, masks, file, labels=labels, title=title,
               captions={name: f"mean Dice {case_means(s.result.cases)[case]:.2f}" for name, s in shown.items()})


def case_files(shown: Mapping[str, Source], case: str) -> tuple[Path, dict[str, Path], dict[str, int]]:
    """Return a case's image, its masks by name (the truth first), and label name -> value in the masks.

    Raises:
        ResultError: the image or the truth was not found.
        KeyError: a mask was not found.
    """
    files = next(iter(shown.values())).files
    assert files is not None
    masks = {"truth": files.truth(case), **{name: s.files.masks(s.masks)[case] for name, s in shown.items()
                                            if s.masks is not None and s.files is not None}}
    return files.image(case), masks, label_values(files)


def draw_masks(image: Path | SimpleITK.Image, masks: Mapping[str, Path], file: Path, *, labels: Mapping[str, int],
               title: str, captions: Mapping[str, str]) -> None:
    """Draw masks of one case on its image; the first of them says which slices and which part are shown.

    The arguments are those of `overlays`, with files or images instead of arrays.

    Raises:
        Exception: any error about images that are missing, damaged or of another shape.
    """
    first = next(iter(masks.values()))
    plane = viewing_plane(first)
    voxels, spacing_mm = upright(first, plane)
    box, slices = _view(voxels)
    overlays(upright(image, plane)[0][box],
             {name: np.rint(upright(mask, plane)[0][box]).astype(int) for name, mask in masks.items()}, file,
             labels=labels, slices=slices, spacing_mm=spacing_mm, title=title, captions=captions)


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
