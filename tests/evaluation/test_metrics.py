"""metrics.py: Dice and Hausdorff distance against values that can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from nnunet_dante.errors import ConfigurationError
from nnunet_dante.evaluation.metrics import dice, hd95_mm, score


def block(start: int, stop: int, shape=(12, 12, 12)) -> np.ndarray:
    mask = np.zeros(shape, bool)
    mask[start:stop, 2:6, 2:6] = True
    return mask


def test_dice_of_a_mask_with_itself_is_one_and_with_a_half_overlap_is_a_half():
    assert dice(block(2, 6), block(2, 6)) == 1
    assert dice(block(2, 6), block(4, 8)) == 0.5


def test_dice_of_two_empty_masks_is_not_defined_and_of_one_empty_mask_is_zero():
    empty = np.zeros((12, 12, 12), bool)
    assert math.isnan(dice(empty, empty))
    assert dice(block(2, 6), empty) == dice(empty, block(2, 6)) == 0


@pytest.mark.parametrize("spacing_mm", [(1, 1, 1), (3, 1, 1), (0.5, 2, 2)])
def test_hd95_of_a_shift_is_the_shift_in_mm(spacing_mm):
    # All of the far face is off by two voxels, which is far more than 5 % of the surface.
    assert hd95_mm(block(2, 6), block(2, 8), spacing_mm=spacing_mm) == pytest.approx(2 * spacing_mm[0])
    assert hd95_mm(block(2, 6), block(2, 6), spacing_mm=spacing_mm) == 0


def test_hd95_is_symmetric():
    rng = np.random.default_rng(0)
    a, b = rng.random((2, 9, 9, 9)) > 0.6
    assert hd95_mm(a, b, spacing_mm=(1, 2, 3)) == hd95_mm(b, a, spacing_mm=(1, 2, 3))


def test_one_far_voxel_moves_the_maximum_but_not_the_95th_percentile():
    """Dante's "hausdorff_95" was the maximum, in voxels."""
    truth = np.zeros((40, 20, 20), bool)
    truth[2:14, 4:16, 4:16] = True
    predicted = truth.copy()
    predicted[39, 10, 10] = True  # 26 voxels, 78 mm away
    assert hd95_mm(truth, predicted, spacing_mm=(3, 1, 1)) == 0


def test_hd95_counts_voxels_at_the_border_of_the_image_as_surface():
    full = np.ones((4, 4, 4), bool)
    assert hd95_mm(full, full, spacing_mm=(1, 1, 1)) == 0


def test_hd95_is_infinite_for_a_missed_structure_and_undefined_without_one():
    empty = np.zeros((12, 12, 12), bool)
    assert hd95_mm(block(2, 6), empty, spacing_mm=(1, 1, 1)) == math.inf
    assert math.isnan(hd95_mm(empty, empty, spacing_mm=(1, 1, 1)))


def test_score_is_by_name_with_regions_and_without_background():
    truth = block(2, 4).astype(int) + 2 * block(4, 6)
    predicted = block(2, 6).astype(int)
    scores = score(truth, predicted, labels={"background": 0, "whole": [1, 2], "core": 2}, spacing_mm=(1, 1, 1))
    assert scores["whole"] == {"dice": 1.0, "hd95_mm": 0.0}
    assert scores["core"] == {"dice": 0.0, "hd95_mm": math.inf}
    assert list(scores) == ["whole", "core"]


def test_masks_on_different_grids_and_a_missing_spacing_are_refused():
    with pytest.raises(ConfigurationError, match="one voxel grid"):
        dice(block(2, 6), block(2, 6, shape=(12, 12, 13)))
    with pytest.raises(ConfigurationError, match="spacing_mm has 2 numbers"):
        hd95_mm(block(2, 6), block(2, 6), spacing_mm=(1, 1))
