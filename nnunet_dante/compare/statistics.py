"""Intervals and paired tests over cases, for few cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

Interval = tuple[float, float]


def bootstrap_interval(values: Sequence[float]) -> Interval:
    """Return the 95 % percentile bootstrap interval of the mean, from 10,000 resamples.

    values: one value per case. The cases are resampled with a fixed seed, so that every report of the same results
        shows the same interval. Fewer than two values give (nan, nan).
    """
    sample = np.asarray(values, float)
    if len(sample) < 2:
        return float("nan"), float("nan")
    drawn = np.random.default_rng(0).integers(len(sample), size=(10_000, len(sample)))
    low, high = np.quantile(sample[drawn].mean(1), [0.025, 0.975])
    return float(low), float(high)


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """The comparison of a method with a reference on the same cases.

    cases: number of cases that both have.
    different: number of cases in which the scores differ. Only these enter the test.
    difference: method minus reference, mean over the cases.
    better: number of cases in which the method has the higher score.
    p: p value of the two-sided Wilcoxon signed-rank test, uncorrected.
    """

    cases: int
    different: int
    difference: float
    better: int
    p: float

    @property
    def smallest_p(self) -> float:
        """The smallest p value that this number of different cases allows: that of differences of one sign."""
        return min(1.0, 2.0 ** (1 - self.different))


def paired_test(method: Mapping[str, float], reference: Mapping[str, float]) -> PairedTest | None:
    """Compare two {case: score} on the cases that both have.

    Returns None if they have no case in common. If all scores are equal, p is 1.
    """
    cases = sorted(method.keys() & reference.keys())
    if not cases:
        return None
    # Rounded, because rounding errors would otherwise separate equal differences.
    differences = np.round([method[case] - reference[case] for case in cases], 12)
    return PairedTest(cases=len(cases), different=int(np.count_nonzero(differences)),
                      difference=float(differences.mean()), better=int((differences > 0).sum()),
                      p=_signed_rank_p(differences[differences != 0]))


def _signed_rank_p(differences: np.ndarray) -> float:
    """Return the exact two-sided p of Wilcoxon's signed-rank test, also where some differences are equally large.

    In that case, scipy uses a normal approximation. Its p can be smaller than the smallest exact p.
    """
    ranks = np.rint(2 * stats.rankdata(np.abs(differences))).astype(int)  # twice the rank: those of ties can be halves
    # chances[s]: probability that the ranks of the positive differences sum to s, if every sign is a coin toss
    chances = np.ones(1)
    for rank in ranks:
        chances = (np.pad(chances, (0, rank)) + np.pad(chances, (rank, 0))) / 2
    positive = int(ranks[differences > 0].sum())
    return min(1.0, 2 * float(min(chances[:positive + 1].sum(), chances[positive:].sum())))


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for the number of tests (Holm 1979), in the order given.

    The k-th smallest of m values is multiplied by m - k + 1. No corrected value is below that of a smaller p.
    """
    order = np.argsort(p_values)
    corrected = np.empty(len(order))
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1, np.maximum.accumulate(np.asarray(p_values, float)[order] * factors))
    return [float(p) for p in corrected]
