"""Intervals and paired tests over cases, for few cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

Interval = tuple[float, float]


def bootstrap_interval(values: Sequence[float], *, confidence: float = 0.95, resamples: int = 10_000) -> Interval:
    """Return the percentile bootstrap interval of the mean.

    values: one value per case; the cases are resampled. The generator is seeded, so a report can be repeated.
    Fewer than two values give (nan, nan).
    """
    sample = np.asarray(values, float)
    if len(sample) < 2:
        return float("nan"), float("nan")
    drawn = np.random.default_rng(0).integers(len(sample), size=(resamples, len(sample)))
    low, high = np.quantile(sample[drawn].mean(1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """A method against a reference on the same cases.

    cases: number of common cases. different: those in which the scores differ; only they enter the test.
    difference: method minus reference, mean over the cases. better: cases in which the method is strictly better.
    p: of the two-sided Wilcoxon signed-rank test, uncorrected.
    """

    cases: int
    different: int
    difference: float
    better: int
    p: float

    @property
    def smallest_p(self) -> float:
        """The p value if all these differences had one sign: no p can be smaller."""
        return min(1.0, 2.0 ** (1 - self.different))


def paired_test(method: Mapping[str, float], reference: Mapping[str, float]) -> PairedTest | None:
    """Compare two {case: score} on the cases that both have; None without a common case. Equal scores give p = 1."""
    cases = sorted(method.keys() & reference.keys())
    if not cases:
        return None
    differences = np.round([method[case] - reference[case] for case in cases], 12)  # rounding errors break no ties
    return PairedTest(cases=len(cases), different=int(np.count_nonzero(differences)),
                      difference=float(differences.mean()), better=int((differences > 0).sum()),
                      p=_signed_rank_p(differences[differences != 0]))


def _signed_rank_p(differences: np.ndarray) -> float:
    """Return the exact two-sided p of Wilcoxon's signed-rank test, also where differences are equally large.

    scipy goes over to a normal approximation there, whose p can be smaller than any that is possible.
    """
    ranks = np.rint(2 * stats.rankdata(np.abs(differences))).astype(int)  # doubled, as tied ranks are halves
    chances = np.ones(1)  # of each sum of the ranks of positive differences, when every sign is a coin
    for rank in ranks:
        chances = (np.pad(chances, (0, rank)) + np.pad(chances, (rank, 0))) / 2
    positive = int(ranks[differences > 0].sum())
    return min(1.0, 2 * float(min(chances[:positive + 1].sum(), chances[positive:].sum())))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number (Holm 1979): the k-th smallest of m times m - k + 1, never falling."""
    order = np.argsort(p_values)
    corrected = np.empty(len(order))
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1, np.maximum.accumulate(np.asarray(p_values, float)[order] * factors))
    return [float(p) for p in corrected]
