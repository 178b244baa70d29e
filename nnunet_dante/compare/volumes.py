"""Cases as volumes in a report: NiiVue beside the page, and image and masks in it, small enough for a browser."""

from __future__ import annotations

import base64
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import SimpleITK

from ..datasets.views import COLOURS, first_component
from ..errors import DanteError, ResultError
from ..files import write_text_atomically

VIEWER = Path(__file__).parent / "templates" / "viewer.js"  # the component of the page in the browser, too
NIIVUE = "report_files/niivue.js"  # relative to a report
_MOST_VOXELS = 2_000_000  # of a case in a report: it adds about 2 MB to the page
_MARGIN = 0.25  # around the labels of a volume that is cropped, on each side, as a share of their size
_ENCODED = re.compile(r'"((?:[A-Za-z0-9_.!~*\'()-]|%[0-9A-F]{2}){500000,})"')
_OTHER = 'This version of ipyniivue does not hold NiiVue as expected: pip install "ipyniivue>=2.4.4,<3"'
_EXPORTED = re.compile(r"export\{([^{}]*)\};?\s*$")


@dataclass(frozen=True)
class Volumes:
    """A case in NiiVue.

    title: what is shown. volumes: the image first, then the masks, each with "name", "file" and "url" (its content).
    colours: of the labels, as NiiVue wants them. labels: name -> colour, for the legend. note: what was done to them.
    """

    title: str
    volumes: Sequence[Mapping[str, str]]
    colours: Mapping[str, Any]
    labels: Mapping[str, str]
    note: str


@lru_cache
def niivue() -> bytes:
    """Return NiiVue's JavaScript module.

    ipyniivue carries it as encoded text, for the pages that it saves.

    Raises:
        DanteError: ipyniivue is not installed, or another version carries it in another way.
    """
    found = find_spec("ipyniivue")
    if found is None or found.origin is None:
        raise DanteError('NiiVue, which shows volumes, is not installed: pip install "nnunet-dante[ui]"')
    text = (Path(found.origin).parent / "static" / "widget.js").read_text(encoding="utf-8")
    for match in _ENCODED.finditer(text):
        if "as colortables" in (module := unquote(match[1])) or "Niivue" in module:
            return module.encode()
    raise DanteError(_OTHER)


def write_niivue(folder: Path) -> None:
    """Write NiiVue beside a report in `folder`, as a script that sets `window.niivue`.

    A page that was opened as a file may load scripts from its folder, but no modules.

    Raises:
        DanteError: NiiVue was not found, or has no list of exports at its end.
    """
    module = niivue().decode()
    exported = _EXPORTED.search(module)
    if exported is None:
        raise DanteError(_OTHER)
    names = ",".join(f"{new or old}:{old}" for old, _, new in (
        name.strip().partition(" as ") for name in exported[1].split(",")))
    write_text_atomically(f'(()=>{{"use strict";{module[:exported.start()]};window.niivue={{{names}}}}})();',
                          folder / NIIVUE)


def label_colours(labels: Mapping[str, int]) -> dict[str, str]:
    """Return label name -> its colour, the same as in the pictures."""
    return dict(zip(labels, COLOURS * len(labels)))


def colour_table(labels: Mapping[str, int]) -> dict[str, Any]:
    """Return the colours of label name -> number as NiiVue wants them; the background is transparent."""
    rgb = [(0, 0, 0), *(tuple(bytes.fromhex(colour[1:])) for colour in label_colours(labels).values())]
    return {"R": [c[0] for c in rgb], "G": [c[1] for c in rgb], "B": [c[2] for c in rgb],
            "A": [0] + [255] * len(labels), "I": [0, *labels.values()], "labels": ["", *labels]}


def as_nifti(image: SimpleITK.Image, ending: str = ".nii") -> bytes:
    """Return the first component of an image of 2 or 3 dimensions as a NIfTI file, which NiiVue can read.

    Raises:
        RuntimeError: SimpleITK cannot write it.
    """
    with tempfile.TemporaryDirectory() as folder:
        written, image = Path(folder) / f"volume{ending}", first_component(image)
        SimpleITK.WriteImage(SimpleITK.JoinSeries(image) if image.GetDimension() == 2 else image, str(written), True)
        return written.read_bytes()


def thinning(size: Sequence[int], spacing_mm: Sequence[float], *, most: int) -> list[int]:
    """Return n for each axis of a volume: with only every n-th voxel, it has at most `most`; the finest axes first."""
    steps = [1] * len(size)
    while math.prod(math.ceil(n / step) for n, step in zip(size, steps)) > most:
        axes = [axis for axis, step in enumerate(steps) if step < size[axis]]
        steps[min(axes, key=lambda axis: spacing_mm[axis] * steps[axis])] += 1
    return steps


def case_volumes(image: Path, masks: Mapping[str, Path], *, labels: Mapping[str, int], title: str) -> Volumes:
    """Return a case for a report, cropped to its labels and thinned out if it is too large for a page.

    image: file of the image. masks: name -> file on the image's grid. labels: name -> number in the masks.

    Raises:
        ResultError: a mask is of another shape than the image, or they are neither 2D nor 3D.
        RuntimeError: a file cannot be read.
    """
    grey, *drawn = (SimpleITK.ReadImage(str(file)) for file in (image, *masks.values()))
    for name, mask in zip(masks, drawn):
        if mask.GetSize() != grey.GetSize() or grey.GetDimension() not in (2, 3):
            raise ResultError(f"{name} has {mask.GetSize()} voxels, the image {grey.GetSize()}; both must be equal, "
                              "with 2 or 3 axes.")
    part, note = _part(drawn)
    shown = {"image": _eight_bits(grey), **{f"mask {name}": SimpleITK.Cast(SimpleITK.Round(
        SimpleITK.Cast(mask, SimpleITK.sitkFloat32)), SimpleITK.sitkInt16) for name, mask in zip(masks, drawn)}}
    volumes = [{"name": name, "file": f"{number}.nii.gz", "url": "data:application/gzip;base64," + base64.b64encode(
        as_nifti(volume[part], ".nii.gz")).decode()} for number, (name, volume) in enumerate(shown.items())]
    return Volumes(title, volumes, colour_table(labels), label_colours(labels), note)


def _part(masks: Sequence[SimpleITK.Image]) -> tuple[tuple[slice, ...], str]:
    """Return which part of a case is shown, as slices along SimpleITK's axes, and a sentence about it."""
    size = np.array(masks[0].GetSize())
    low, high, said = np.zeros_like(size), size.copy(), []
    labelled = np.argwhere(np.any([SimpleITK.GetArrayViewFromImage(mask) != 0 for mask in masks], axis=0).T)
    if size.prod() > _MOST_VOXELS and len(labelled):
        first, last = labelled.min(0), labelled.max(0) + 1
        margin = np.ceil(_MARGIN * (last - first)).astype(int)
        low, high = np.maximum(first - margin, 0), np.minimum(last + margin, size)
        said.append("cut to the surroundings of the labels")
    steps = thinning(high - low, masks[0].GetSpacing(), most=_MOST_VOXELS)
    if max(steps) > 1:
        said.append(f"thinned out: every {' x '.join(map(str, steps))} voxels of the image are one here")
    note = f"The volume is too large for a page, so it was {' and '.join(said)}. " if said else ""
    return (tuple(slice(int(a), int(b), s) for a, b, s in zip(low, high, steps)),
            f"{note}Grey values are scaled to 0 to 255. This page holds the voxels of the images.")


def _eight_bits(image: SimpleITK.Image) -> SimpleITK.Image:
    """Return an image as whole numbers from 0 to 255; the darkest and the brightest thousandth are cut off."""
    image = first_component(image)
    low, high = np.nanpercentile(SimpleITK.GetArrayViewFromImage(image), (0.1, 99.9))
    return SimpleITK.Cast(SimpleITK.IntensityWindowing(
        SimpleITK.Cast(image, SimpleITK.sitkFloat32), float(low), float(max(high, low + 1e-6)), 0.0, 255.0),
        SimpleITK.sitkUInt8)
