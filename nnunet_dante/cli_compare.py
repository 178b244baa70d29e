"""The commands that compare methods: shots, benchmark, compare. Heavy modules are imported when they run."""

from __future__ import annotations

from pathlib import Path

import click

from . import cli_options as shared


@click.command()
@shared.dataset
@click.option("-k", "--shots", multiple=True, required=True, metavar="K,K,...",
              help="Numbers of training cases, such as 1,2,4; `all` means all cases. Repeatable.")
@click.option("--seeds", type=click.IntRange(1), default=3, show_default=True,
              help="How many times each number of cases is drawn.")
@click.option("--groups", type=shared.EXISTING_FILE,
              help="JSON {group: [cases]} or CSV case,group: the cases of a group, such as a patient, stay together.")
@click.option("--test", type=shared.EXISTING_FILE,
              help="Cases that no training may see: one per line, or a JSON list.")
@click.option("--val", type=click.IntRange(1),
              help="Number of validation cases. Default: a fifth of all, at least one.")
@click.option("--force", is_flag=True, help="Replace existing folds that differ.")
def shots(dataset: str, shots: tuple[str, ...], **options) -> None:
    """Draw small training sets, to measure what few cases are worth.

    This writes folds with K training cases each. Each set contains the smaller ones, all are drawn once for each seed,
    and all folds have the same validation cases.
    """
    words = shared.split_words(shots)
    if wrong := [word for word in words if word != "all" and not word.isdecimal()]:
        raise click.BadParameter(f"{wrong[0]!r} is neither a number nor the word all.", param_hint="-k")

    from .datasets.shots import ALL, write_shots
    from .training.launch import train_command

    drawn = write_shots(dataset, [word if word == ALL else int(word) for word in words], **options)
    command = train_command(drawn.dataset, "CONFIGURATION", "FOLD", plans="PLANS", trainer="TRAINER")
    click.echo(f"{drawn}\nTrain one with: {command}")


@click.command()
@click.argument("protocol", type=shared.EXISTING)
@click.option("-o", "--output", type=shared.FOLDER, required=True,
              help="Folder for the results. The same command continues a stopped run.")
@click.option("--jobs", type=click.IntRange(1), default=1, show_default=True,
              help="How many runs go on at the same time.")
def benchmark(protocol: Path, output: Path, jobs: int) -> None:
    """Train many methods and numbers of cases in a row.

    PROTOCOL is a TOML file that names methods, numbers of cases and donors. `nnunet-dante compare` makes a report of
    the results.
    """
    from .benchmark.run import run_protocol

    results = run_protocol(protocol, output, jobs=jobs)
    failed = [r for r in results if r.error]
    click.echo(f"{len(results) - len(failed)} runs in {output}; compare them: nnunet-dante compare {output} -o REPORT")
    if failed:
        raise click.ClickException(f"{len(failed)} runs failed, first {failed[0].experiment}, {failed[0].method}: "
                                   f"{failed[0].error} Logs: {output / 'logs'}; the same command tries them again.")


@click.command()
@click.argument("sources", nargs=-1, required=True, type=shared.EXISTING)
@click.option("-o", "--output", type=shared.FOLDER, required=True, help="Folder for the report.")
@click.option("--tolerance-mm", type=click.FloatRange(0), default=2.0, show_default=True,
              help="Tolerance of the surface Dice, for fold folders; results of `benchmark` have their own.")
def compare(sources: tuple[Path, ...], output: Path, tolerance_mm: float) -> None:
    """Compare trainings in one report.

    It shows Dice, distances, speed, cost, forgetting and significance, as Markdown and as a web page.

    SOURCES are result folders of `benchmark`, files of results, or finished fold folders of nnU-Net
    (TRAINER__PLANS__CONFIGURATION/fold_X), whose validation predictions are scored.
    """
    from .compare.report import compare as run

    report = run(sources, output, tolerance_mm=tolerance_mm)
    click.echo(f"Report: {report} and {report.with_suffix('.html')}")
