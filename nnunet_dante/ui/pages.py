"""The addresses of the page, and what each of them shows."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi.responses import FileResponse
from nicegui import app, ui

from ..errors import DanteError
from .data import show_data
from .layout import frame, problem
from .monitor import show_run, show_runs
from .plan import show_plan
from .result import show_comparison, show_result
from .roots import Roots
from .start import show_start
from .viewer import FRESH, add_viewer, file_below

_FOREIGN = {**FRESH, "Content-Security-Policy": (
    "sandbox allow-same-origin; default-src 'none'; img-src 'self' data:; style-src 'unsafe-inline'; "
    "frame-ancestors 'self'")}


def add_pages(roots: Roots) -> None:
    """Make the addresses known to NiceGUI.

    roots: the folders that the page may look into.
    """
    def page(path: str, title: str, show: Callable[..., Awaitable[None]]) -> None:
        async def shown(folder: str = "", labels: str = "", channels: str = "", without: str = "",
                        masks: str = "") -> None:
            with frame(title, path):
                try:
                    given = {"labels": labels, "channels": channels, "without": without, "masks": masks}
                    await show(roots, folder=folder, options={
                        name: [word for word in text.split(",") if word] for name, text in given.items() if text})
                except DanteError as error:
                    problem(str(error))
                except (ArithmeticError, AttributeError, LookupError, OSError, TypeError, ValueError) as error:
                    problem(f"What lies in {folder} cannot be shown ({type(error).__name__}: {error}).")

        ui.page(path)(shown)

    for path, title, show in (
            ("/", "Adapt a network to your images", show_start), ("/data", "Data", show_data),
            ("/adapt", "Adapt", show_plan), ("/runs", "Runs", show_runs), ("/run", "Run", show_run),
            ("/result", "Result", show_result), ("/compare", "Compare", show_comparison)):
        page(path, title, show)

    @app.get("/file/{path:path}")
    def file(path: str):
        """Send a file below the roots; a page that comes from there may run no scripts."""
        found = file_below(roots, path)
        return FileResponse(found, headers=_FOREIGN) if isinstance(found, Path) else found

    add_viewer(roots)
