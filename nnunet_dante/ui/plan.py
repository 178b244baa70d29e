"""The page `/adapt`: a donor, what of its labels the data have, how long it may take, and the start."""

from __future__ import annotations

import asyncio
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nicegui import ui

from ..errors import ConfigurationError
from ..files import printable
from .ask import ask
from .data import Options, look
from .layout import address, busy, code, heading, panel, problem
from .roots import Roots
from .runs import start
from .start import donors_of, later, licence_of, table

_BUDGETS = {10: "10 minutes, for a first look", 30: "30 minutes", 60: "1 hour", 180: "3 hours",
            600: "10 hours, over night"}
_DEVICES = {"": "the best there is", "cuda": "cuda", "mps": "mps", "cpu": "cpu"}


async def show_plan(roots: Roots, *, folder: str, options: Options) -> None:
    """Show the page `/adapt`."""
    if not folder:
        raise ConfigurationError("Choose a folder with images and masks first, on the page Data.")
    path = str(roots.path(folder))
    ui.label(path).classes("quiet")

    async def known() -> tuple[list[dict[str, Any]], dict[str, Any]]:
        donors, seen = await asyncio.gather(donors_of(roots), look(path, options))
        return donors, seen

    later("Donors and data are being read.", known, lambda found: _Plan(roots, path, options, *found))


class _Plan:
    """The form: it holds what was chosen, and says what follows from it."""

    def __init__(self, roots: Roots, folder: str, options: Options, donors: Sequence[Mapping[str, Any]],
                 seen: Mapping[str, Any]):
        self.roots, self.folder, self.options, self.seen = roots, folder, options, seen
        if seen["problem"]:
            problem(seen["problem"])
            ui.link("Back to the data", address("/data", folder=folder))
            return
        self.donors = {str(d["donor"]): d for d in sorted(donors, key=self._order) if not d["problem"]}
        with ui.element("div").classes("split"):
            with panel("Donor"):
                self.donor = ui.select({key: printable(d["name"]) for key, d in self.donors.items()},
                                       value=next(iter(self.donors), None), label="Pretrained network",
                                       with_input=True, on_change=self.renew).props("outlined dense")
                self.other = ui.input("or the path of another model, zip or checkpoint",
                                      on_change=self.renew).props("outlined dense")
                self.match = ui.element("div").classes("later")
                self.keep = ui.checkbox("", on_change=self.renew)
            with panel("Time"):
                self.budget = ui.select(_BUDGETS, value=60, label="For all trainings together").props("outlined dense")
                self.baseline = ui.checkbox("Also train from scratch, to compare; takes half of the time")
                self.device = ui.select(_DEVICES, value="", label="Device").props("outlined dense")
                self.out = ui.input("Folder for the results", value=str(self._free_folder())).props("outlined dense")
                self.settings = ui.input("Options of the trainings, such as lr=0.01, rank=8").props("outlined dense")
                for field in (self.budget, self.baseline, self.device, self.out, self.settings):
                    field.on_value_change(self.renew)
        with panel("The plan"):
            self.text = ui.label().classes("plan")
            with ui.element("div").classes("row"):
                self.button = ui.button("Start", icon="play_arrow", on_click=self.start).props(
                    "unelevated no-caps size=lg")
            self.trouble = ui.element("div")
            heading("The same on the command line", 3)
            self.command = ui.html("", sanitize=False)
        self.renew()

    def _order(self, donor: Mapping[str, Any]) -> tuple[float, ...]:
        """Order donors by the labels and channels that they share with the data, then by size."""
        shared = {label.lower() for label in donor["labels"]} & {label.lower() for label in self.seen["labels"]}
        channels = {c.lower() for c in donor["channels"]} == {c.lower() for c in self.seen["channels"]}
        same_number = len(donor["channels"]) == len(self.seen["channels"])
        return -len(shared), -channels, -same_number, -donor["size"]

    def _free_folder(self) -> Path:
        base = self.roots.folders[0] / "nnunet-dante"
        name = re.sub(r"[^\w-]+", "-", Path(self.folder).name).strip("-") or "run"
        names = (name, *(f"{name}-{n}" for n in range(2, 10_000)))
        return next(base / name for name in names if not (base / name).exists())

    @property
    def model(self) -> str:
        """The donor that was chosen, or typed."""
        return (self.other.value or "").strip() or self.donor.value or ""

    @property
    def kept(self) -> list[str]:
        """The labels of the donor to keep, as `adapt` takes them."""
        return ["all"] if self.keep.visible and self.keep.value else []

    def renew(self) -> None:
        """Say what follows from what was chosen."""
        self.match.clear()
        with self.match:
            if not self.model:
                problem("No model was found on this machine; give the path of one.", "warn")
            elif donor := self.donors.get(self.model):
                _show_match(donor, self.seen)
        ours = {label.lower() for label in self.seen["labels"]}
        more = [label for label in self.donors.get(self.model, {}).get("labels", ()) if label.lower() not in ours]
        self.keep.text = printable(f"Keep the donor's other labels, too: {', '.join(more[:8])}"
                                   f"{', ...' if len(more) > 8 else ''}. The donor completes your masks with them.")
        self.keep.visible = bool(more)
        cases = [case for case in self.seen["cases"] if case["masks"]]
        patients = len({case["patient"] for case in cases})
        way = "and trains on all of them: with one patient, no case can be left unseen to judge the result"
        if patients > 1:
            way = (f"divides them into {min(5, patients)} folds, trains on each"
                   f"{' and from scratch' if self.baseline.value else ''}, and once on all cases")
        self.text.text = (
            f"{len(cases)} cases, {patients} {'patient' if patients == 1 else 'patients'}. Dante measures the donor on "
            f"them, chooses a method, {way}. All of it takes about {self._about()}; how long an epoch is follows "
            "from a measured step. You may close this page or stop the run at any time.")
        self.command.set_content(code(self._words(), "Command"))
        self.button.set_enabled(bool(self.model))

    def _about(self) -> str:
        size = self.donors.get(self.model, {}).get("size", 0)
        trainings = math.ceil(5 * (2 if self.baseline.value else 1)) + 1
        room = f", and room for about {trainings * 2 * size / 2**30:.1f} GiB of checkpoints" if size > 2**26 else ""
        return f"{self.budget.value} minutes{room}"

    def _words(self) -> str:
        labels = [word for label in self.options.get("labels", []) for word in ("--labels", label)]
        others = {name: words for name, words in self.options.items() if name != "labels"}
        source = self._dataset_place() / "Dataset001_Mine" if others else self.folder
        words = ["nnunet-dante", "adapt", self.model or "MODEL", source, "-o", self.out.value, "--budget",
                 f"{self.budget.value}min", *([] if others else labels),
                 *(["--keep-labels", "all"] if self.kept else []), *(["--baseline"] if self.baseline.value else []),
                 *(["--device", self.device.value] if self.device.value else []),
                 *(word for setting in self._settings() for word in ("--set", setting))]
        place = self._dataset_place()
        made = ["nnunet-dante", "dataset", self.folder, "-d", 1, "-n", "Mine", "-o", place, *labels,
                *(word for name, texts in others.items() for word in (f"--{name}", ",".join(texts)))]
        first = [made] if others else []
        return "\n".join(shlex.join(map(str, line)) for line in [*first, words])

    def _settings(self) -> list[str]:
        return [word.strip() for word in (self.settings.value or "").split(",") if word.strip()]

    def _dataset_place(self) -> Path:
        out = Path(self.out.value or ".")
        return out.with_name(f"{out.name}-data")

    async def start(self) -> None:
        """Start the run, and show it."""
        with busy(self.button, self.trouble):
            out = self.roots.filled(self.out.value, "a new folder for the results")
            model = self.model if self.model in self.donors else str(self.roots.path(self.model))
            source, labels = self.folder, self.options.get("labels", [])
            overrides = await ask("parse_overrides", self._settings()) if self._settings() else {}
            if set(self.options) - {"labels"}:
                source = await ask("write_dataset", self.folder, str(self._dataset_place()), self.options)
                labels = []
            start(out, {"model": model, "source": source, "budget_minutes": float(self.budget.value), "labels": labels,
                        "baseline": bool(self.baseline.value), "device": self.device.value or None,
                        "overrides": overrides, "keep_labels": self.kept})
            ui.navigate.to(address("/run", folder=str(out)))


def _show_match(donor: Mapping[str, Any], seen: Mapping[str, Any]) -> None:
    known = {label.lower() for label in donor["labels"]}
    table(["your label", "in the donor"],
          [[name, "known" if name.lower() in known else "new: learned from your cases"] for name in seen["labels"]])
    spacing = " x ".join(f"{mm:.3g}" for mm in donor["spacing_mm"])
    ours, theirs = ", ".join(seen["channels"]), ", ".join(donor["channels"])
    ui.label(printable(f"{donor['trainer']}, {donor['configuration']}, {spacing} mm, channels {theirs}. Your channels: "
                       f"{ours}. Licence of the donor: {licence_of(donor)}.")).classes("quiet")
