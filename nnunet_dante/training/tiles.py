"""Windows that cover a volume, each voxel counted once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor


@dataclass(frozen=True)
class Tile:
    """A window of patch size and the part of it that counts.

    start: first voxel in the volume, negative where the patch is larger than the volume. own: slices of the window;
    the parts of all tiles together are the volume, without overlap.
    """

    start: tuple[int, ...]
    own: tuple[slice, ...]

    def cut(self, volume: Tensor, patch: Sequence[int]) -> Tensor:
        """Return the window (channels, *patch) of `volume` (channels, *space), with zeros around the volume."""
        size = volume.shape[1:]
        inside = tuple(slice(max(0, a), min(a + p, n)) for a, p, n in zip(self.start, patch, size))
        padding = [side for a, p, n in zip(self.start, patch, size) for side in (max(0, -a), max(0, a + p - n))]
        last_axis_first = [side for pair in zip(padding[-2::-2], padding[::-2]) for side in pair]
        return torch.nn.functional.pad(volume[(slice(None), *inside)], last_axis_first)


def tiles(shape: Sequence[int], patch: Sequence[int]) -> list[Tile]:
    """Return as few windows as cover a volume of `shape`.

    The last window of an axis is moved inwards and counts only where none before it did; a volume smaller than the
    patch lies in its middle, as in nnU-Net's prediction.
    """
    return [Tile(tuple(a for a, _ in axes), tuple(own for _, own in axes))
            for axes in product(*(_axis(n, p) for n, p in zip(shape, patch)))]


def _axis(n: int, patch: int) -> list[tuple[int, slice]]:
    if n <= patch:
        before = (patch - n) // 2
        return [(-before, slice(before, before + n))]
    windows = []
    for first in range(0, n, patch):
        start = min(first, n - patch)
        windows.append((start, slice(first - start, min(first + patch, n) - start)))
    return windows
