"""Each voxel is counted once, by windows of patch size."""

from __future__ import annotations

from math import ceil, prod

import pytest
import torch

from nnunet_dante.training.tiles import tiles


@pytest.mark.parametrize(("shape", "patch"), [
    ((8, 8, 8), (8, 8, 8)), ((16, 8, 24), (8, 8, 8)), ((17, 9, 23), (8, 8, 8)), ((5, 7, 3), (8, 8, 8)),
    ((5, 20, 9), (8, 6, 9)), ((4, 10, 11), (1, 8, 8)), ((1, 1, 1), (4, 4, 4))])
def test_every_voxel_is_counted_once_and_by_no_more_windows_than_needed(shape, patch):
    volume = torch.arange(1, prod(shape) + 1, dtype=torch.float64).reshape(1, *shape)
    found = tiles(shape, patch)
    windows = [tile.cut(volume, patch) for tile in found]
    assert all(w.shape == (1, *patch) for w in windows)
    counted = torch.cat([w[(slice(None), *tile.own)].flatten() for w, tile in zip(windows, found)])
    assert torch.equal(counted.sort().values, volume.flatten())
    assert len(found) == prod(ceil(n / p) for n, p in zip(shape, patch))


def test_a_small_volume_lies_in_the_middle_between_zeros():
    (tile,) = tiles((2, 4), (6, 4))
    window = tile.cut(torch.ones(3, 2, 4), (6, 4))
    assert torch.equal(window.sum((0, 2)), torch.tensor([0.0, 0, 12, 12, 0, 0]))


def test_a_large_volume_is_never_padded():
    volume = torch.ones(1, 17, 9, 23)
    assert all(tile.cut(volume, (8, 8, 8)).min() == 1 for tile in tiles((17, 9, 23), (8, 8, 8)))
