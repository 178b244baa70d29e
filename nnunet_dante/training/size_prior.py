"""The size prior: the expected size of each organ trains on images without masks (FSEFT's transductive inference)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.utilities.plans_handling.plans_handler import ConfigurationManager, PlansManager
from torch import Tensor, nn

from ..datasets.images import image_files, reading
from ..errors import ConfigurationError
from ..models.labels import channel_names
from ..peft.modes import evaluating, full_resolution
from ..types import DatasetJson

Gradient = list[tuple[nn.Parameter, Tensor]]


@dataclass(frozen=True, kw_only=True)
class Volume:
    """A preprocessed image without a mask. data: shape (channels, *space) with three axes of space, also in 2d."""

    name: str
    data: Tensor
    voxel_mm3: float


@dataclass(frozen=True, kw_only=True)
class SizePrior:
    """The penalty weight * mean over organs of max(0, |e| - margin), e = (p* - p) / max(p, p*) (arXiv 2303.17051).

    p is the predicted size of an organ in a whole volume (the sum of its probabilities, in mm^3), p* the expected size.
    As in FSEFT's code, max(p, p*) is a constant without a gradient. With its gradient, the pull on an organ that is
    predicted r times too large would fall as 1 / r. (If p is too large, that code adds the margin to the loss that it
    prints. The gradient is the same.)

    Args:
        volumes: the images without masks.
        sizes_mm3: {output of the network: p*}; outputs that are not in it do not count.
        weight, margin: as in the formula.
        patch: patch size of the network, with 2 or 3 axes.
        batch: batch size of the training.
        probabilities: function from logits (batch, outputs, *patch) to probabilities.
    """

    volumes: Sequence[Volume]
    sizes_mm3: Mapping[int, float]
    weight: float
    margin: float
    patch: Sequence[int]
    batch: int
    probabilities: Callable[[Tensor], Tensor]

    def steps(self, volume: Volume) -> int:
        """Return the number of training batches in a volume; the next volume is measured after so many steps."""
        return math.ceil(len(self._tiles(volume)) / self.batch)

    def choose(self, epoch: int, visit: int) -> Volume:
        """Return the volume for a visit: one after the other, in an order that depends only on the epoch."""
        order = np.random.default_rng(epoch).permutation(len(self.volumes))
        return self.volumes[order[visit % len(order)]]

    def measure(self, network: nn.Module, volume: Volume, *, loss_scale: float = 1.0) -> tuple[list[float], Gradient]:
        """Return p / p* of each organ, and the gradient of the penalty for each parameter that requires one.

        The first pass measures the sizes without gradients. If all are within the margin, the gradient is empty. The
        slope of the penalty is one number per organ, so the second pass needs only one batch of tiles in memory.

        loss_scale: factor that keeps gradients in the range of half precision. Gradients are divided by it at the end,
            and computed again with a smaller one if they overflow.
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
        # Half a training batch, because this network is not compiled and needs more memory for its activations.
        size, found = max(1, self.batch // 2), self._tiles(volume)
        return [found[i:i + size] for i in range(0, len(found), size)]


def penalty(ratio: float, margin: float) -> tuple[float, float]:
    """Return max(0, |e| - margin) and its derivative by ratio = p / p*, with max(p, p*) as a constant."""
    error = 1 - min(ratio, 1 / max(ratio, 1e-12))
    if error <= margin:
        return 0.0, 0.0
    return error - margin, -1.0 if ratio < 1 else 1 / ratio


@dataclass(frozen=True)
class Tile:
    """A window of patch size, and the part of it that counts.

    start: first voxel of the window in the volume; negative if the patch is larger than the volume.
    own: slices of the part that counts, in the window. These parts of all tiles cover the volume without overlap.
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
    """Return the smallest number of windows that cover a volume of `shape`.

    The last window of an axis is moved inwards, and only voxels that no window before it contains count in it. A volume
    that is smaller than the patch is in the middle of it, as in nnU-Net's prediction.
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


def unlabelled_volumes(folder: Path, *, plans: PlansManager, configuration: ConfigurationManager,
                       dataset_json: DatasetJson) -> list[Volume]:
    """Return the images of `folder` (CASE_0000 and so on), preprocessed by nnU-Net, as float32.

    Raises:
        ConfigurationError: there are no images, or one has another number of channels than the data set.
        TransferError: an image cannot be read.
    """
    ending = dataset_json["file_ending"]
    cases = image_files(folder, ending)
    if not cases:
        raise ConfigurationError(f"size_prior needs images without masks, but {folder} holds no CASE_0000{ending}; put "
                                 f"them there, name another folder with size_images, or set size_prior to 0.")
    return [_volume(name, list(map(str, files)), plans, configuration, dataset_json) for name, files in cases.items()]


def _volume(name: str, files: list[str], plans: PlansManager, configuration: ConfigurationManager,
            dataset_json: DatasetJson) -> Volume:
    expected = len(channel_names(dataset_json))
    preprocessor = configuration.preprocessor_class(verbose=False)
    with reading(Path(files[0]).parent, f"image {name}"):
        data, _, properties = preprocessor.run_case(files, None, plans, configuration, dataset_json)
    if len(data) != expected:
        raise ConfigurationError(f"size_prior: image {name} in {Path(files[0]).parent} has {len(data)} channels, the "
                                 f"data set {expected}; give every image all channels (_0000, _0001, ...).")
    return Volume(name=name, data=torch.from_numpy(np.ascontiguousarray(data, dtype=np.float32)),
                  voxel_mm3=voxel_mm3(properties, plans, configuration))


def voxel_mm3(properties: dict[str, Any], plans: PlansManager, configuration: ConfigurationManager) -> float:
    """Return the volume of a preprocessed voxel in mm^3; in 2d, each image keeps its own distance of slices."""
    spacing = [float(s) for s in configuration.spacing]
    own = [float(properties["spacing"][axis]) for axis in plans.transpose_forward]
    return float(np.prod([*own[:len(own) - len(spacing)], *spacing]))


def organ_sizes_mm3(dataset: Any, labels: Iterable[int | tuple[int, ...]], *, plans: PlansManager,
                    configuration: ConfigurationManager) -> np.ndarray:
    """Return the size of each label or region in each preprocessed training mask, shape (cases, labels).

    dataset: nnU-Net's, with `identifiers` and `load_case`.
    """
    wanted = [np.atleast_1d(label) for label in labels]
    sizes = []
    for case in dataset.identifiers:
        _, mask, _, properties = dataset.load_case(case)
        values, counts = np.unique(mask[:], return_counts=True)
        voxel = voxel_mm3(properties, plans, configuration)
        sizes.append([voxel * counts[np.isin(values, label)].sum() for label in wanted])
    return np.array(sizes, float)
