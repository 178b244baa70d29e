"""confidence.py: agreement is the mean Dice with other networks, and a correlation is told only where it means something."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pandas
import pytest
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_dante.adaptation.confidence import agreement, correlation

LABELS = {"background": 0, "liver": 1, "spleen": 2}
SEGMENTER = SimpleNamespace(dataset_json={"labels": LABELS}, labels=LabelManager(LABELS, None))


def test_agreement_is_the_mean_over_kinds_of_the_dice_with_their_networks():
    mask = np.array([1, 1, 2, 2, 0, 0])
    half = np.array([1, 0, 2, 2, 0, 0])  # liver 2/3, spleen 1
    found = agreement(mask, {"donor": [half], "folds": [mask, half]}, SEGMENTER)
    assert found["donor"] == pytest.approx(5 / 6) and found["folds"] == pytest.approx((1 + 5 / 6) / 2)
    assert found["confidence"] == pytest.approx((found["donor"] + found["folds"]) / 2)
    assert found["confidence liver"] == pytest.approx((2 / 3 + 5 / 6) / 2) and found["confidence spleen"] == 1


def test_labels_that_no_network_sees_do_not_count_and_an_empty_case_has_no_confidence():
    liver, nothing = np.array([1, 1, 0]), np.zeros(3, int)
    found = agreement(liver, {"donor": [liver]}, SEGMENTER)
    assert found["confidence"] == 1 and np.isnan(found["confidence spleen"])
    assert np.isnan(agreement(nothing, {"donor": [nothing]}, SEGMENTER)["confidence"])
    assert agreement(nothing, {"donor": [liver]}, SEGMENTER)["confidence"] == 0, "they disagree whether it is there"


def unseen(dice, confidence):
    return pandas.DataFrame({"case": [str(n) for n in range(len(dice))], "dice": dice, "confidence": confidence,
                             "donor": confidence, "strength": confidence[::-1]})


def test_the_correlation_is_of_ranks_and_says_of_how_many_cases():
    said = correlation(unseen([n / 12 for n in range(12)], [n**3 / 2000 for n in range(12)]))
    assert "On 12 unseen cases" in said and "is 1.00 (donor alone 1.00, strength alone -1.00)" in said


def test_few_cases_give_no_correlation():
    said = correlation(unseen([0.1, 0.5, float("nan")] + [0.9] * 8, [0.1, 0.5, 0.7] + [float("nan")] + [0.9] * 7))
    assert said.startswith("Only 9 unseen cases: too few") and "0." not in said.replace("0.65", "")
