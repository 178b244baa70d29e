"""The runs of one experiment, by method, number of training cases and draw; and means over them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import msgspec
import numpy as np

from ..errors import ResultError
from .results import CaseScores, RunResult
from .statistics import Interval, bootstrap_interval

Shots = tuple[bool, int]
"""(whether these are all training cases there are, their number): a column of the tables, which sort by it.

Runs on all cases have the number 0 here, so that folds of different sizes are in one column.
"""


@dataclass(frozen=True, kw_only=True)
class Mean:
    """Mean of a score over cases, with the bootstrap interval over the cases. Each case is averaged over draws first.

    cases, draws: how many there were.
    """

    value: float
    interval: Interval
    cases: int
    draws: int


@dataclass(frozen=True, kw_only=True)
class Study:
    """One experiment: the finished `runs`, and the `failed` ones, which have an error and no scores."""

    name: str
    runs: tuple[RunResult, ...]
    failed: tuple[RunResult, ...]

    @property
    def simulated(self) -> bool:
        """Whether the images of this experiment are simulated."""
        return any(run.simulated for run in (*self.runs, *self.failed))

    def title(self, text: str) -> str:
        """Return a title with the experiment's name, and with a warning where its images are simulated."""
        return f"{text} - {self.name}{', simulated images' if self.simulated else ''}"

    @cached_property
    def methods(self) -> list[str]:
        """Names of the methods: zero-shot, scratch and full fine-tuning, then the others in the order of the runs."""
        ranks: dict[str, int] = {}
        for run in (*self.runs, *self.failed):
            ranks.setdefault(run.method, _rank(run))
        return sorted(ranks, key=lambda name: ranks[name])

    @cached_property
    def shots(self) -> list[Shots]:
        """Numbers of training cases in the trained runs, ascending."""
        return sorted({shots_of(run) for run in (*self.runs, *self.failed) if not run.is_zero_shot})

    @cached_property
    def labels(self) -> list[str]:
        """Label names, in the order in which the runs first name them."""
        return list(dict.fromkeys(label for run in self.runs for case in run.cases.values() for label in case))

    @cached_property
    def repeated(self) -> bool:
        """Whether a method was trained on several draws of as many cases; folds score other cases, and are no draws."""
        scored = [(run.method, shots_of(run), case) for run in self.runs if not run.is_zero_shot for case in run.cases]
        return len(set(scored)) < len(scored)

    def expected_draws(self, shots: Shots | None = None) -> int:
        """Return the largest number of draws that a method has with `shots` training cases (None: with any number)."""
        columns = self.shots if shots is None else [shots]
        return max((len(self.of(m, s)) for m in self.methods for s in columns if m != self.references["zero_shot"]),
                   default=0)

    def shots_name(self, shots: Shots) -> str:
        """Return the name of a column, such as "4" or "all (8-9)"."""
        counts = sorted({run.shots for run in (*self.runs, *self.failed) if shots_of(run) == shots})
        number = str(counts[0]) if len(counts) == 1 else f"{counts[0]}-{counts[-1]}"
        return f"all ({number})" if shots[0] else number

    def cases_name(self, shots: Shots) -> str:
        """Return a number of training cases in words, such as "1 training case"."""
        name = self.shots_name(shots)
        return f"{name} training case{'' if name == '1' else 's'}"

    def of(self, method: str | None, shots: Shots | None = None) -> list[RunResult]:
        """Return the runs of a method with `shots` training cases (None: with any number).

        Zero-shot runs have no training cases and belong to every number. Without a method, there are no runs.
        """
        return [run for run in self.runs
                if run.method == method and (shots is None or run.is_zero_shot or shots_of(run) == shots)]

    @cached_property
    def references(self) -> dict[str, str | None]:
        """The method to compare with, or None, of each kind: "zero_shot", "scratch" and "full_fine_tuning".

        Where several methods are of one kind, this is the one with the highest mean Dice over all its runs. A weak
        reference would make the other methods look better than they are.
        """
        chosen = {}
        for kind in ("zero_shot", "scratch", "full_fine_tuning"):
            dice = {m: mean.value for m in self.variants(kind) if (mean := mean_score(self.of(m)))}
            chosen[kind] = max(dice, key=lambda m: dice[m]) if dice else next(iter(self.variants(kind)), None)
        return chosen

    def variants(self, kind: str) -> list[str]:
        """Return all methods of a kind: "zero_shot", "scratch" or "full_fine_tuning"."""
        return [m for m in self.methods if any(getattr(r, f"is_{kind}") for r in self.of(m))]

    def partner(self, run: RunResult, method: str | None) -> RunResult | None:
        """Return the run of `method` with as many training cases as `run` and the same seed; None if there is none."""
        return next((r for r in self.of(method, shots_of(run)) if r.seed == run.seed), None)


def studies(results: Iterable[RunResult]) -> list[Study]:
    """Group results by experiment, in the order in which the experiments first appear.

    Raises:
        ResultError: two results are of the same experiment, method, number of training cases and seed.
    """
    named: dict[str, list[RunResult]] = {}
    for result in with_donor_names(results):
        named.setdefault(result.experiment, []).append(result)
    made = []
    for name, runs in named.items():
        seen = set()
        for run in runs:
            key = (run.method, shots_of(run), run.seed)
            if key in seen:
                raise ResultError(f"{run.method} of experiment {name!r} with {run.shots} cases and seed {run.seed} is "
                                  f"given twice; a draw that counts twice would narrow the intervals. Give each once.")
            seen.add(key)
        made.append(Study(name=name, runs=tuple(r for r in runs if not r.error),
                          failed=tuple(r for r in runs if r.error)))
    return made


def case_means(scores: CaseScores, metric: str = "dice", label: str | None = None) -> dict[str, float]:
    """Return {case: mean of a score over the labels of the case, or the score of one label}.

    Scores that are undefined or infinite do not count; cases without any other score are left out.
    """
    means = {}
    for case, labels in scores.items():
        chosen = labels.values() if label is None else [labels[label]] if label in labels else []
        finite = [value for scored in chosen if math.isfinite(value := scored.get(metric, math.nan))]
        if finite:
            means[case] = sum(finite) / len(finite)
    return means


def over_draws(draws: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return {case: mean of its values in the draws that have the case}."""
    cases = sorted({case for draw in draws for case in draw})
    return {case: float(np.mean([draw[case] for draw in draws if case in draw])) for case in cases}


def mean_score(runs: Sequence[RunResult], metric: str = "dice", label: str | None = None) -> Mean | None:
    """Return the mean of a score over test cases and draws; `runs` are the draws. None if no score is defined."""
    return mean_over_cases([case_means(run.cases, metric, label) for run in runs])


def mean_over_cases(draws: Sequence[dict[str, float]]) -> Mean | None:
    """Return the mean over cases of several draws of {case: value}; None if there is no case."""
    values = list(over_draws(draws).values())
    if not values:
        return None
    return Mean(value=float(np.mean(values)), interval=bootstrap_interval(values), cases=len(values), draws=len(draws))


def missed(runs: Sequence[RunResult], label: str | None = None) -> tuple[int, int]:
    """Return how many structures were missed (their distance is infinite), and how many structures there are.

    A structure is one label of one case in one draw.
    """
    values = [scored.get("hd95_mm", math.nan) for run in runs for labels in run.cases.values()
              for name, scored in labels.items() if label in (None, name)]
    return sum(math.isinf(v) for v in values), sum(not math.isnan(v) for v in values)


def shots_of(run: RunResult) -> Shots:
    """Return the column of the tables that a run belongs to."""
    return (True, 0) if run.all else (False, run.shots)


def _rank(run: RunResult) -> int:
    return 0 if run.is_zero_shot else 1 if run.is_scratch else 2 if run.is_full_fine_tuning else 3


def with_donor_names(results: Iterable[RunResult]) -> list[RunResult]:
    """Return the results in the same order; in experiments with several donors, the method's name tells the donor."""
    results = list(results)
    donors: dict[str, set[str]] = {}
    for run in results:
        if run.donor and not run.is_scratch:
            donors.setdefault(run.experiment, set()).add(run.donor)
    return [msgspec.structs.replace(run, method=f"{run.method} from {run.donor}")
            if not run.is_scratch and len(donors.get(run.experiment, ())) > 1
            and not run.method.endswith(f" from {run.donor}") else run for run in results]
