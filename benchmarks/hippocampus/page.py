"""The figure and the table of docs/few-shot.md, from the kept results.

    python benchmarks/hippocampus/page.py     # also writes benchmarks/results/hippocampus/tables.md: all results
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from nnunet_dante.compare.results import read_results
from nnunet_dante.compare.study import Mean, Shots, Study, mean_score, studies
from nnunet_dante.compare.training_log import fewer, median, peak, reached
from nnunet_dante.datasets.views import new_figure, save

REPOSITORY = Path(__file__).parents[2]
KEPT = REPOSITORY / "benchmarks" / "results" / "hippocampus"
SHOWN = {"scratch": ("from scratch", "0.35"), "full": ("full fine-tuning", "#d55e00"),  # method: name, colour
         "LoRA": ("LoRA", "#009e73"), "GU": ("gradual unfreezing", "#0072b2")}
CHOSEN = ("full", "decoder", "LoRA", "GU")  # methods of strength.toml that choose how much they keep
UNTRAINED = "#b0578f"
TITLES = {"acquisition shift": "Mild shift: nothing is lost", "task shift": "New labels: fine-tune",
          "virtual scanner": "Inverted contrast (simulated)"}
METHODS = ("zero-shot", "scratch", "full", "decoder", "head", "norm", "BitFit", "LoRA", "LoRA decoder", "DoRA", "LP-FT",
           "GU", "GU input first", "GU Dante")
ORDER = ("acquisition shift", "virtual scanner", "task shift", "virtual scanner, inverted start")


def figure(found: list[Study], file: Path) -> None:
    """One panel per shift: Dice over the number of training cases; each line is named at its end."""
    panels, axes = new_figure(10.5, 3.8, columns=len(found), sharey=True)
    for axis, study in zip(axes[0], found):
        columns = [s for s in study.shots if all(study.of(m, s) for m in SHOWN)]
        positions = list(range(len(columns)))
        ends = []
        for method, (name, colour) in SHOWN.items():
            means = [m.value for s in columns if isinstance(m := mean_score(study.of(method, s)), Mean)]
            axis.plot(positions, means, color=colour, marker="o", markersize=4, linewidth=2)
            ends.append((means[-1], name, colour))
        if before := mean_score(study.of("zero-shot")):
            axis.plot(positions, [before.value] * len(positions), color=UNTRAINED, linestyle=":", linewidth=2)
            ends.append((before.value, "donor, untrained", UNTRAINED))
        _name_lines(axis, positions[-1] + 0.15, ends)
        axis.set_xticks(positions, [study.shots_name(s).replace("all (16)", "16") for s in columns])
        axis.set(title=TITLES[study.name], xlabel="training cases", xlim=(-0.2, positions[-1] + 2.3), ylim=(0, 0.95))
        axis.grid(axis="y", alpha=0.2)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("Dice on 13 test cases")
    save(panels, file, dpi=110)


def _name_lines(axis, x: float, ends: list[tuple[float, str, str]], *, gap: float = 0.05) -> None:
    """Write the names at the ends of their lines, pushed apart where lines end close together."""
    ends = sorted(ends)
    heights = [value for value, _, _ in ends]
    for _ in range(50):
        for low, high in zip(range(len(ends)), range(1, len(ends))):
            push = max(0.0, gap - (heights[high] - heights[low])) / 2
            heights[low], heights[high] = heights[low] - push, heights[high] + push
    for height, (_, name, colour) in zip(heights, ends):
        axis.text(x, height, name, color=colour, va="center", fontsize=9)


def strength_rows(study: Study) -> Iterator[str]:
    """Per number of cases: the donor, scratch, and each method with all that it learned and with what it kept."""
    for shots in study.shots:
        cells = [f"{mean.value:.3f}" for name in ("zero-shot", "scratch")
                 if (mean := mean_score(study.of(name, shots)))]
        for method in CHOSEN:
            every, kept = all_and_kept(study, method, shots)
            share = median([100 * run.strength for run in study.of(method, shots) if run.strength is not None])
            cells.append(f"{every:.3f} to {kept:.3f} ({share:.0f} %)")
        yield f"| {_name(study)}, {study.shots_name(shots)} | {study.expected_draws(shots)} | {' | '.join(cells)} |"


def all_and_kept(study: Study, method: str, shots: Shots) -> tuple[float, float]:
    """Return the Dice with all that was learned, and with what was kept of it."""
    runs = study.of(method, shots)
    every, kept = mean_score([run.at_full_strength for run in runs]), mean_score(runs)
    assert every and kept, f"{study.name} has no {method} with {shots} cases"
    return every.value, kept.value


def strength_aims(found: list[Study]) -> Iterator[str]:
    """Per method: against the untrained donor, against all that was learned, against scratch; worst row and mean."""
    for method in CHOSEN:
        donors, gains, above = [], [], []
        for study in found:
            for shots in study.shots:
                every, kept = all_and_kept(study, method, shots)
                gains.append(kept - every)
                above.append(_difference(study, shots, method, "scratch"))
                if study.name == "acquisition shift":
                    donors.append(_difference(study, shots, method, "zero-shot"))
        yield (f"| {method} | {min(donors):+.3f} | {_range(gains)} | {sum(a > 0 for a in above)} of {len(above)}, "
               f"smallest {min(above):+.3f} |")


def short_rows(found: list[Study]) -> Iterator[str]:
    """Per method and shift, the Dice with 1, 4 and 16 cases."""
    for method in METHODS[1:]:
        cells = [" / ".join(f"{mean.value:.2f}" for s in study.shots if (not s[0] and s[1] in (1, 4)) or s[0]
                            if (mean := mean_score(study.of(method, s)))) for study in found]
        yield f"| {method} | {' | '.join(cells)} |"


def dice_rows(study: Study, methods: list[str]) -> Iterator[str]:
    for shots in study.shots:
        means = [mean_score(study.of(m, shots)) for m in methods]
        best = max(m.value for m in means if m)
        cells = ["" if m is None else f"**{m.value:.3f}**" if m.value == best else f"{m.value:.3f}" for m in means]
        yield f"| {_name(study)}, {study.shots_name(shots)} | {study.expected_draws(shots)} | {' | '.join(cells)} |"


def speed_rows(study: Study, methods: Sequence[str]) -> Iterator[str]:
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


def read(*names: str) -> list[Study]:
    """Return the experiments of kept protocols."""
    results = [run for name in names for run in read_results(KEPT / name / "runs.json")]
    return sorted(studies(results), key=lambda study: ORDER.index(study.name))


def main() -> None:
    chosen, found = read("strength"), read("protocol", "inverted")
    figure(chosen, REPOSITORY / "docs" / "images" / "few_shot.png")
    kept = [head("shift, training cases", "draws", "donor", "scratch", *(f"{m}: all to kept" for m in CHOSEN)),
            *(row for study in chosen for row in strength_rows(study))]
    aims = [head("method", "mild shift: against the donor, worst row", "kept against all, all rows", "above scratch"),
            *strength_aims(chosen)]
    complete = [study for study in found if study.of("scratch")]
    lines = ["# All results of the hippocampus benchmark", "", "Written by `page.py`; docs/few-shot.md explains them.",
             "", "## As trainings end: how much is kept is chosen on unseen cases", "", *kept, "",
             "Dice on 13 test cases with all that was learned, and with what was kept of it; in brackets the share "
             "kept, median over the draws.", "", *aims, "", "## All methods, with all that they learned", "",
             "Trained with version 0.1.0, which kept all."]
    for part in (complete, [study for study in found if study not in complete]):
        methods = sorted(part[0].methods, key=METHODS.index)
        lines += ["", head("Dice on 13 test cases: shift, training cases", "draws", *methods),
                  *(row for study in part for row in dice_rows(study, methods))]
    trained = METHODS[1:]
    lines += ["", head("epochs to 85 % of scratch's peak (fewer)", *trained),
              *(row for study in complete for row in speed_rows(study, trained)), "",
              "Epochs of 50, median over the draws; 0: the donor was there before training. In brackets: how many "
              "fewer than scratch, the median of the pairs of one draw. \"never\": not within 50 epochs.", "",
              head("over all shifts", "fewer epochs, median", "without the mild shift",
                   "Dice over full's, 1 to 4 cases", "all cases", "above scratch"),
              *aim_rows(complete, [m for m in trained if m != "scratch"]), "",
              "Fewer epochs: median over all runs. Dice over full fine-tuning's: mean over shifts and numbers of "
              "cases, smallest and largest in brackets. Above scratch: of the 15 rows of the first table."]
    (KEPT / "tables.md").write_text("\n".join(lines) + "\n")
    print("\n".join([*kept, "", *aims, ""]))
    print(head("method", *(f"{study.name}, 1 / 4 / 16 cases" for study in complete)))
    print("\n".join(short_rows(complete)))


if __name__ == "__main__":
    main()
