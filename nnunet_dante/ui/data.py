"""The page `/data`: what was recognised in a folder, its cases with outlines, and what is wrong with which."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from nicegui import ui

from ..files import printable
from .ask import ask
from .layout import address, choose_folder, escaped, heading, panel, problem
from .roots import Roots
from .start import later

Options = dict[str, list[str]]
_MOST_CASES = 60
_seen: dict[str, dict[str, Any]] = {}  # answers by folder and options; reading all images takes time
_MOST_SEEN = 8


async def look(folder: str, options: Options, *, again: bool = False) -> dict[str, Any]:
    """Return what `nnunet-dante dataset --dry-run` says of a folder, as `work.look` does."""
    key = json.dumps([folder, options])
    if again or key not in _seen:
        answer = await ask("look", folder, options)
        while len(_seen) >= _MOST_SEEN:
            _seen.pop(next(iter(_seen)))
        _seen[key] = answer
    return _seen[key]


async def show_data(roots: Roots, *, folder: str, options: Options) -> None:
    """Show the page `/data`."""
    if not folder:
        with panel("Choose the folder with your images and masks"):
            choose_folder(roots, str(roots.folders[0]), lambda text: address("/data", folder=text), "Look at it")
        return
    path = str(roots.path(folder))
    ui.label(path).classes("quiet")
    later("All images and masks are being read.", lambda: look(path, options, again=True),
          lambda answer: _show(path, options, answer))


def _show(folder: str, options: Options, answer: Mapping[str, Any]) -> None:
    if answer["problem"]:
        problem(answer["problem"])
    faulty = [case["name"] for case in answer["cases"] if case["faults"]]
    with ui.element("div").classes("row"):
        if not answer["problem"]:
            ui.button("Adapt a network to these cases", on_click=lambda: ui.navigate.to(
                address("/adapt", folder=folder, **_texts(options)))).props("unelevated no-caps")
        if faulty and len(faulty) < len(answer["cases"]):
            without = [*options.get("without", []), *faulty]
            ui.button(f"Leave these {len(faulty)} cases out", on_click=lambda: ui.navigate.to(
                address("/data", folder=folder, **_texts({**options, "without": without})))).props("unelevated no-caps")
        ui.button("Read again", on_click=ui.navigate.reload).props("outline no-caps")
        ui.button("Another folder", on_click=lambda: ui.navigate.to("/data")).props("outline no-caps")
    if values := answer.get("values"):
        _name_values(folder, options, values)
    with ui.element("div").classes("split"):
        with panel("What was recognised"):
            ui.label(printable("\n".join(answer["lines"]))).classes("lines")
        _more(folder, options)
    if answer["cases"]:
        heading("Cases")
        ui.label("Look at every case: does each outline follow its structure?").classes("quiet")
        with ui.element("div").classes("cases"):
            for case in answer["cases"][:_MOST_CASES]:
                _show_case(case)
        if len(answer["cases"]) > _MOST_CASES:
            ui.label(f"{len(answer['cases']) - _MOST_CASES} more cases are not shown.").classes("quiet")


def _texts(options: Options) -> dict[str, str]:
    return {name: ",".join(words) for name, words in options.items()}


def _show_case(case: Mapping[str, Any]) -> None:
    with ui.element("article").classes("case"):
        name = printable(case["name"])
        if case["picture"]:
            ui.html(f'<img loading="lazy" alt="Three slices of {escaped(name)} with outlines" '
                    f'src="data:image/jpeg;base64,{case["picture"]}">', sanitize=False)
        with ui.element("div").classes("text"):
            heading(name, 3)
            shape = " x ".join(map(str, case["shape"]))
            spacing = " x ".join(f"{mm:.3g}" for mm in case["spacing"])
            voxels = ", ".join(f"{label} {count}" for label, count in case["voxels"].items())
            ui.label(printable(f"{shape} voxels of {spacing} mm. {voxels or 'No mask.'}")).classes("quiet")
            for fault in case["faults"]:
                problem(fault)
            for warning in case["warnings"]:
                problem(warning, "warn")


def _name_values(folder: str, options: Options, values: list[int]) -> None:
    """Ask for the names of the numbers in the masks."""
    with panel("What do the numbers in the masks mean?"):
        ui.label("Leave a number empty to make it background.").classes("quiet")
        fields = {}
        with ui.element("div").classes("row"):
            for value in values:
                fields[value] = ui.input(f"{value} is").props("outlined dense")

        def go() -> None:
            names = [f"{(field.value or '').strip() or 'background'}={value}" for value, field in fields.items()]
            ui.navigate.to(address("/data", folder=folder, **_texts({**options, "labels": names})))

        ui.button("Use these names", on_click=go).props("unelevated no-caps")


def _more(folder: str, options: Options) -> None:
    """Offer what the command line calls --labels, --channels, --masks and --without."""
    asked = {"labels": "Labels, such as liver=1, spleen=2", "channels": "Names of the channels, such as CT",
             "masks": "Which files are masks, such as *_seg*", "without": "Cases to leave out, such as P03, P07"}
    with panel("Not as it should be?"):
        fields = {name: ui.input(label, value=", ".join(options.get(name, []))).props("outlined dense")
                  for name, label in asked.items()}

        def go() -> None:
            texts = {name: ",".join(word.strip() for word in (field.value or "").split(",") if word.strip())
                     for name, field in fields.items()}
            ui.navigate.to(address("/data", folder=folder, **texts))

        ui.button("Read with these", on_click=go).props("outline no-caps")
