"""metrics.py: Dice, Hausdorff distance and surface Dice against values that can be worked out by hand."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import nnunet_dante
from nnunet_dante.compare.metrics import dice, hd95_mm, score, surface_dice
from nnunet_dante.errors import ConfigurationError


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
    assert scores["whole"] == {"dice": 1.0, "hd95_mm": 0.0, "surface_dice": 1.0}
    assert scores["core"] == {"dice": 0.0, "hd95_mm": math.inf, "surface_dice": 0.0}
    assert list(scores) == ["whole", "core"]


def test_masks_on_different_grids_and_a_missing_spacing_are_refused():
    with pytest.raises(ConfigurationError, match="one voxel grid"):
        dice(block(2, 6), block(2, 6, shape=(12, 12, 13)))
    with pytest.raises(ConfigurationError, match="spacing_mm has 2 numbers"):
        hd95_mm(block(2, 6), block(2, 6), spacing_mm=(1, 1))


@pytest.mark.parametrize(("spacing_mm", "axis"), [((3, 1, 1), 0), ((1, 3, 0.5), 1), ((1, 1, 2.5), 2)])
def test_shifted_boxes_agree_beyond_the_shift_and_on_the_parallel_faces_below_it(spacing_mm, axis):
    truth = np.zeros((24, 24, 24), bool)
    truth[6:16, 6:16, 6:16] = True
    predicted = np.roll(truth, 2, axis)
    shift = 2 * spacing_mm[axis]
    assert hd95_mm(truth, predicted, spacing_mm=spacing_mm) == pytest.approx(shift)
    assert surface_dice(truth, predicted, spacing_mm=spacing_mm, tolerance_mm=shift) == 1
    sides = [10 * spacing_mm[a] for a in range(3)]
    area = 2 * (sides[0] * sides[1] + sides[1] * sides[2] + sides[0] * sides[2])
    across = sides[0] * sides[1] * sides[2] / sides[axis]  # one of the two faces that moved
    # Off are both moved faces, and the four sides where they stick out: 2 of 10 layers, of either box.
    off = 2 * across + (area - 2 * across) * 0.2
    found = surface_dice(truth, predicted, spacing_mm=spacing_mm, tolerance_mm=0)
    assert found == pytest.approx(1 - off / area, abs=0.07)  # edges and corners are cut off by half a voxel


def test_two_single_voxels_are_apart_by_the_gap_between_their_faces():
    truth, predicted = np.zeros((2, 5, 5, 5), bool)
    truth[0, 0, 0] = predicted[0, 0, 2] = True  # at the border of the image
    assert hd95_mm(truth, predicted, spacing_mm=(1, 1, 1.5)) == 3  # from centre to centre
    values = [surface_dice(truth, predicted, spacing_mm=(1, 1, 1.5), tolerance_mm=t) for t in (0, 1.4, 1.5, 3)]
    assert values == [0, 0, 0.5, 1]  # the faces that look at each other are one voxel apart, the others two


def test_surface_dice_of_empty_masks_follows_the_rule_for_dice():
    empty = np.zeros((12, 12, 12), bool)
    options = {"spacing_mm": (1, 1, 1), "tolerance_mm": 2}
    assert math.isnan(surface_dice(empty, empty, **options))
    assert surface_dice(block(2, 6), empty, **options) == surface_dice(empty, block(2, 6), **options) == 0


def test_a_single_slice_is_scored_as_the_2d_image_it_is():
    truth, predicted = np.zeros((2, 24, 24), bool)
    truth[4:12, 4:12] = predicted[7:15, 4:12] = True
    flat = hd95_mm(truth, predicted, spacing_mm=(2, 1)), surface_dice(truth, predicted, spacing_mm=(2, 1),
                                                                      tolerance_mm=2)
    for axis in range(3):
        spacing_mm = np.insert([2.0, 1.0], axis, 5.0)
        a, b = (np.expand_dims(mask, axis) for mask in (truth, predicted))
        assert (hd95_mm(a, b, spacing_mm=spacing_mm),
                surface_dice(a, b, spacing_mm=spacing_mm, tolerance_mm=2)) == pytest.approx(flat)


def test_scoring_says_nothing_and_leaves_the_users_warnings_alone(recwarn):
    surface_dice(block(2, 6), block(3, 7), spacing_mm=(1, 1, 1), tolerance_mm=1)
    assert not recwarn.list


def test_a_tolerance_that_is_none_is_refused():
    with pytest.raises(ConfigurationError, match="tolerance_mm is -1"):
        surface_dice(block(2, 6), block(2, 6), spacing_mm=(1, 1, 1), tolerance_mm=-1)


def test_voxels_that_the_truth_ignores_do_not_count():
    truth, predicted = block(2, 6).astype(int), block(2, 8).astype(int)
    truth[6:8] = 3
    scores = score(truth, predicted, labels={"background": 0, "organ": 1, "ignore": 3}, spacing_mm=(1, 1, 1))
    assert scores == {"organ": {"dice": 1.0, "hd95_mm": 0.0, "surface_dice": 1.0}}


def test_measuring_leaves_transformers_alone_and_importable(tmp_path):
    (tmp_path / "transformers.py").write_text("print('loaded')")
    code = ("import sys, numpy as np\nfrom nnunet_dante.compare.metrics import hd95_mm\n"
            "assert hd95_mm(np.ones((3, 3), bool), np.ones((3, 3), bool), spacing_mm=(1, 1)) == 0\n"
            "print('measured', 'transformers' in sys.modules)\nimport transformers")
    paths = os.pathsep.join(map(str, (tmp_path, Path(nnunet_dante.__file__).parents[1])))
    said = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": paths})
    assert said.stdout.split() == ["measured", "False", "loaded"], said
