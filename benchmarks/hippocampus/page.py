"""The figure and the tables of docs/few-shot.md, from the kept results.

    python benchmarks/hippocampus/page.py        # writes docs/images/few_shot.png, prints the tables
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from nnunet_dante.compare.plots import new_figure, save
from nnunet_dante.compare.results import read_results
from nnunet_dante.compare.speed import fewer, median, peak, reached
from nnunet_dante.compare.study import Mean, Shots, Study, mean_score, studies

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


def aim_rows(found: list[Study], methods: list[str]) -> Iterator[str]:
    """Over all shifts: fewer epochs, Dice against full fine-tuning's and scratch's."""
    shifted = [study for study in found if study.name != "acquisition shift"]
    cells = [(study, shots) for study in found for shots in study.shots if study.of("scratch", shots)]
    few, every = ([(study, shots) for study, shots in cells if wanted(*shots)]
                  for wanted in (lambda whole, n: not whole and n <= 4, lambda whole, n: whole))
    for method in methods:
        above = sum(_difference(*cell, method, "scratch") > 0 for cell in cells)
        saved = " | ".join(_saved(part, method) for part in (found, shifted))
        yield (f"| {method} | {saved} | "
               f"{' | '.join(_range([_difference(*c, method, 'full') for c in part]) for part in (few, every))} | "
               f"{above} of {len(cells)} |")


def _saved(found: list[Study], method: str) -> str:
    share = median([fewer(run, partner, to="scratch") for study in found for run in study.of(method)
                    if (partner := study.partner(run, "scratch"))])
    return "never" if share == float("-inf") else f"{share:.0f} %"


def _difference(study: Study, shots: Shots, method: str, other: str) -> float:
    own, theirs = (mean_score(study.of(m, shots)) for m in (method, other))
    assert own and theirs, f"{study.name} has no {method} or {other} with {shots} cases"
    return own.value - theirs.value


def _range(differences: list[float]) -> str:
    mean = sum(differences) / len(differences)
    return f"{mean:+.3f} ({min(differences):+.3f} to {max(differences):+.3f})"


def head(*names: str) -> str:
    return f"| {' | '.join(names)} |\n{'|---' * len(names)}|"


def main() -> None:
    results = [run for file in sorted(KEPT.glob("*/runs.json")) if file.parent.name not in ("search", "schedules")
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
            print(head("over all shifts", "fewer epochs, median", "without the mild shift",
                       "Dice over full's, 1 to 4 cases", "all cases", "above scratch"))
            print("\n".join(aim_rows(chosen, [m for m in trained if m != "scratch"])), end="\n\n")


if __name__ == "__main__":
    main()
