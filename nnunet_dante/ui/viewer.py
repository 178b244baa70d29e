"""Volumes in the browser: NiiVue, as the Python package ipyniivue carries it, and the files that it shows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

import SimpleITK
from fastapi.responses import FileResponse, PlainTextResponse, Response
from nicegui import app
from nicegui.element import Element

from ..compare.volumes import VIEWER, as_nifti, colour_table, niivue, thinning
from ..errors import DanteError
from .roots import Roots

FRESH = {"Cache-Control": "no-cache"}  # the browser asks whether a file has changed: masks are predicted again
_AS_IS = (".nii.gz", ".nii")
_MOST_DRAWN = 10_000_000  # voxels; a browser without a graphics card takes seconds for as many


class Viewer(Element, component=VIEWER):
    """An image with masks over it, in slices and in 3D.

    label: what screen readers say. labels: name -> value in the masks, for their colours.
    """

    def __init__(self, label: str, labels: dict[str, int]):
        super().__init__()
        self._props["label"] = label
        self._props["colours"] = colour_table(labels)

    def show(self, image: Path, masks: dict[str, Path]) -> None:
        """Show an image, and masks by name, of which the page sets the opacity."""
        self._props["volumes"] = [_volume("image", image), *(_volume(name, path) for name, path in masks.items())]
        self.update()

    def opacity(self, name: str, value: float) -> None:
        """Set how opaque a mask or the image is, 0 to 1."""
        self.run_method("opacity", name, value)

    def arrange(self, how: str) -> None:
        """Show "axial", "coronal", "sagittal", "multiplanar" or "render"."""
        self.run_method("arrange", how)

    def outlines(self, width: float) -> None:
        """Show masks as outlines of this width in voxels; 0 fills them."""
        self.run_method("outlines", width)

    def window(self, low: float, high: float) -> None:
        """Set which share of the image's range of values is black and which is white, both 0 to 1."""
        self.run_method("window", low, high)


def _volume(name: str, path: Path) -> dict[str, str]:
    return {"name": name, "url": f"/volume{quote(str(path))}", "file": f"{name}.nii.gz" if path.name.endswith(
        ".gz") else f"{name}.nii"}


def file_below(roots: Roots, path: str) -> Path | PlainTextResponse:
    """Return the file that a browser asked for, or the answer that says why it may not have it."""
    try:
        found = roots.path(f"/{path}", hidden=False)
    except DanteError as error:
        return PlainTextResponse(str(error), 403)
    return found if found.is_file() else PlainTextResponse(f"{found} is no file.", 404)


def add_viewer(roots: Roots) -> None:
    """Make the module and the volumes below the roots available to the page."""
    @app.get("/niivue.js")
    def module():
        try:
            return Response(niivue(), media_type="text/javascript", headers={"Cache-Control": "private, max-age=86400"})
        except DanteError as error:
            return PlainTextResponse(str(error), 500)

    @app.get("/volume/{path:path}")
    def volume(path: str, slow: bool = False):
        found = file_below(roots, path)
        if not isinstance(found, Path):
            return found
        try:
            every = _every(found) if slow else ()
            if found.name.endswith(_AS_IS) and max(every, default=1) == 1:
                return FileResponse(found, media_type="application/octet-stream", headers=FRESH)
            return _converted(found, every)
        except RuntimeError as error:
            return PlainTextResponse(f"{found} cannot be read: {str(error).strip().splitlines()[-1]}", 422)


def _every(path: Path) -> list[int]:
    """Return n for each axis of a volume: with every n-th voxel, a browser without a graphics card can draw it."""
    header = SimpleITK.ImageFileReader()
    header.SetFileName(str(path))
    header.ReadImageInformation()
    return thinning(header.GetSize(), header.GetSpacing(), most=_MOST_DRAWN)


def _converted(path: Path, every: Sequence[int]) -> Response:
    """Return a volume or picture as NIfTI, which NiiVue can read; every: as `_every` returns it, or empty for all."""
    image, headers = SimpleITK.ReadImage(str(path)), dict(FRESH)
    if max(every, default=1) > 1:
        full = image.GetSize()
        image = image[tuple(slice(None, None, step) for step in every)]
        headers["X-Reduced"] = " of ".join(" x ".join(map(str, size)) for size in (image.GetSize(), full))
    return Response(as_nifti(image), media_type="application/octet-stream", headers=headers)
