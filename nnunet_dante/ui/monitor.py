"""The pages `/runs` and `/run`: all adaptations, and one of them while it grows."""

from __future__ import annotations

import asyncio
import math
import time
from pathlib import Path
from typing import Any

from nicegui import ui

from ..datasets.views import COLOURS
from ..errors import DanteError
from ..files import printable
from .layout import address, attempt, chart, choose_folder, code, heading, numbers, panel, problem, tell
from .progress import Training
from .roots import Roots
from .runs import RECORD, Run, delete, go_on, read_run, stop, tail

_MARKS = {"done": "\u2713", "now": "\u2192", "later": "\u00b7"}
_EVERY, _SEARCHED_EVERY = 2.0, 60.0  # seconds
_places: dict[Roots, tuple[float, tuple[Path, ...]]] = {}
_TITLES = {"data": "Read the data set", "advice": "Measure the donor on the cases",
           "transfer": "Make the donor the start", "folds": "Divide the cases into folds",
           "cost": "Measure a training step", "donor": "Predict with the donor", "report": "Score and write the report",
           "files": "Write the model"}


def find_runs(roots: Roots, *, search: bool = True) -> list[Run]:
    """Return all runs below the roots, those that run first, then the latest ones.

    search: look through all folders; otherwise only through those in which runs were found in the last minute.
    """
    moment, places = _places.get(roots, (-math.inf, ()))
    if search or time.monotonic() - moment > _SEARCHED_EVERY:
        places = tuple(roots.holding(RECORD))
        _places[roots] = time.monotonic(), places
    found = []
    for folder in places:
        try:
            found.append((read_run(folder), (folder / RECORD).stat().st_mtime))
        except (DanteError, OSError):
            continue
    return [run for run, _ in sorted(found, key=lambda item: (item[0].state != "running", -item[1]))]


async def list_runs(roots: Roots, *, most: int = 1000) -> None:
    """Show a line per run."""
    found = await asyncio.to_thread(find_runs, roots)
    for run in found[:most]:
        with ui.element("div").classes("entry"):
            _chip(run.state)
            page = "/result" if run.state == "finished" else "/run"
            ui.link(printable(run.folder.name), address(page, folder=str(run.folder)))
            ui.label(printable(run.title)).classes("quiet grow")
            ui.label(", ".join(f"{name} {dice:.3f}" for name, dice in run.dice.items()))
    if not found:
        ui.label("No run yet. Choose a folder, and three clicks later the first one is here.").classes("quiet")
    elif len(found) > most:
        ui.link(f"All {len(found)} runs", "/runs")


def _chip(state: str) -> None:
    ui.label(state).classes(f"chip {state}")


async def show_runs(roots: Roots, *, folder: str, options: dict[str, list[str]]) -> None:
    """Show the page `/runs`."""
    with panel():
        place = ui.element("div").props('aria-live="off"')
        with place:
            await list_runs(roots)
    shown = [[(run.folder, run.state, run.dice) for run in await asyncio.to_thread(find_runs, roots)]]

    async def renew() -> None:
        now = [(run.folder, run.state, run.dice) for run in await asyncio.to_thread(find_runs, roots, search=False)]
        if now != shown[0]:
            shown[0] = now
            place.clear()
            with place:
                await list_runs(roots)

    ui.timer(5 * _EVERY, renew)
    with panel("A run in another folder"):
        choose_folder(roots, str(roots.folders[0]), lambda text: address("/run", folder=text), "Open it")


async def show_run(roots: Roots, *, folder: str, options: dict[str, list[str]]) -> None:
    """Show the page `/run`, which follows what the folder of the run says."""
    place = roots.path(folder)
    live = _Live(place, read_run(place))
    ui.timer(_EVERY, live.renew)


class _Live:
    """One run on a page: what is shown, and how it follows the folder."""

    def __init__(self, folder: Path, run: Run):
        self.folder, self.shown = folder, ("", 0, 0, "")
        heading(run.title)
        ui.label(str(folder)).classes("quiet")
        with panel():
            self.head = ui.element("div").classes("row").props('aria-live="polite"')
            self.numbers = ui.element("div").classes("numbers")
            self.groups = ui.label().classes("quiet")
        with ui.element("div").classes("split"):
            with panel("Dice while it learns"):
                self.dice = ui.echart(chart(x="epoch", y="Dice", x_min=1, x_step=1, y_min=0, y_max=1)).props(
                    'role="img" aria-label="Dice by epoch"')
            with panel("Loss and learning rate"):
                self.loss = ui.echart(chart(x="epoch", y="loss", x_min=1, x_step=1, second=True)).props(
                    'role="img" aria-label="Loss by epoch"')
            with panel("Steps"):
                self.steps = ui.element("ul").classes("steps")
            with panel("What it says"):
                self.log = ui.html("", sanitize=False).classes("scroll")
        self.show(run, run.trainings())

    async def renew(self) -> None:
        """Read the folder again, and show what has changed."""
        try:
            run = await asyncio.to_thread(read_run, self.folder)
            self.show(run, await asyncio.to_thread(run.trainings))
        except (DanteError, OSError):
            return  # it was deleted in another window

    def show(self, run: Run, trainings: list[Training]) -> None:
        """Show the run, unless all of it is shown already."""
        said = _said(run)
        now = (run.state, sum(len(training.epochs) for training in trainings), len(run.done), said)
        if now == self.shown:
            return
        if now[0] != self.shown[0]:
            self._show_head(run)
        self.shown = now
        self._show_numbers(run, trainings)
        self._show_steps(run, trainings)
        self._draw(trainings)
        self.log.set_content(code(said, "Log"))

    def _show_head(self, run: Run) -> None:
        self.head.clear()
        with self.head:
            _chip(run.state)
            if run.state == "running":
                ui.button("Stop", icon="stop", on_click=self._stop).props("unelevated no-caps color=negative")
            else:
                if run.state == "finished":
                    ui.button("See the result", on_click=lambda: ui.navigate.to(
                        address("/result", folder=str(self.folder)))).props("unelevated no-caps")
                else:
                    ui.button("Go on", icon="play_arrow", on_click=self._go_on).props("unelevated no-caps")
                ui.button("Delete", icon="delete", on_click=lambda: confirm_delete(run)).props("outline no-caps")
            if run.problem:
                problem(run.problem)

    async def _stop(self) -> None:
        ui.notify("The run is being stopped. What is finished stays.")
        try:
            await asyncio.to_thread(stop, self.folder)
        except DanteError as error:
            tell(error)
        await self.renew()

    async def _go_on(self) -> None:
        if attempt(lambda: go_on(read_run(self.folder))):
            ui.notify("The run goes on.")
        await self.renew()

    def _show_numbers(self, run: Run, trainings: list[Training]) -> None:
        cost, number = run.done.get("cost", {}), run.number_of_trainings
        facts = [("Trainings", f"{sum(t.finished for t in trainings)}" + (f" of {number}" if number else ""))]
        self.groups.text = ""
        if trainings and trainings[-1].epochs and run.state != "finished":
            last = trainings[-1]
            facts += [("Epoch", f"{len(last.epochs)} of {last.total or '?'}"),
                      ("Dice now", f"{last.epochs[-1].mean_dice:.3f}")]
            if last.start_dice:
                facts.append(("Dice of the donor", f"{sum(last.start_dice.values()) / len(last.start_dice):.3f}"))
            if run.state == "running" and number:
                left = last.seconds_left + (number - len(trainings)) * last.total * last.epoch_seconds
                facts.append(("Time left", f"about {max(1, round(left / 60))} min"))
            if run.state == "running":
                kind = "GPU memory" if run.asked.get("device") == "cuda" else "Memory"
                mib = last.epochs[-1].mib
                facts.append((f"{kind} so far, at most",
                              "not known here" if math.isnan(mib) else f"{mib:.0f} MiB"))
            if last.epochs[-1].groups:
                self.groups.text = f"Trained now: {last.epochs[-1].groups}."
        if cost.get("mib") is not None:
            facts.append(("Memory of a step", f"{cost['mib']:.0f} MiB"))
        facts += [(f"Dice on unseen cases, {name}", f"{value:.3f}") for name, value in run.dice.items()]
        self.numbers.clear()
        with self.numbers:
            numbers(facts)

    def _show_steps(self, run: Run, trainings: list[Training]) -> None:
        begun = [f"{t.trainer} {t.fold}" for t in trainings if f"{t.trainer} {t.fold}" not in run.done]
        titles = _TITLES | {f"{t.trainer} {t.fold}": f"Train {t.title}" for t in trainings}
        done = [(name, "done") for name in run.done]
        later = [name for name in _TITLES if name not in run.done]
        now = [*begun, *later][:1]
        self.steps.clear()
        with self.steps:
            for name, kind in [*done, *((n, "now") for n in now), *((n, "later") for n in later if n not in now)]:
                seconds = run.done.get(name, {}).get("seconds")
                with ui.element("li").classes(kind):
                    took = "" if seconds is None else f", {_duration(seconds)}"
                    ui.label(f"{_MARKS[kind]} {titles.get(name, name)}{took}")

    def _draw(self, trainings: list[Training]) -> None:
        dice, loss = self.dice.options, self.loss.options
        dice["series"] = [_line(t.title, [e.mean_dice for e in t.epochs], i) for i, t in enumerate(trainings)]
        if trainings:
            labels, last = list(trainings[-1].start_dice), trainings[-1]
            if len(labels) > 1:
                dice["series"] += [
                    _line(f"{label} now", [e.dice[i] if i < len(e.dice) else math.nan for e in last.epochs],
                          len(trainings) + i, thin=True) for i, label in enumerate(labels)]
            if labels:
                start = sum(last.start_dice.values()) / len(labels)
                dice["series"].append(_line("donor", [start] * max(2, len(last.epochs)), 0, dashed=True))
            loss["series"] = [_line("training", [e.loss for e in last.epochs], 0),
                              _line("validation", [e.val_loss for e in last.epochs], 1),
                              _line("learning rate (right)", [e.lr for e in last.epochs], 2, axis=1)]
        self.dice.update()
        self.loss.update()


def confirm_delete(run: Run) -> None:
    """Ask before all results of a run are deleted."""
    with ui.dialog() as dialog, ui.card():
        ui.label(f"Delete the run in {run.folder}? Its models, reports and logs are gone then. Your images stay.")
        with ui.element("div").classes("row"):
            def go() -> None:
                left: list[str] = []
                if attempt(lambda: left.extend(delete(run))):
                    ui.navigate.to("/runs")

            ui.button("Delete it", on_click=go).props("unelevated no-caps color=negative")
            ui.button("Keep it", on_click=dialog.close).props("outline no-caps autofocus")
    dialog.open()


def _said(run: Run) -> str:
    """Return what the run says now: the log of its newest command, and before it what it printed itself."""
    logs = sorted((run.folder / "logs").glob("*.log"), key=lambda file: file.stat().st_mtime)
    newest = tail(logs[-1]) if logs and run.state != "finished" else ""
    return "\n".join(line for line in [*run.said.splitlines()[-30:], *newest.splitlines()[-40:]] if line.strip())


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def _line(name: str, values: list[float], colour: int, *, thin: bool = False, dashed: bool = False,
          axis: int = 0) -> dict[str, Any]:
    style = {"width": 1 if thin else 2, "type": "dashed" if dashed else "solid"}
    shade = "#7a8794" if dashed else COLOURS[colour % len(COLOURS)]
    return {"name": name, "type": "line", "showSymbol": len(values) < 3, "yAxisIndex": axis, "color": shade,
            "lineStyle": style | {"color": shade},
            "data": [[n, None if math.isnan(value) else round(value, 5)] for n, value in enumerate(values, 1)]}
