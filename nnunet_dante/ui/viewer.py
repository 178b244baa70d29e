"""Volumes in the browser: NiiVue, as the Python package ipyniivue carries it, and the files that it shows."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

import SimpleITK
from fastapi.responses import FileResponse, PlainTextResponse, Response
from nicegui import app
from nicegui.element import Element

from ..compare.volumes import VIEWER, as_nifti, colour_table, niivue
from ..errors import DanteError
from .roots import Roots

FRESH = {"Cache-Control": "no-cache"}  # the browser asks whether a file has changed: masks are predicted again
_AS_IS = (".nii.gz", ".nii")


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
    def volume(path: str):
        found = file_below(roots, path)
        if not isinstance(found, Path):
            return found
        if found.name.endswith(_AS_IS):
            return FileResponse(found, media_type="application/octet-stream", headers=FRESH)
        return _converted(found)


def _converted(path: Path) -> Response:
    """Return a volume or picture of another format as NIfTI, which NiiVue can read."""
    try:
        return Response(as_nifti(SimpleITK.ReadImage(str(path))), media_type="application/octet-stream", headers=FRESH)
    except RuntimeError as error:
        return PlainTextResponse(f"{path} cannot be read: {str(error).strip().splitlines()[-1]}", 422)
