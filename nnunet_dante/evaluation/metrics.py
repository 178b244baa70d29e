"""Dice and the 95 % Hausdorff distance of one segmentation, by label name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from scipy import ndimage

from ..errors import ConfigurationError

LabelValues = Mapping[str, int | Sequence[int]]
"""Label or region name -> integer(s) in the mask, as in nnU-Net's dataset.json."""


def dice(truth: np.ndarray, prediction: np.ndarray) -> float:
    """Return 2 |T and P| / (|T| + |P|) of two boolean masks of one shape.

    Both empty: nan, "not defined", as in nnU-Net's own evaluation; leave it out of means (`numpy.nanmean`). One
    empty: 0.

    Raises:
        ConfigurationError: the shapes differ.
    """
    _same_shape(truth, prediction)
    total = int(truth.sum()) + int(prediction.sum())
    return 2 * int((truth & prediction).sum()) / total if total else float("nan")


def hd95_mm(truth: np.ndarray, prediction: np.ndarray, *, spacing_mm: Sequence[float]) -> float:
    """Return the 95 % Hausdorff distance of two boolean masks, in mm.

    The larger one of the two directed distances: the 95th percentile of the distances from the surface voxels of one
    mask to the nearest surface voxel of the other (Metrics Reloaded, Maier-Hein 2024). Both empty: nan. One empty: inf.

    spacing_mm: voxel size along each array axis.

    Raises:
        ConfigurationError: the shapes differ, or there is not one spacing per axis.
    """
    _same_shape(truth, prediction)
    if len(spacing_mm) != truth.ndim:
        raise ConfigurationError(f"spacing_mm has {len(spacing_mm)} numbers ({spacing_mm}), the masks have "
                                 f"{truth.ndim} axes; give the voxel size along each axis, in mm.")
    if not truth.any() or not prediction.any():
        return float("nan") if truth.any() == prediction.any() else float("inf")
    box = ndimage.find_objects((truth | prediction).astype(np.uint8))[0]
    surfaces = [_surface(mask[box]) for mask in (truth, prediction)]
    to_surface = [ndimage.distance_transform_edt(~surface, sampling=spacing_mm) for surface in surfaces]
    return float(max(np.percentile(to_surface[1][surfaces[0]], 95), np.percentile(to_surface[0][surfaces[1]], 95)))


def score(truth: np.ndarray, prediction: np.ndarray, *, labels: LabelValues,
          spacing_mm: Sequence[float]) -> dict[str, dict[str, float]]:
    """Return {label name: {"dice": ..., "hd95_mm": ...}} of two integer masks, without the background.

    labels: dataset.json's; several integers under one name are a region.
    """
    result = {}
    for name, values in labels.items():
        if name in ("background", "ignore"):
            continue
        true, predicted = np.isin(truth, values), np.isin(prediction, values)
        result[name] = {"dice": dice(true, predicted), "hd95_mm": hd95_mm(true, predicted, spacing_mm=spacing_mm)}
    return result


def _surface(mask: np.ndarray) -> np.ndarray:
    """Return the voxels of `mask` with a face on something else; beyond the array there is something else."""
    return mask & ~ndimage.binary_erosion(mask)


def _same_shape(truth: np.ndarray, prediction: np.ndarray) -> None:
    if truth.shape != prediction.shape:
        raise ConfigurationError(f"truth has shape {truth.shape}, prediction {prediction.shape}; both must lie on one "
                                 f"voxel grid: resample the prediction to the truth first.")
