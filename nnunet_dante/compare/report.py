"""The report of a comparison: a Markdown file, a web page, tables as CSV and JSON, pictures, and the results."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

import jinja2
from markupsafe import Markup

from ..datasets.annotated import COMPLETED
from ..errors import DanteError, ResultError
from ..files import counted, write_text_atomically
from ..types import PathLike
from .continual import transfer_table
from .kept import kept_table
from .overview import methods_overview, parameters_overview, shots_overview
from .panels import curve_panels, shots_panels, unfreezing_timeline
from .plots import case_files, case_picture, choose_cases, drawn
from .results import to_json, write_results
from .sources import Source, read_sources
from .study import Study, studies, with_donor_names
from .tables import (
    Table,
    as_csv,
    cost_table,
    forgetting_table,
    label_table,
    shots_table,
    significance_table,
    speed_table,
    strength_table,
    tolerance,
)
from .volumes import VIEWER, Volumes, case_volumes, write_niivue


@dataclass(frozen=True)
class Heading:
    """A heading of level 2 or 3; the report's title is level 1."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """One paragraph."""

    text: str


@dataclass(frozen=True)
class Code:
    """Lines that are shown exactly as they are, such as commands."""

    text: str


@dataclass(frozen=True)
class Listing:
    """A bulleted list."""

    items: Sequence[str]


@dataclass(frozen=True)
class Picture:
    """A PNG file, as a path relative to the folder of the report, and a caption.

    The web page shows the SVG file of the same name instead, where there is one.
    """

    file: str
    caption: str


@dataclass(frozen=True)
class Folded:
    """Blocks of which only the title is visible until the reader opens them."""

    title: str
    blocks: Sequence[Block]


Block: TypeAlias = Table | Heading | Text | Code | Listing | Picture | Folded | Volumes


def compare(paths: Sequence[PathLike], out: PathLike, *, tolerance_mm: float = 2.0) -> Path:
    """Write a report on trainings, and return the path of its report.md.

    The report's results.json holds all results. It can be given to `compare` again, also on a machine that does not
    have the images.

    paths: fold folders of nnU-Net, folders of protocols, and files of results.
    out: folder of the report.
    tolerance_mm: tolerance of the surface Dice of fold folders, in mm; results of a protocol have their own.

    Raises:
        ResultError: a path is none of these, or a file that belongs to a fold folder is missing.
    """
    return write_report(read_sources([Path(path) for path in paths], tolerance_mm=tolerance_mm), Path(out))


def write_report(sources: Sequence[Source], out: Path, *, title: str = "", before: Sequence[Block] = (),
                 after: Sequence[Block] = ()) -> Path:
    """Write report.md, report.html, results.json, tables/ (CSV), tables.json and plots/ below `out`.

    title: title of the report; by default, it names the experiments.
    before, after: blocks that come before and after the comparison.
    Returns the path of report.md.

    Raises:
        ResultError: there is no run, or one run is given twice.
    """
    results = with_donor_names(source.result for source in sources)
    compared = studies(results)
    if not compared:
        raise ResultError("there is no run to compare; give a protocol's folder, a .json or .jsonl file of runs, or "
                          "fold folders of nnU-Net.")
    write_results([source.result for source in sources], out / "results.json")
    sources = [replace(source, result=result) for source, result in zip(sources, results)]
    blocks, tables = [*before, *_failures(compared), *_warnings(compared)], {}
    for study in compared:
        part = _study_blocks(study, [s for s in sources if s.result.experiment == study.name], out)
        blocks += part
        for table in all_tables(part):
            name = slug(f"{study.name} {table.name}")
            write_text_atomically(as_csv(table), out / "tables" / f"{name}.csv")
            tables[name] = to_json(table.records)
    title = title or "Comparison of " + ", ".join(study.name for study in compared)
    write_text_atomically(json.dumps(tables, indent=1, allow_nan=False), out / "tables.json")
    rules = _rules(any(study.repeated for study in compared))
    return write_pages(title, [*blocks, *rules, *after], out)


def write_pages(title: str, blocks: Sequence[Block], folder: Path) -> Path:
    """Write report.html and report.md into a folder that holds the pictures, and return the path of report.md."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader(__package__, "templates"), autoescape=jinja2.select_autoescape(["html.j2"]),
        trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    environment.filters["kind"] = lambda block: type(block).__name__.lower()
    environment.filters["base64"] = lambda file: base64.b64encode((folder / file).read_bytes()).decode()
    environment.filters["drawn"] = lambda file: Markup(drawn(folder / file))
    scripts = Markup(_scripts(any(isinstance(block, Volumes) for block in blocks)))
    for name in ("report.html", "report.md"):
        text = environment.get_template(f"{name}.j2").render(title=title, blocks=blocks, scripts=scripts)
        write_text_atomically(text, folder / name)
    return folder / "report.md"


def _scripts(viewer: bool) -> str:
    """Return the scripts of the page; with `viewer`, also the one that shows volumes."""
    component = VIEWER.read_text(encoding="utf-8").replace("export default", "const VIEWER =") if viewer else ""
    return component + VIEWER.with_name("report.js").read_text(encoding="utf-8")


def all_tables(blocks: Sequence[Block]) -> Iterator[Table]:
    """Yield all tables among blocks, also those inside `Folded` blocks."""
    for block in blocks:
        if isinstance(block, Table):
            yield block
        elif isinstance(block, Folded):
            yield from all_tables(block.blocks)


def slug(text: str) -> str:
    """Return a text in small letters, digits and underscores, to be used as a file name."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def _failures(compared: Sequence[Study]) -> list[Block]:
    failed = [(study, run) for study in compared for run in study.failed]
    if not failed:
        return []
    return [Heading(f"Runs with an error: {len(failed)}"), Text("None of the numbers below include them."),
            Listing([f"{study.name}, {run.method}, {counted(run.shots, 'training case')}, seed {run.seed}: {run.error}"
                     for study, run in failed])]


def _warnings(compared: Sequence[Study]) -> list[Block]:
    said = [f"{study.name}, {run.method}, {counted(run.shots, 'training case')}, seed {run.seed}: {run.warning}"
            for study in compared for run in study.runs if run.warning]
    return [Heading("Warnings"), Listing(said)] if said else []


def _study_blocks(study: Study, sources: Sequence[Source], out: Path) -> list[Block]:
    """Return all blocks about one experiment."""
    blocks: list[Block] = [Heading(f"{study.name}{' (simulated images)' if study.simulated else ''}"),
                           Text(_facts(study))]
    if not study.runs:
        return [*blocks, Text("No run finished.")]
    validated = [s.files for s in sources if s.files and s.masks and s.masks.name == "validation"]
    if completed := sorted({label for files in validated for label in files.content.get(COMPLETED, ())}):
        blocks.append(Text(f"The masks of {', '.join(completed)} were completed by a donor: where nobody corrected "
                           "them, their scores on validation cases say how far a method agrees with the donor."
                           + ("" if any(run.against_donor for run in study.runs) else
                              " What each label lost or gained is not shown, because the donor's predictions were not "
                              f"found in nnUNet_raw/{study.name}/donorTr: set nnUNet_raw, or run the same `transfer "
                              "--keep-labels` again.")))
    plots = out / "plots"
    prefix = slug(study.name)
    if len(study.shots) > 1:
        shots_overview(study, plots / f"{prefix}_shots.png")
        shots_panels(study, plots / f"{prefix}_shots_by_method.png")
        blocks += [_picture(study, f"{prefix}_shots", "Dice by number of training cases; the best three in colour"),
                   shots_table(study, "dice"),
                   Folded("Every method on its own", [_picture(
                       study, f"{prefix}_shots_by_method", "Dice by number of training cases, with 95 % intervals")])]
    else:
        for shots in study.shots:
            methods_overview(study, shots, plots / f"{prefix}_methods.png")
            blocks.append(_picture(study, f"{prefix}_methods", "Dice with 95 % intervals over the test cases"))
        blocks.append(shots_table(study, "dice"))
    blocks += [Heading("Distances, surfaces, labels", 3), *(shots_table(study, m) for m in ("hd95_mm", "surface_dice")),
               *([Folded("By label", labels)] if (labels := [label_table(study, s) for s in study.shots]) else [])]
    if kept := strength_table(study):
        blocks += [Heading("What was kept of the training", 3), kept]
    blocks += _speed(study, plots, prefix) + _cost(study, plots, prefix)
    kept_labels = [table for shots in study.shots if (table := kept_table(study, shots))]
    if transferred := transfer_table(study):
        kept_labels.append(transferred)
    if kept_labels:
        blocks += [Heading("Old and new labels", 3), *kept_labels]
    if forgotten := forgetting_table(study):
        blocks += [Heading("What was forgotten", 3), forgotten]
    return [*blocks, *_tests(study), Heading("Cases", 3), *_cases(study, sources, out)]


def _cases(study: Study, sources: Sequence[Source], out: Path) -> list[Block]:
    """Draw the worst and the median case, and show them as volumes; where one cannot be shown, a text says why."""
    shown, cases, draw = choose_cases(study, sources)
    if not cases:
        return [Text("No pictures of cases: no predicted masks were found, or no score is defined.")]
    blocks: list[Block] = []
    try:
        write_niivue(out)
        viewer = True
    except DanteError as error:
        blocks, viewer = [Text(f"The cases are shown as pictures only. {error}")], False
    for kind, case in cases.items():
        name, title = slug(f"{study.name} {kind} case"), study.title(f"{kind} case, {case}; {draw}")
        try:
            case_picture(shown, case, out / "plots" / f"{name}.png", title)
            blocks.append(Picture(f"plots/{name}.png", f"{title}. Cases are ranked by the mean Dice of the methods."))
        except Exception as error:  # whatever is wrong with the images, the report must still be written
            blocks.append(Text(f"No picture of {case}: {str(error) or type(error).__name__}"))
            continue
        if not viewer:
            continue
        try:
            image, masks, labels = case_files(shown, case)
            blocks.append(case_volumes(image, masks, labels=labels, title=title))
        except Exception as error:
            blocks.append(Text(f"{case} is not shown as a volume: {str(error) or type(error).__name__}"))
    return blocks


def _facts(study: Study) -> str:
    cases = {case for run in study.runs for case in run.cases}
    facts = [counted(len(study.runs), "run"), counted(len(study.methods), "method"),
             *([f"up to {counted(study.expected_draws(), 'draw')}"] if study.repeated else []),
             counted(len(cases), "test case"),
             f"labels {', '.join(study.labels) or 'none'}", f"surface Dice at {tolerance(study)} mm"]
    for name, values in (("donor", {r.donor for r in study.runs}), ("machine", {r.machine for r in study.runs}),
                         ("steps per epoch", {r.iterations_per_epoch for r in study.runs}),
                         ("epochs", {len(r.curve) for r in study.runs})):
        if said := ", ".join(sorted(str(value) for value in values if value)):
            facts.append(f"{name} {said}")
    for kind, name in (("scratch", "scratch"), ("full_fine_tuning", "full fine-tuning")):
        if len(several := study.variants(kind)) > 1:
            facts.append(f"the reference for {name} is {study.references[kind]}, the best of {', '.join(several)}")
    warning = " The images of this experiment are simulated." if study.simulated else ""
    return "; ".join(facts) + "." + warning


def _speed(study: Study, plots: Path, prefix: str) -> list[Block]:
    trained = [shots for shots in study.shots if any(run.curve for m in study.methods for run in study.of(m, shots)
                                                     if not run.is_zero_shot)]
    if not trained:
        return []
    curves: list[Block] = []
    for shots in trained:
        name = slug(f"{prefix} curves {study.shots_name(shots)}")
        curve_panels(study, shots, plots / f"{name}.png")
        curves.append(_picture(study, name, f"Learning curves with {study.cases_name(shots)}"))
    several = study.repeated or len({run.method for run in study.runs if run.curve}) > 1
    blocks: list[Block] = [Heading("Convergence", 3), *([speed_table(study)] if several else []), curves[0]]
    if len(trained) > 1:
        blocks += [Folded("Learning curves with more training cases", curves[1:]),
                   Folded("Convergence by number of training cases", [speed_table(study, shots) for shots in trained])]
    if unfreezing_timeline(study, plots / f"{prefix}_timeline.png"):
        blocks.append(_picture(study, f"{prefix}_timeline", "Which groups are trained at which epoch, the head on top"))
    return blocks


def _cost(study: Study, plots: Path, prefix: str) -> list[Block]:
    table = cost_table(study)
    if not table.rows:
        return []
    blocks: list[Block] = [Heading("Cost", 3), table]
    for shots in sorted({study.shots[0], study.shots[-1]}):
        name = slug(f"{prefix} parameters {study.shots_name(shots)}")
        if parameters_overview(study, shots, plots / f"{name}.png"):
            blocks.append(_picture(study, name, f"Dice by trained parameters, {study.cases_name(shots)}"))
    return blocks


def _tests(study: Study) -> list[Block]:
    references = [name for kind in ("full_fine_tuning", "scratch") if (name := study.references[kind])]
    if len({case for run in study.runs for case in run.cases}) < 2:
        return []  # one case can show no difference
    tables = [table for name in references if (table := significance_table(study, name)).rows]
    return [Heading("Differences between methods", 3), *tables] if tables else []


def _picture(study: Study, name: str, caption: str) -> Picture:
    return Picture(f"plots/{name}.png", study.title(caption))


def _rules(repeated: bool) -> list[Block]:
    """Return how the numbers are made; repeated: whether there are several draws of the training cases."""
    return [Heading("How the numbers are made"), Listing([
        "Predictions are scored on the voxel grid of the original images. The score of a case is the mean over its "
        "labels. The score of a method is the mean over the test cases"
        + ("; each case is averaged over the draws first." if repeated else "."),
        "If a label is neither in the truth nor in the prediction, its score is not defined and does not count. If it "
        "is in only one of them, Dice and surface Dice are 0 and the label counts as missed; means of distances leave "
        "it out.",
        "Intervals: 95 % percentile bootstrap of the mean, 10,000 resamples of the test cases. They show how much the "
        "mean depends on which cases were tested. They do not show how much it depends on the choice of the training "
        "cases.",
        "Convergence: nnU-Net's pseudo Dice, one value per epoch. The moving average is nnU-Net's: 0.9 old + 0.1 new, "
        "starting at the first value.",
        "Tests: two-sided Wilcoxon signed-rank tests, with Holm's correction for the number of tests in a table.",
        "\"-\": not run, or not measured. \"not defined\": there was no label to score."])]
