"""Pictures of three slices with outlines, the table of all cases with what is unusual, and the page that shows both."""

from __future__ import annotations

import html
import io
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas
import SimpleITK
from PIL import Image, ImageColor

from ..views import COLOURS, upright, viewing_plane
from .volumes import same_space

if TYPE_CHECKING:
    from .examine import Facts

_HEIGHT = 220  # pixels of a slice
_QUANTILES = (0.2, 0.5, 0.8)  # of the labelled voxels by slice
_FAR = 5.0  # from the median, in units of the usual spread (1.48 * median absolute deviation)
_LEAST_SPREAD = 0.05  # of the median: below that nothing is unusual
_STYLE = ("body{font:15px/1.5 system-ui,sans-serif;color:#222;max-width:70rem;margin:1rem auto;padding:0 1rem}"
          "table{border-collapse:collapse;font-size:.8rem}td,th{padding:.2em .6em;border-bottom:1px solid #ddd;"
          "text-align:right}td:first-child{text-align:left}.odd{background:#fde9c8}img{max-width:100%}"
          "figure{margin:1em 0}.scroll{overflow-x:auto}")


def picture(image: SimpleITK.Image, label_map: np.ndarray) -> bytes:
    """Return a JPEG of three slices beside each other with the outline of each label.

    label_map: on the image's grid, axes as in SimpleITK's arrays.
    """
    mask = same_space(image, np.ascontiguousarray(label_map.astype(np.uint16)))
    plane = viewing_plane(mask)
    voxels, size_mm = upright(image, plane)
    labels, _ = upright(mask, plane)
    where = np.nonzero(labels.any((0, 1)))[0]
    slices = np.quantile(where if len(where) else np.arange(labels.shape[2]), _QUANTILES, method="nearest")
    low, high = np.percentile(voxels[:, :, slices], (1, 99))
    width, height = (n * mm for n, mm in zip(voxels.shape[:2], size_mm))
    size = (max(1, min(3 * _HEIGHT, round(_HEIGHT * width / height))), _HEIGHT)
    tiles = [outlined(np.clip((voxels[:, :, k].T - low) / max(high - low, 1e-9), 0, 1), labels[:, :, k].T, size)
             for k in dict.fromkeys(int(k) for k in slices)]
    buffer = io.BytesIO()
    Image.fromarray(np.hstack(tiles)).save(buffer, "JPEG", quality=88, subsampling=0)
    return buffer.getvalue()


def outlined(grey: np.ndarray, labels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Return a slice as colours, with the outline of each label.

    grey: from 0 to 1, shape (height, width). labels: the same shape. size: width and height of the result in pixels.
    """
    shown = np.asarray(Image.fromarray((255 * np.sqrt(grey)).astype(np.uint8)).resize(size, Image.Resampling.BICUBIC))
    tile = np.repeat(shown[:, :, None], 3, 2)
    fine = np.asarray(Image.fromarray(labels.astype(np.int32)).resize(size, Image.Resampling.NEAREST))
    inner = np.pad(fine, 1, mode="edge")
    edge = np.zeros(fine.shape, bool)
    for down, right in ((0, 1), (2, 1), (1, 0), (1, 2)):
        edge |= inner[down:down + fine.shape[0], right:right + fine.shape[1]] != fine
    for value in np.unique(fine[fine > 0]):
        tile[edge & (fine == value)] = ImageColor.getrgb(COLOURS[(int(value) - 1) % len(COLOURS)])
    return tile


def table(facts: Sequence[Facts], channels: Sequence[str]) -> pandas.DataFrame:
    """Return one row per case: files, shape, spacing, orientation, intensity, volumes; and what is unusual in it."""
    rows = []
    for f in facts:
        row: dict[str, object] = {"case": f.case.name, "patient": f.case.patient,
                                  "image": "; ".join(p.text for p in f.case.images.values())}
        if f.header is not None:
            row |= {"shape": " x ".join(map(str, f.header.size)), "orientation": f.header.codes or "none"}
            row |= {f"spacing {axis} mm": round(mm, 4) for axis, mm in zip("123", f.header.spacing_mm)}
            row |= {"voxels": math.prod(f.header.size), "type": f.voxel_type}
        for channel, values in zip(channels, f.intensity):
            row |= {f"{channel} {name}": float(f"{value:.5g}") for name, value in values.items()}
        row |= {f"{label} voxels": count for label, count in f.volumes.items()}
        row["notes"] = "; ".join([*f.faults, *f.warnings])
        rows.append(row)
    found = pandas.DataFrame(rows)
    found.insert(3, "unusual", ["; ".join(names) for names in _unusual(found)])
    return found


def _unusual(found: pandas.DataFrame) -> list[list[str]]:
    """Return for each row the columns in which it lies far from the others."""
    result: list[list[str]] = [[] for _ in range(len(found))]
    for name in found.columns[4:-1]:
        if name.endswith((" min", " p1", " max")) or name in ("shape", "type"):
            continue  # single voxels, and what differs in most data sets
        column = found[name]
        if column.dtype.kind in "if":
            middle = column.median()
            spread = max(1.4826 * (column - middle).abs().median(), _LEAST_SPREAD * abs(middle), 1e-9)
            odd = ((column - middle).abs() > _FAR * spread) & (len(found) > 3)
        else:
            odd = column.notna() & (column != column.mode().get(0))
        for row in np.flatnonzero(odd.to_numpy()):
            result[row].append(name)
    return result


def page(title: str, cases: pandas.DataFrame, labels: Mapping[str, int], pictures: Sequence[str]) -> str:
    """Return the preview as HTML.

    labels: name -> value in the masks. pictures: names of the cases that have preview/CASE.jpg.
    """
    colours = " ".join(f'<b style="color:{COLOURS[(value - 1) % len(COLOURS)]}">{html.escape(name)}</b>'
                       for name, value in labels.items())
    figures = "".join(f'<figure><img loading="lazy" src="preview/{name}.jpg" alt="{name}"><figcaption>{name}'
                      "</figcaption></figure>" for name in pictures)
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in cases.columns)
    body = "".join(f'<tr{" class=odd" if row["unusual"] else ""}>' + "".join(
        f"<td>{html.escape('' if pandas.isna(value) else str(value))}</td>" for value in row) + "</tr>"
        for _, row in cases.iterrows())
    return (f'<!DOCTYPE html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title>'
            f"<style>{_STYLE}</style><h1>{html.escape(title)}</h1><p>Look at every case: does each outline follow its "
            f"structure? Labels: {colours}. Rows in colour are unusual; the column <i>unusual</i> says in what.</p>"
            f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>{figures}')
