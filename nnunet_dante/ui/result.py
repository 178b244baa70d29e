"""The pages `/result` and `/compare`: what came out, every case to look at, what is kept, and files to hand on."""

from __future__ import annotations

import asyncio
import math
import shlex
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote

from nicegui import ui

from ..compare.volumes import label_colours
from ..datasets.views import COLOURS
from ..errors import ConfigurationError
from ..files import printable, read_json
from .ask import ask
from .layout import address, busy, chart, code, escaped, heading, numbers, panel, problem
from .monitor import confirm_delete, find_runs
from .roots import Roots
from .runs import Run, read_run, title_of
from .start import later, table
from .viewer import Viewer

_LAYERS = ("truth", "donor", "adapted")
_VIEWS = {"multiplanar": "slices and 3D", "axial": "axial", "coronal": "coronal", "sagittal": "sagittal",
          "render": "3D"}
_DAFNE = {"linux": "~/.local/share/Dafne/models", "darwin": "~/Library/Application Support/Dafne/models",
          "win32": "~/AppData/Local/Dafne-imaging/Dafne/models"}


async def show_result(roots: Roots, *, folder: str, options: dict[str, list[str]]) -> None:
    """Show the page `/result`."""
    run = read_run(roots.path(folder))
    heading(run.title)
    ui.label(str(run.folder)).classes("quiet")
    if run.state != "finished":
        problem(f"This run is {run.state}; there is no result yet.", "warn")
        ui.link("See how far it is", address("/run", folder=str(run.folder)))
        return
    with panel():
        _show_numbers(run)
    with panel("Look at the cases"):
        _Look(run)
    with panel("How much of the training is kept"):
        networks = [*map(str, scored_folds(run)), str(run.final)]
        later("The trained networks are being read.", lambda: ask("strengths", networks),
              lambda found: _Strength(run, found))
    with panel("Hand it on"):
        _show_files(roots, run)
    with panel("Segment new images"):
        _segment(roots, run)
    if (run.folder / "report.html").is_file():
        with panel("Report"):
            page = file_address(run.folder / "report.html")
            ui.html(f'<iframe class="report" title="Report" loading="lazy" src="{page}"></iframe>', sanitize=False)
            ui.link("Open the report by itself", page, new_tab=True)
            ui.label("This page runs no scripts of files. To sort the report's tables and to see its volumes, open the "
                     f"file itself: {printable(str(run.folder / 'report.html'))}")
    with panel("The commands that did it"):
        commands = "\n".join(str(c) for entry in run.done.values() for c in entry.get("commands", []))
        ui.html(code(commands, "Commands"), sanitize=False)
    ui.button("Delete this run", icon="delete", on_click=lambda: confirm_delete(run)).props("outline no-caps")


def file_address(path: Path) -> str:
    """Return the address from which the page sends a file."""
    return f"/file{quote(str(path))}"


def scored_folds(run: Run) -> list[Path]:
    """Return the fold folders of the adapted network that have unseen cases, in their order."""
    return [run.final.parent / f"fold_{fold}" for fold in run.done.get("folds", {}).get("folds", [])]


def case_dice(run: Run) -> dict[str, dict[str, float]]:
    """Return case -> network -> mean Dice over its labels, the worst cases of the adapted network first."""
    found: dict[str, dict[str, float]] = {}
    try:
        for result in read_json(run.folder / "results.json"):
            for case, labels in result["cases"].items():
                known = [scores["dice"] for scores in labels.values() if isinstance(scores.get("dice"), (int, float))]
                if known:
                    found.setdefault(case, {})[result["method"]] = sum(known) / len(known)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}
    return dict(sorted(found.items(), key=lambda item: item[1].get("adapted", math.inf)))


def _show_numbers(run: Run) -> None:
    with ui.element("div").classes("numbers"):
        numbers([*((f"Dice on unseen cases, {name}", f"{dice:.3f}") for name, dice in run.dice.items()),
                 ("in all", f"{run.minutes:.0f} min")])


class _Look:
    """One case at a time in the viewer, with its masks."""

    def __init__(self, run: Run):
        self.run, self.dice = run, case_dice(run)
        try:
            content = read_json(run.raw / "dataset.json")
            self.ending = str(content["file_ending"])
            labels = {str(name): value for name, value in content["labels"].items() if isinstance(value, int) and value}
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigurationError(f"The data set of this run cannot be read ({error}).") from None
        self.folds = scored_folds(run) or [run.final]
        if self.folds == [run.final]:  # all cases are of one patient
            ui.label("No case was left unseen: the network was trained on the cases that are shown here. Expect worse "
                     "masks of new images.").classes("quiet")
        cases = list(self.dice) or sorted(p.name.removesuffix(self.ending) for p in (run.raw / "labelsTr").glob(
            f"*{self.ending}"))
        if not cases:
            ui.label("There is no case to look at.").classes("quiet")
            return
        with ui.element("div").classes("row"):
            self.case = ui.select({case: self._titled(case) for case in cases}, value=cases[0], on_change=self.show,
                                  label="Case, the worst first" if self.dice else "Case").props(
                                      "outlined dense").classes("grow")
            view = ui.select(_VIEWS, value="multiplanar", label="View").props("outlined dense")
            outline = ui.checkbox("Outlines")
        self.viewer = Viewer("Image with masks in slices and 3D", labels)
        self.said = ui.label().classes("quiet").props('aria-live="off"')
        self.viewer.on("location", lambda e: self.said.set_text(printable(str(e.args))[:200]))
        self.viewer.on("failed", lambda e: problem(str(e.args)))
        reduced = ui.label().classes("quiet")
        self.viewer.on("reduced", lambda e: reduced.set_text(printable(
            f"This browser draws without a graphics card, so the page shows only {e.args} voxels.") if e.args else ""))
        view.on_value_change(lambda e: self.viewer.arrange(e.value))
        outline.on_value_change(lambda e: self.viewer.outlines(0.25 if e.value else 0.0))
        ui.html('<div class="legend">' + "".join(
            f'<span><i style="background:{colour}"></i>{escaped(name)}</span>'
            for name, colour in label_colours(labels).items()) + "</div>", sanitize=False)
        with ui.element("div").classes("split"):
            for name in _LAYERS:
                value = 0.6 if name == "adapted" else 0.0
                self.viewer.opacity(name, value)
                _slider(f"Opacity of {name}", value).on_value_change(
                    lambda e, name=name: self.viewer.opacity(name, e.value))
            black, white = _slider("Black is this share of the image's range", 0.0), _slider("White is this share", 1.0)
            for slider in (black, white):
                slider.on_value_change(lambda: self.viewer.window(black.value, max(white.value, black.value + 0.01)))
        self.show()

    def _titled(self, case: str) -> str:
        scores = ", ".join(f"{name} {dice:.2f}" for name, dice in self.dice.get(case, {}).items())
        return printable(f"{case}: {scores}" if scores else case)

    def show(self) -> None:
        """Show the case that is chosen."""
        case, name = self.case.value, f"{self.case.value}{self.ending}"
        masks = {"truth": self.run.raw / "labelsTr" / name, "donor": self.run.folder / "predictions" / "donor" / name,
                 "adapted": next((p for fold in self.folds if (p := fold / "validation" / name).is_file()), Path())}
        self.viewer.show(self.run.raw / "imagesTr" / f"{case}_0000{self.ending}",
                         {key: path for key, path in masks.items() if path.is_file()})


def _slider(name: str, value: float) -> ui.slider:
    with ui.element("div"):
        ui.label(name).classes("quiet")
        return ui.slider(min=0, max=1, step=0.05, value=value).props(f'aria-label="{name}"')


class _Strength:
    """How much of what was learned the network keeps: Dice by strength, and a slider to change it."""

    def __init__(self, run: Run, found: list[dict[str, Any]]):
        self.run = run
        *folds, final = found
        kept = 1.0 if final["strength"] is None else float(final["strength"])
        series = [{"name": f"fold {n}", "type": "line", "data": sorted(fold["curve"]),
                   "color": COLOURS[n % len(COLOURS)]} for n, fold in enumerate(folds) if fold["curve"]]
        ui.label(f"The result keeps {100 * kept:.0f} % of what was learned. 0 % is the donor, 100 % the network at the "
                 f"end of the training.{' The curve shows Dice on the unseen cases of each fold.' if series else ''}"
                 ).classes("quiet")
        if series:
            ui.echart(chart(x="strength", y="Dice", series=series, x_min=0, x_max=1)).props(
                'role="img" aria-label="Dice by strength"')
        with ui.element("div").classes("row"):
            self.slider = ui.slider(min=0, max=1, step=0.05, value=kept).classes("grow").props(
                'aria-label="Strength" label')
            ui.label().bind_text_from(self.slider, "value", lambda value: f"Chosen: {100 * value:.0f} %")
            self.button = ui.button("Write the model at this strength", on_click=self.write).props("outline no-caps")
        self.said = ui.element("div")

    async def write(self) -> None:
        """Put the result at the strength of the slider."""
        with busy(self.button, self.said):
            await ask("keep", str(self.run.folder), float(self.slider.value))
            with self.said:
                problem(f"The model keeps {100 * self.slider.value:.0f} % now, and its files are written again. The "
                        "report shows the scores from before.", "note")


def _show_files(roots: Roots, run: Run) -> None:
    files = run.done["files"]
    kinds = {"model": "Model for nnU-Net", "adapter": "Adapter", "dafne": "Model for Dafne"}
    names = {kind: str(files[kind]) for kind in kinds if files.get(kind) and (run.folder / str(files[kind])).is_file()}
    with ui.element("div").classes("row"):
        for kind, name in names.items():
            size = (run.folder / name).stat().st_size / 2**20
            ui.button(f"{kinds[kind]} ({size:.1f} MiB)", icon="download", on_click=lambda name=name: ui.download(
                file_address(run.folder / name), name)).props("outline no-caps")
    ui.label("The zip is plain nnU-Net: nnUNetv2_install_pretrained_model_from_zip reads it, and Dante is not "
             "needed.").classes("quiet")
    if "dafne" in names:
        _send_to_dafne(roots, run)
    heading("Use it on new images", 3)
    fold = run.final
    trainer, plans, configuration = fold.parent.name.split("__")
    options = ["-d", fold.parents[1].name, "-c", configuration, "-f", fold.name.removeprefix("fold_"), "-tr", trainer,
               "-p", plans]
    install = ["nnUNetv2_install_pretrained_model_from_zip", str(run.folder / names.get("model", "model.zip"))]
    ui.html(code("\n".join([shlex.join(install), shlex.join(["nnUNetv2_predict", "-i", "IMAGES", "-o", "MASKS",
                                                             *options])]), "Commands for new images"), sanitize=False)


def _segment(roots: Roots, run: Run) -> None:
    """Segment a folder of images, and show the masks, those that the network is least sure of first."""
    with ui.element("div").classes("row"):
        images = ui.input("Folder with new images").classes("grow").props("outlined dense")
        masks = ui.input("New folder for their masks", value=f"{run.folder}-masks").classes("grow").props(
            "outlined dense")
        button = ui.button("Segment them").props("outline no-caps")
    place = ui.element("div").classes("later")

    async def go() -> None:
        with busy(button, place):
            with place, ui.element("div").classes("row"):
                ui.spinner(size="1.4rem").props('aria-hidden="true"')
                ui.label("The images are being segmented. If you leave the page, the same button goes on.").classes(
                    "quiet")
            answer = await ask("predict", str(run.folder),
                               str(roots.filled(images.value, "the folder with new images")),
                               str(roots.filled(masks.value, "a new folder for their masks")))
            place.clear()
            with place:
                ui.label(printable(answer["said"])).classes("lines")
                table(["case, the least sure first", "confidence"], answer["cases"])
                for picture in answer["pictures"]:
                    ui.html(f'<img loading="lazy" style="max-width: 100%" src="{file_address(Path(picture))}" '
                            f'alt="Mask of {escaped(Path(picture).stem)}">', sanitize=False)

    button.on_click(go)


def _send_to_dafne(roots: Roots, run: Run) -> None:
    usual = Path(_DAFNE.get(sys.platform, _DAFNE["linux"])).expanduser()
    with ui.element("div").classes("row"):
        field = ui.input("Models folder of Dafne", value=str(usual) if usual.is_dir() else "").classes("grow").props(
            "outlined dense")
        button = ui.button("Put it into Dafne").props("outline no-caps")
    said = ui.element("div")

    async def send() -> None:
        with busy(button, said):
            place = roots.filled(field.value, "the models folder of Dafne, which Dafne makes when it starts for the "
                                 "first time. Or download the model, and choose File > Import model... in Dafne")
            wrote = await ask("send_to_dafne", str(run.final), str(place))
            with said:
                problem(f"{wrote}\nDafne lists its models when it starts: if it is open, start it again.", "note")

    button.on_click(send)


async def show_comparison(roots: Roots, *, folder: str, options: dict[str, list[str]]) -> None:
    """Show the page `/compare`."""
    runs = [run for run in await asyncio.to_thread(find_runs, roots) if run.state == "finished"]
    if not runs:
        ui.label("There is no finished run yet.").classes("quiet")
        return
    with panel("Finished runs"):
        names = sorted({name for run in runs for name in run.dice})
        table(["run", "donor", "data", *(f"Dice, {name}" for name in names), "trainer", "minutes"],
              [_row(run, names) for run in runs])
    with panel("One report on several runs"):
        ui.label("It shows Dice, distances, speed and significance on the unseen cases. The runs must be on the same "
                 "data set.").classes("quiet")
        boxes = {str(run.folder): ui.checkbox(printable(str(run.folder))) for run in runs}
        button = ui.button("Write the report").props("unelevated no-caps")
        place = ui.element("div")

        async def write() -> None:
            chosen = [run for run in runs if boxes[str(run.folder)].value]
            with busy(button, place):
                if not chosen:
                    raise ConfigurationError("Choose at least one run.")
                folds = [str(fold) for run in chosen for fold in scored_folds(run)]
                page = file_address(Path(await ask("report", folds, str(_free(roots.folders[0] / "nnunet-dante")))))
                with place:
                    ui.link("Open the report by itself", page, new_tab=True)
                    ui.html(f'<iframe class="report" title="Report" src="{page}"></iframe>', sanitize=False)

        button.on_click(write)


def _free(base: Path) -> Path:
    return next(place for n in range(1, 10_000) if not (place := base / f"comparison-{n}").exists())


def _row(run: Run, names: list[str]) -> list[str]:
    trainer = str(run.asked.get("trainer") or run.done.get("advice", {}).get("trainer", ""))
    dice = [f"{run.dice[name]:.3f}" if name in run.dice else "" for name in names]
    return [run.folder.name, title_of(str(run.asked.get("model"))), Path(str(run.asked.get("source"))).name, *dice,
            trainer.removeprefix("nnUNetTrainer"), f"{run.minutes:.0f}"]
