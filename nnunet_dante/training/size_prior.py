"""The expected size of each organ as a training signal on images without masks (FSEFT's transductive inference)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ..peft.modes import evaluating, full_resolution
from .tiles import Tile, tiles

Gradient = list[tuple[nn.Parameter, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A preprocessed image without a mask: data (channels, *space), three-dimensional also for 2d networks."""

    name: str
    data: Tensor
    voxel_mm3: float


@dataclass(frozen=True, kw_only=True)
class SizePrior:
    """weight * mean over organs of max(0, |e| - margin), e = (p* - p) / max(p, p*) (FSEFT, arXiv 2303.17051).

    p is the predicted size of an organ in a whole volume, the sum of its probabilities in mm^3; p* the expected one.
    As in FSEFT's code max(p, p*) is a scale and has no gradient: with one, the pull on an organ that is predicted r
    times too large would fade as 1 / r. (That code adds the margin where p is too large; only what it prints changes.)

    Args:
        sizes_mm3: p* of the network's outputs by number; others do not count.
        patch: what the network takes, 2 or 3 axes. batch: of the training.
        probabilities: from logits (batch, outputs, *patch).
    """

    volumes: Sequence[Volume]
    sizes_mm3: Mapping[int, float]
    weight: float
    margin: float
    patch: Sequence[int]
    batch: int
    probabilities: Callable[[Tensor], Tensor]

    def steps(self, volume: Volume) -> int:
        """Return how many training batches the volume is: the training visits the next one after as many steps."""
        return math.ceil(len(self._tiles(volume)) / self.batch)

    def choose(self, epoch: int, visit: int) -> Volume:
        """Return the volume of a visit, a pure function: each volume in turn, in an order of the epoch's own."""
        order = np.random.default_rng(epoch).permutation(len(self.volumes))
        return self.volumes[order[visit % len(order)]]

    def measure(self, network: nn.Module, volume: Volume, *, loss_scale: float = 1.0) -> tuple[list[float], Gradient]:
        """Return p / p* of each organ, and the gradient for each parameter that requires one.

        A first pass without gradients measures the sizes; if all are within the margin, the gradient is empty. The
        penalty's slope in them is one number an organ, so the second pass holds one batch of tiles at a time in memory.
        loss_scale keeps half-precision gradients in range: they are divided by it again, and taken anew with a smaller
        one if they overflow.
        """
        with evaluating(network):
            batches = self._batches(volume)
            with torch.no_grad():
                ratios = torch.stack([self._size(network, volume, part) for part in batches]).sum(0).tolist()
            slopes = [self.weight / len(ratios) * penalty(ratio, self.margin)[1] for ratio in ratios]
            return ratios, self._backward(network, volume, batches, slopes, loss_scale) if any(slopes) else []

    def _backward(self, network: nn.Module, volume: Volume, batches: list[list[Tile]], slopes: list[float],
                  loss_scale: float) -> Gradient:
        parameters = [p for p in network.parameters() if p.requires_grad]
        sums = [torch.zeros_like(p) for p in parameters]
        for part in batches:
            sizes = self._size(network, volume, part)
            goal = loss_scale * (torch.tensor(slopes, device=sizes.device) * sizes).sum()
            for total, gradient in zip(sums, torch.autograd.grad(goal, parameters, allow_unused=True)):
                if gradient is not None:
                    total += gradient
        if loss_scale > 1 and not torch.stack([total.isfinite().all() for total in sums]).all():
            return self._backward(network, volume, batches, slopes, max(1.0, loss_scale / 256))
        return [(p, total / loss_scale) for p, total in zip(parameters, sums)]

    def _size(self, network: nn.Module, volume: Volume, part: list[Tile]) -> Tensor:
        """Return p / p* of each organ in the tiles' own voxels, shape (organs,)."""
        device, patch = next(network.parameters()).device, self._patch3(volume)
        windows = torch.stack([tile.cut(volume.data, patch) for tile in part]).to(device)
        flat = windows[:, :, 0] if len(self.patch) == 2 else windows
        with torch.autocast(device.type, enabled=device.type == "cuda"):
            found = self.probabilities(full_resolution(network(flat)).float())[:, list(self.sizes_mm3)]
        own = [tile.own[-len(self.patch):] for tile in part]
        voxels = torch.stack([p[(slice(None), *o)].flatten(1).sum(1) for p, o in zip(found, own)]).sum(0)
        return voxels * volume.voxel_mm3 / torch.tensor(list(self.sizes_mm3.values()), device=device)

    def _patch3(self, volume: Volume) -> tuple[int, ...]:
        return (1,) * (volume.data.ndim - 1 - len(self.patch)) + tuple(self.patch)

    def _tiles(self, volume: Volume) -> list[Tile]:
        return tiles(volume.data.shape[1:], self._patch3(volume))

    def _batches(self, volume: Volume) -> list[list[Tile]]:
        # Half a training batch: this network is not compiled and so needs more memory for its activations.
        size, found = max(1, self.batch // 2), self._tiles(volume)
        return [found[i:i + size] for i in range(0, len(found), size)]


def penalty(ratio: float, margin: float) -> tuple[float, float]:
    """Return max(0, |e| - margin) and its slope in ratio = p / p*, the scale max(p, p*) held constant."""
    error = 1 - min(ratio, 1 / max(ratio, 1e-12))
    if error <= margin:
        return 0.0, 0.0
    return error - margin, -1.0 if ratio < 1 else 1 / ratio
