"""The first page: the next step, the last runs, and what is on this machine."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nicegui import background_tasks, ui

from ..errors import DanteError
from ..files import printable
from .ask import ask
from .layout import address, choose_folder, code, escaped, panel, problem
from .monitor import list_runs
from .roots import Roots

_donors: dict[Roots, list[dict[str, Any]]] = {}  # reading all checkpoints takes seconds


async def show_start(roots: Roots, *, folder: str, options: dict[str, list[str]]) -> None:
    """Show the page `/`."""
    with panel("Choose the folder with your images and masks"):
        ui.label("Almost any layout is recognised. Nothing in the folder is changed.").classes("quiet")
        choose_folder(roots, folder or str(roots.folders[0]), lambda text: address("/data", folder=text), "Look at it")
    with panel("Runs"):
        await list_runs(roots, most=5)
    with panel("Donors"):
        later("The models on this machine are being read.", lambda: donors_of(roots), _show_donors)
    with panel("Data sets"):
        _show_datasets()
    with panel("This installation"):
        place = ui.element("div")

        def check() -> None:
            button.disable()
            with place:
                later("The installation is being checked.", lambda: ask("findings"), _show_findings)

        button = ui.button("Check versions, folders and device", on_click=check).props("outline no-caps")


def later(waiting: str, work: Callable[[], Any], show: Callable[[Any], object]) -> None:
    """Show a part of a page as soon as its content is known; the page does not wait for it."""
    place = ui.element("div").classes("later").props('aria-live="polite"')
    with place, ui.element("div").classes("row"):
        ui.spinner(size="1.4rem").props('aria-hidden="true"')
        ui.label(waiting).classes("quiet")

    async def fill() -> None:
        try:
            answer = await work()
        except Exception as error:  # whatever happened, the page says it instead of waiting for ever
            place.clear()
            with place:
                problem(str(error) if isinstance(error, DanteError) else f"{type(error).__name__}: {error}")
            return
        if not place.is_deleted:
            place.clear()
            with place:
                show(answer)

    background_tasks.create(fill(), name=waiting)


async def donors_of(roots: Roots) -> list[dict[str, Any]]:
    """Return the models on this machine that can be donors, as dicts of `models.installed.Installed`."""
    if roots not in _donors:
        _donors[roots] = await ask("donors", [str(path) for path in roots.holding("plans.json")])
    return _donors[roots]


def _show_donors(found: Sequence[dict[str, Any]]) -> None:
    if not found:
        ui.label("No model was found. Put a model folder of nnU-Net below your home folder, or download one with "
                 "TotalSegmentator.").classes("quiet")
        return
    rows = []
    for donor in found:
        if donor["problem"]:
            rows.append([donor["name"], f"not usable: {donor['problem']}", *[""] * 5])
        else:
            rows.append([donor["name"], ", ".join(donor["labels"][:8]) + (", ..." if len(donor["labels"]) > 8 else ""),
                         ", ".join(donor["channels"]), " x ".join(f"{mm:.3g}" for mm in donor["spacing_mm"]),
                         donor["trainer"], f"{donor['size'] / 2**20:.0f}", licence_of(donor)])
    table(["model", "labels", "channels", "spacing in mm", "trainer", "MiB", "licence"], rows)
    for donor in found:
        if len(donor["licence"].strip()) > len(licence_of(donor)):
            title = f"Licence of {donor['name']}"
            ui.html(f"<details><summary>{escaped(title)}</summary>{code(donor['licence'], title)}</details>",
                    sanitize=False)


def licence_of(donor: Mapping[str, Any]) -> str:
    """Return the first line of a donor's licence, or that the model does not come with one."""
    return next((line.strip()[:60] for line in donor["licence"].splitlines() if line.strip()), "not stated")


def _show_datasets() -> None:
    raw = Path(os.environ.get("nnUNet_raw", ""))  # noqa: SIM112 nnU-Net's name
    found = sorted(raw.glob("Dataset*_*")) if str(raw) != "." and raw.is_dir() else []
    if not found:
        ui.label("nnUNet_raw is not set, or holds no data set. That is fine: any folder with images and masks will "
                 "do.").classes("quiet")
    for entry in found:
        with ui.element("div").classes("entry"):
            ui.link(printable(entry.name), address("/data", folder=str(entry)))


def _show_findings(found: Sequence[dict[str, Any]]) -> None:
    table(["check", "", "what was seen"],
          [[check["name"], "ok" if check["passed"] else "to do", check["seen"]] for check in found])


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Show a plain table, whose texts may come from foreign files."""
    def cells(row: Sequence[object], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escaped(str(cell))}</{tag}>" for cell in row) + "</tr>"

    body = "".join(cells(row, "td") for row in rows)
    ui.html(f'<table class="facts"><thead>{cells(head, "th")}</thead><tbody>{body}</tbody></table>',
            sanitize=False).classes("scroll").props('tabindex="0" role="region" aria-label="Table"')
