"""Whether a method differs from a reference by more than chance, case by case."""

from __future__ import annotations

from .document import MISSING, Table, Value
from .statistics import PairedTest, holm, paired_test
from .study import Shots, Study, case_means, over_draws

LEVEL = 0.05


def significance_table(study: Study, reference: str) -> Table:
    """Return Wilcoxon signed-rank tests of every method against `reference` at every number of training cases.

    Pairs are test cases, each with its mean Dice over labels and draws. Holm corrects for all tests of the table.
    """
    tests: dict[tuple[str, Shots], PairedTest] = {}
    for shots in study.shots:
        theirs = _cases(study, reference, shots)
        for method in study.methods:
            if method != reference and (found := paired_test(_cases(study, method, shots), theirs)):
                tests[method, shots] = found
    corrected = dict(zip(tests, holm([test.p for test in tests.values()])))
    methods = [m for m in study.methods if any((m, shots) in tests for shots in study.shots)]
    rows = [[m, *(_cell(tests.get((m, s)), corrected.get((m, s), 1.0)) for s in study.shots)] for m in methods]
    records: list[dict[str, Value]] = [
        {"experiment": study.name, "simulated": study.simulated, "reference": reference, "method": method,
         "shots": study.shots_name(shots), "difference": test.difference, "better": test.better, "cases": test.cases,
         "p": test.p, "p_holm": corrected[method, shots]}
        for (method, shots), test in tests.items()]
    return Table(name=f"against_{reference}", title=study.title(f"Difference in Dice from {reference}"),
                 head=["method", *map(study.shots_name, study.shots)], rows=rows, records=records,
                 notes=[f"Mean difference, cases better of all cases, p after Holm's correction; † below {LEVEL}. "
                        "Two-sided Wilcoxon signed-rank test over the test cases, each with its mean Dice over labels "
                        "and draws. The draws share their test cases, so they are averaged and not counted as cases.",
                        *_power(list(tests.values()))])


def _cases(study: Study, method: str, shots: Shots) -> dict[str, float]:
    return over_draws([case_means(run.cases) for run in study.of(method, shots)])


def _cell(test: PairedTest | None, p: float) -> str:
    if test is None:
        return MISSING
    number = f"p {p:.3f}" if p >= 0.001 else "p < 0.001"
    return f"{test.difference:+.3f}, {test.better}/{test.cases}, {number}{' †' if p < LEVEL else ''}"


def _power(tests: list[PairedTest]) -> list[str]:
    """Say where significance is out of reach, whatever the methods do."""
    if not tests:
        return []
    cases, best = min(test.cases for test in tests), max(test.smallest_p for test in tests)
    said = (f"With {cases} case{'' if cases == 1 else 's'} the smallest p there can be is {best:.2g}, and "
            f"{min(1, best * len(tests)):.2g} where Holm multiplies by all {len(tests)} tests.")
    if best >= LEVEL:
        return [f"{said} No difference can be significant here: there are too few cases to tell."]
    if best * len(tests) >= LEVEL:
        return [f"{said} A difference can fail to be significant here for want of cases; a missing † says nothing."]
    return [f"{said} A missing † is no proof that two methods are equal."]
