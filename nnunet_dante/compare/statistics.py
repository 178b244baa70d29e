"""Intervals and paired tests over cases, for few cases."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

Interval = tuple[float, float]


def bootstrap_interval(values: Sequence[float], *, confidence: float = 0.95, resamples: int = 10_000) -> Interval:
    """Return the percentile bootstrap interval of the mean, resampling the values: give it one value a case.

    The generator is seeded, so a report can be repeated. Fewer than two values: (nan, nan).
    """
    sample = np.asarray(values, float)
    if len(sample) < 2:
        return float("nan"), float("nan")
    drawn = np.random.default_rng(0).integers(len(sample), size=(resamples, len(sample)))
    low, high = np.quantile(sample[drawn].mean(1), [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


@dataclass(frozen=True, kw_only=True)
class PairedTest:
    """A method against a reference on the same cases; difference: method minus reference, mean over cases.

    better: cases in which the method is strictly better. p: two-sided Wilcoxon signed-rank, uncorrected.
    """

    cases: int
    difference: float
    better: int
    p: float

    @property
    def smallest_p(self) -> float:
        """What p could be at best with so many cases: all differences of one sign."""
        return min(1.0, 2.0 ** (1 - self.cases))


def paired_test(method: Mapping[str, float], reference: Mapping[str, float]) -> PairedTest | None:
    """Compare two {case: score} on the cases that both have; None without a common case. Equal scores give p = 1."""
    cases = sorted(method.keys() & reference.keys())
    if not cases:
        return None
    differences = np.array([method[case] - reference[case] for case in cases])
    p = 1.0
    if differences.any():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of few cases: the report says so itself, with the smallest p there can be
            p = float(stats.wilcoxon(differences).pvalue)
    return PairedTest(cases=len(cases), difference=float(differences.mean()), better=int((differences > 0).sum()), p=p)


def holm(p_values: Sequence[float]) -> list[float]:
    """Return p values corrected for their number (Holm 1979): the k-th smallest of m times m - k + 1, never falling."""
    order = np.argsort(p_values)
    corrected = np.empty(len(order))
    factors = np.arange(len(order), 0, -1)
    corrected[order] = np.minimum(1, np.maximum.accumulate(np.asarray(p_values, float)[order] * factors))
    return [float(p) for p in corrected]
