"""statistics.py: against values worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nnunet_dante.compare.statistics import bootstrap_interval, holm, paired_test


def test_holm_multiplies_the_smallest_by_all_and_never_falls():
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])  # 3 x 0.01, then 2 x 0.03, then not below
    assert holm([0.5, 0.9]) == [1, 1]
    assert holm([]) == []


def test_all_differences_of_one_sign_give_the_smallest_p_there_can_be():
    reference = {f"c{n}": 0.5 for n in range(6)}
    method = {f"c{n}": 0.5 + 0.01 * (n + 1) for n in range(6)}
    test = paired_test(method, reference)
    assert test.p == pytest.approx(2 / 2**6) == test.smallest_p
    assert (test.cases, test.better) == (6, 6) and test.difference == pytest.approx(0.035)


def test_wilcoxon_by_hand():
    """Differences +1 +2 -3 +4 +5: ranks of the negative sum to 3; 5 of 32 sign patterns have a sum of 3 or less."""
    method = dict(zip("abcde", (0.1, 0.2, -0.3, 0.4, 0.5)))
    assert paired_test(method, dict.fromkeys("abcde", 0.0)).p == pytest.approx(2 * 5 / 32)


def test_only_common_cases_are_compared_and_equal_ones_are_no_difference():
    assert paired_test({"a": 1.0}, {"b": 1.0}) is None
    test = paired_test({"a": 0.5, "b": 0.5, "x": 0.9}, {"a": 0.5, "b": 0.5})
    assert (test.cases, test.better, test.p, test.difference) == (2, 0, 1.0, 0.0)


def test_the_bootstrap_interval_is_that_of_the_normal_theory_for_many_cases_and_repeats():
    values = np.random.default_rng(1).normal(0.8, 0.1, 400)
    low, high = bootstrap_interval(values)
    error = 1.96 * values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - error, values.mean() + error), abs=error / 10)
    assert bootstrap_interval(values) == (low, high)


def test_one_case_has_no_interval_and_equal_cases_one_without_width():
    assert all(map(math.isnan, bootstrap_interval([0.5])))
    assert bootstrap_interval([0.5, 0.5]) == (0.5, 0.5)


def test_cases_without_a_difference_do_not_lower_the_smallest_p():
    reference = dict.fromkeys("abcdefghij", 0.5)
    test = paired_test(reference | {"a": 0.7, "b": 0.8}, reference)
    assert (test.cases, test.different) == (10, 2)
    assert test.p == test.smallest_p == 0.5


@pytest.mark.parametrize("number", [6, 13, 20, 60])
def test_differences_of_one_size_give_no_smaller_p_than_is_possible(number):
    """scipy's normal approximation gives 0.014 for six equal differences; of 64 sign patterns two are as extreme."""
    reference = {f"c{n}": 0.1 * n for n in range(number)}
    test = paired_test({case: value + 0.01 for case, value in reference.items()}, reference)
    assert test.p == pytest.approx(2.0 ** (1 - number)) == pytest.approx(test.smallest_p)


def test_p_is_scipys_exact_one_where_nothing_ties():
    from scipy import stats

    differences = np.random.default_rng(2).normal(0.3, 1, 15)
    test = paired_test(dict(enumerate(differences)), dict.fromkeys(range(15), 0.0))
    assert test.p == pytest.approx(stats.wilcoxon(differences, method="exact").pvalue)
