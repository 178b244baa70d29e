"""The figure and the tables of docs/few-shot.md, from the kept results.

    python benchmarks/hippocampus/page.py        # writes docs/images/few_shot.png, prints the tables
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nnunet_dante.evaluation.plots import new_figure, save
from nnunet_dante.evaluation.results import read_results
from nnunet_dante.evaluation.speed import fewer, median, peak, reached
from nnunet_dante.evaluation.study import Mean, Shots, Study, mean_score, studies

REPOSITORY = Path(__file__).parents[2]
KEPT = REPOSITORY / "benchmarks" / "results" / "hippocampus"
SHOWN = {"scratch": "0.35", "full": "#d55e00", "decoder": "#0072b2", "LoRA": "#009e73", "GU": "#cc79a7"}
METHODS = ("zero-shot", "scratch", "full", "decoder", "head", "norm", "BitFit", "LoRA", "LoRA decoder", "DoRA", "LP-FT",
           "GU", "GU input first", "GU Dante")
ORDER = ("acquisition shift", "virtual scanner", "task shift", "virtual scanner, inverted start")


def figure(found: list[Study], file: Path) -> None:
    """One panel a shift: Dice against training cases, bands are bootstrap intervals over the test cases."""
    panels, axes = new_figure(10.5, 3.6, columns=len(found), sharey=True)
    for axis, study in zip(axes[0], found):
        columns = [s for s in study.shots if all(study.of(m, s) for m in SHOWN)]
        names = [study.shots_name(s) for s in columns]
        if before := mean_score(study.of("zero-shot")):
            axis.axhline(before.value, color="0.35", linestyle=":", label="donor, untrained")
        for method, colour in SHOWN.items():
            means = [m for s in columns if isinstance(m := mean_score(study.of(method, s)), Mean)]
            axis.plot(names, [m.value for m in means], color=colour, marker="o", markersize=4, label=method,
                      linestyle="--" if method == "scratch" else "-")
            axis.fill_between(names, *zip(*(m.interval for m in means)), color=colour, alpha=0.08, linewidth=0)
        axis.set_title(f"{study.name}{' (simulated)' if study.simulated else ''}", fontsize=10)
        axis.set_xlabel("training cases")
        axis.grid(alpha=0.2)
    axes[0, 0].set_ylabel("Dice on test cases")
    axes[0, -1].legend(fontsize=8, frameon=False, loc="lower right")
    save(panels, file, dpi=110)


def dice_rows(study: Study, methods: list[str]) -> Iterator[str]:
    for shots in study.shots:
        means = [mean_score(study.of(m, shots)) for m in methods]
        best = max(m.value for m in means if m)
        cells = ["" if m is None else f"**{m.value:.3f}**" if m.value == best else f"{m.value:.3f}" for m in means]
        yield f"| {_name(study)}, {study.shots_name(shots)} | {study.expected_draws(shots)} | {' | '.join(cells)} |"


def speed_rows(study: Study, methods: list[str]) -> Iterator[str]:
    for shots in study.shots:
        cells = [_speed(study, shots, method) for method in methods]
        yield f"| {_name(study)}, {study.shots_name(shots)} | {' | '.join(cells)} |"


def _name(study: Study) -> str:
    return f"{study.name}{' (simulated)' if study.simulated else ''}"


def _speed(study: Study, shots: Shots, method: str) -> str:
    pairs = [(run, partner) for run in study.of(method, shots) if (partner := study.partner(run, "scratch"))]
    if not pairs:
        return ""
    epochs = median([reached(run, peak(scratch)).epochs for run, scratch in pairs])
    if method == "scratch":
        return f"{epochs:g}"
    saved = median([fewer(run, scratch, to="scratch") for run, scratch in pairs])
    return f"{epochs:g} ({saved:.0f} %)" if epochs < float("inf") else "never"


def head(*names: str) -> str:
    return f"| {' | '.join(names)} |\n{'|---' * len(names)}|"


def main() -> None:
    results = [run for file in sorted(KEPT.glob("*/runs.json")) if file.parent.name != "search"
               for run in read_results(file)]
    found = sorted(studies(results), key=lambda study: ORDER.index(study.name))
    figure([study for study in found if study.of("scratch")], REPOSITORY / "docs" / "images" / "few_shot.png")
    for wide in (True, False):
        chosen = [study for study in found if bool(study.of("scratch")) is wide]
        if not chosen:
            continue
        methods = sorted(chosen[0].methods, key=METHODS.index)
        print(head("Dice on 13 test cases: shift, training cases", "draws", *methods))
        print("\n".join(row for study in chosen for row in dice_rows(study, methods)), end="\n\n")
        if wide:
            trained = [method for method in methods if method != "zero-shot"]
            print(head("epochs to 85 % of scratch's peak (fewer)", *trained))
            print("\n".join(row for study in chosen for row in speed_rows(study, trained)), end="\n\n")


if __name__ == "__main__":
    main()
