"""What all pages share: the frame, headings, boxes for problems, folders to choose from, and addresses."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from nicegui import ui

from ..errors import DanteError
from ..files import printable
from .roots import Roots

PAGES = {"/": "Start", "/data": "Data", "/runs": "Runs", "/compare": "Compare"}
STATIC = Path(__file__).parent / "static"


@lru_cache
def _style() -> str:
    return (STATIC / "page.css").read_text(encoding="utf-8")


@contextmanager
def frame(title: str, current: str = "") -> Iterator[None]:
    """Lay out a page: its name for the browser, the bar with all pages, and `title` as its heading."""
    ui.colors(primary="#1d5687", positive="#1a7348", negative="#b3261e", warning="#8a5a00")
    ui.page_title(f"{title} - nnunet-dante")
    ui.add_css(_style())
    with ui.header(elevated=False).classes("bar"):
        ui.link("nnunet-dante", "/").classes("brand")
        with ui.element("nav").props('aria-label="Pages"'):
            for address, name in PAGES.items():
                ui.link(name, address).props('aria-current="page"' if address == current else "")
    with ui.element("main").classes("page"):
        heading(title, 1)
        yield


def heading(text: str, level: int = 2) -> None:
    """Show a heading; the level is for screen readers, too."""
    ui.label(printable(text)).classes(f"h{level}").props(f'role="heading" aria-level="{level}"')


def problem(text: str, kind: str = "problem") -> None:
    """Show what is wrong (or, with another kind, what to know) in a box that screen readers announce."""
    ui.label(printable(text)).classes(f"box {kind}").props('role="alert"' if kind == "problem" else 'role="status"')


def escaped(text: str) -> str:
    """Return foreign text as it may stand in HTML, also inside quotes."""
    return html.escape(printable(text))


def code(text: str, label: str) -> str:
    """Return the HTML of lines that are shown as they are, such as commands or a log."""
    return f'<pre class="log" tabindex="0" role="region" aria-label="{escaped(label)}">{escaped(text)}</pre>'


def chart(*, x: str, y: str, series: Sequence[dict[str, Any]] = (), second: bool = False,
          **limits: float) -> dict[str, Any]:
    """Return the options of a chart of lines; values of a series with yAxisIndex 1 need `second`.

    limits: of the axes, such as x_min=0 or y_max=1.
    """
    across = {"type": "value", "name": x, "nameLocation": "middle", "nameGap": 26, "min": limits.get("x_min"),
              "max": limits.get("x_max"), "minInterval": limits.get("x_step")}
    up = {"type": "value", "name": y, "scale": True, "min": limits.get("y_min"), "max": limits.get("y_max")}
    right = [{"type": "value", "scale": True, "splitLine": {"show": False}}] if second else []
    return {"animation": False, "legend": {"top": 0, "type": "scroll", "textStyle": {"color": "#6b7885"}},
            "grid": {"left": 50, "right": 55, "bottom": 40, "top": 45}, "tooltip": {"trigger": "axis"},
            "xAxis": across, "yAxis": [up, *right], "series": list(series)}


def numbers(facts: Iterable[tuple[str, str]]) -> None:
    """Show (name, value) pairs, the values large."""
    for name, value in facts:
        with ui.element("div"):
            ui.label(printable(value)).classes("value")
            ui.label(name).classes("quiet")


def address(page: str, **values: str | list[str]) -> str:
    """Return the address of a page; empty values are left out."""
    query = urlencode({key: value for key, value in values.items() if value}, doseq=True)
    return f"{page}?{query}" if query else page


def attempt(action: Callable[[], object]) -> bool:
    """Do something and tell the user if it fails; return whether it went well."""
    try:
        action()
    except DanteError as error:
        tell(error)
        return False
    return True


@contextmanager
def busy(button: ui.button, place: ui.element) -> Iterator[None]:
    """Let a button rest while what it starts is done, and show in `place` what goes wrong."""
    button.disable()
    place.clear()
    try:
        yield
    except DanteError as error:
        place.clear()
        with place:
            problem(str(error))
    finally:
        button.enable()


def tell(error: Exception) -> None:
    """Show an error until the user closes it."""
    ui.notify(printable(str(error)), type="negative", multi_line=True, timeout=0, close_button="Close")


@contextmanager
def panel(title: str = "") -> Iterator[None]:
    """A box with a heading."""
    with ui.element("section").classes("panel"):
        if title:
            heading(title)
        yield


def choose_folder(roots: Roots, start: str, page: Callable[[str], str], verb: str) -> None:
    """Show the folders below the roots, one at a time, and a button that goes to `page` of the chosen one.

    start: the folder that is shown first. verb: what the button says.
    """
    with ui.element("div").classes("row"):
        field = ui.input("Folder", value=start).classes("grow").props("outlined dense")
        ui.button(verb, on_click=lambda: ui.navigate.to(page(field.value))).props("unelevated no-caps")
    field.on("keydown.enter", lambda: ui.navigate.to(page(field.value)))
    listing = ui.element("div").classes("folders").props('role="group" aria-label="Folders"')

    def show(folder: Path) -> None:
        field.value = str(folder)
        listing.clear()
        with listing:
            above = folder.parent
            if any(above.is_relative_to(root) for root in roots.folders):
                _folder_button("..", lambda: show(above), "Folder above")
            elif len(roots.folders) > 1:
                for root in roots.folders:
                    _folder_button(str(root), partial(show, root))
            try:
                inside = roots.inside(folder)
            except DanteError as error:
                problem(str(error))
                return
            for entry in inside[:200]:
                _folder_button(entry.name, partial(show, entry.resolve()))
            if not inside:
                ui.label("No folders in here.").classes("quiet")

    try:
        show(roots.path(start))
    except DanteError as error:
        problem(str(error))
        show(roots.folders[0])


def _folder_button(name: str, go: Callable[[], None], label: str = "") -> None:
    ui.button(printable(name), on_click=go, icon="folder_open").props(
        f'flat dense no-caps align=left {f"aria-label={chr(34)}{label}{chr(34)}" if label else ""}')
