"""The report of a comparison: Markdown, one web page, tables as CSV and JSON, plots."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from ..errors import ResultError
from ..files import write_text_atomically
from .cost_table import cost_table
from .document import Block, Document, Folded, Heading, Listing, Picture, Text, as_csv, markdown
from .overview_plots import methods_overview, parameters_overview, shots_overview
from .page import html
from .panels import curve_panels, shots_panels
from .results import RunResult
from .score_tables import forgetting_table, label_table, shots_table, tolerance
from .significance import significance_table
from .speed import speed_table
from .study import Study, studies
from .timeline_plot import unfreezing_timeline

Overlays = Callable[[Study, Path], Sequence[Block]]
"""(experiment, folder of the report) -> pictures of cases, written below that folder, or why there are none."""


def write_comparison(results: Iterable[RunResult], out: Path, *, overlays: Overlays | None = None) -> Path:
    """Write report.md, report.html, tables/ (CSV), tables.json and plots/ below `out`; returns report.md.

    Raises:
        ResultError: there is no run, or a draw is given twice.
    """
    compared = studies(results)
    if not compared:
        raise ResultError("there is no run to compare; give a protocol's folder, a .json or .jsonl file of runs, or "
                          "fold folders of nnU-Net.")
    out.mkdir(parents=True, exist_ok=True)
    tables: dict[str, list] = {}
    blocks = [*_failures(compared)]
    for study in compared:
        part = _study_blocks(study, out, overlays)
        blocks += part
        for table in Document("", part).tables():
            name = slug(f"{study.name} {table.name}")
            write_text_atomically(as_csv(table), out / "tables" / f"{name}.csv")
            tables[name] = [{k: _json_value(v) for k, v in record.items()} for record in table.records]
    document = Document("Comparison of " + ", ".join(study.name for study in compared), [*blocks, *_RULES])
    write_text_atomically(json.dumps(tables, indent=1, allow_nan=False), out / "tables.json")
    write_text_atomically(html(document, out), out / "report.html")
    write_text_atomically(markdown(document), out / "report.md")
    return out / "report.md"


def slug(text: str) -> str:
    """Return a text as a file name."""
    return re.sub(r"[^a-z0-9]+", "_", text.lower()).strip("_")


def _failures(compared: Sequence[Study]) -> list[Block]:
    failed = [(study, run) for study in compared for run in study.failed]
    if not failed:
        return []
    return [Heading(f"Runs with an error: {len(failed)}"), Text("They count nowhere below."),
            Listing([f"{study.name}, {run.method}, {run.shots} training cases, seed {run.seed}: {run.error}"
                     for study, run in failed])]


def _study_blocks(study: Study, out: Path, overlays: Overlays | None) -> list[Block]:
    """Everything about one experiment."""
    blocks: list[Block] = [Heading(f"{study.name}{' (simulated images)' if study.simulated else ''}"),
                           Text(_facts(study))]
    if not study.runs:
        return [*blocks, Text("No run finished.")]
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
    blocks += _speed(study, plots, prefix) + _cost(study, plots, prefix)
    if forgotten := forgetting_table(study):
        blocks += [Heading("What was forgotten", 3), forgotten]
    blocks += _tests(study)
    if overlays is not None:
        blocks += [Heading("Cases", 3), *overlays(study, out)]
    return blocks


def _facts(study: Study) -> str:
    cases = {case for run in study.runs for case in run.cases}
    facts = [_count(len(study.runs), "run"), _count(len(study.methods), "method"),
             f"up to {_count(study.expected_draws(), 'draw')}", _count(len(cases), "test case"),
             f"labels {', '.join(study.labels) or 'none'}", f"surface Dice at {tolerance(study)} mm"]
    for name, values in (("donor", {r.donor for r in study.runs}), ("machine", {r.machine for r in study.runs}),
                         ("steps an epoch", {r.iterations_per_epoch for r in study.runs}),
                         ("epochs", {len(r.curve) for r in study.runs})):
        if said := ", ".join(sorted(str(value) for value in values if value)):
            facts.append(f"{name} {said}")
    for kind, name in (("scratch", "scratch"), ("full_fine_tuning", "full fine-tuning")):
        if len(several := study.variants(kind)) > 1:
            facts.append(f"the reference for {name} is {study.special(kind)}, the best of {', '.join(several)}")
    warning = " The images of this experiment are simulated." if study.simulated else ""
    return "; ".join(facts) + "." + warning


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


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
    blocks: list[Block] = [Heading("Convergence", 3), speed_table(study), curves[0]]
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
    references = [name for kind in ("full_fine_tuning", "scratch") if (name := study.special(kind))]
    tables = [table for name in references if (table := significance_table(study, name)).rows]
    return [Heading("Differences between methods", 3), *tables] if tables else []


def _picture(study: Study, name: str, caption: str) -> Picture:
    return Picture(f"plots/{name}.png", study.title(caption))


def _json_value(value: object) -> object:
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


_RULES: Sequence[Block] = (
    Heading("How the numbers are made"),
    Listing([
        "Scores are of predictions on the voxel grid of the original images. A score of a case is the mean over its "
        "labels; a score of a method is the mean over the test cases of that, averaged over the draws first.",
        "A label that neither truth nor prediction holds is not defined and left out. A label that only one of them "
        "holds has Dice 0, surface Dice 0 and no distance: it counts as missed, and distances are means over the rest.",
        "Intervals: 95 % percentile bootstrap of the mean, 10,000 resamples of the test cases. They say how much the "
        "mean hangs on which cases were tested; not how much it hangs on the draw of training cases.",
        "Convergence: nnU-Net's pseudo Dice, one value an epoch. The moving average is nnU-Net's: 0.9 old + 0.1 new, "
        "starting at the first value.",
        "Tests: Wilcoxon signed-rank, two-sided, Holm's correction over all tests of a table.",
        "\"-\": not run, or not measured."]))
