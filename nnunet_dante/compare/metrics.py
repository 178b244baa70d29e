"""Dice, 95 % Hausdorff distance and surface Dice of one segmentation, by label name.

Empty masks, one rule for all three: both empty is nan, "not defined", and is left out of means; one empty is Dice 0,
surface Dice 0 and an infinite distance, which tables show as "missed". Means of distances are over the finite ones and
stand beside the number missed.

Surface metrics are MONAI's; Dice is not, because MONAI's is nan wherever the truth is empty, whatever was predicted.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from types import ModuleType
from typing import Any

import numpy as np
from scipy import ndimage

from ..errors import ConfigurationError

LabelValues = Mapping[str, int | Sequence[int]]
"""Label or region name -> integer(s) in the mask, as in nnU-Net's dataset.json."""

METRICS = ("dice", "hd95_mm", "surface_dice")


def dice(truth: np.ndarray, prediction: np.ndarray) -> float:
    """Return 2 |T and P| / (|T| + |P|) of two boolean masks of one shape.

    Raises:
        ConfigurationError: the shapes differ.
    """
    _same_shape(truth, prediction)
    total = int(truth.sum()) + int(prediction.sum())
    return 2 * int((truth & prediction).sum()) / total if total else float("nan")


def hd95_mm(truth: np.ndarray, prediction: np.ndarray, *, spacing_mm: Sequence[float]) -> float:
    """Return the 95 % Hausdorff distance of two boolean masks, in mm.

    The larger one of the two directed distances: the 95th percentile of the distances from the surface voxels of one
    mask to the nearest surface voxel of the other (Metrics Reloaded, Maier-Hein 2024).

    spacing_mm: voxel size along each array axis.

    Raises:
        ConfigurationError: the shapes differ, or there is not one spacing per axis.
    """
    _check(truth, prediction, spacing_mm)
    if not (truth.any() and prediction.any()):
        return float("nan") if truth.any() == prediction.any() else float("inf")
    return _quietly(_monai_metrics().compute_hausdorff_distance, truth, prediction, spacing_mm, percentile=95)


def surface_dice(truth: np.ndarray, prediction: np.ndarray, *, spacing_mm: Sequence[float],
                 tolerance_mm: float) -> float:
    """Return the share of both surfaces, by area, that lies within `tolerance_mm` of the other (Nikolov 2021).

    Raises:
        ConfigurationError: as `hd95_mm`, or the tolerance is negative or not finite.
    """
    _check(truth, prediction, spacing_mm)
    if not 0 <= tolerance_mm < float("inf"):
        raise ConfigurationError(f"tolerance_mm is {tolerance_mm}; give the distance in mm that still counts as "
                                 f"agreement, such as 2.")
    if not (truth.any() and prediction.any()):
        return float("nan") if truth.any() == prediction.any() else 0.0
    return _quietly(_monai_metrics().compute_surface_dice, truth, prediction, spacing_mm,
                    class_thresholds=[float(tolerance_mm)], use_subvoxels=True)


def score(truth: np.ndarray, prediction: np.ndarray, *, labels: LabelValues, spacing_mm: Sequence[float],
          tolerance_mm: float = 2.0) -> dict[str, dict[str, float]]:
    """Return {label name: {"dice", "hd95_mm", "surface_dice"}} of two integer masks, without the background.

    labels: dataset.json's; several integers under one name are a region, and voxels that the truth marks "ignore" do
    not count. tolerance_mm: of the surface Dice.
    """
    if "ignore" in labels:
        prediction = np.where(np.isin(truth, np.asarray(labels["ignore"], dtype=int)), 0, prediction)
    result = {}
    for name, values in labels.items():
        if name in ("background", "ignore"):
            continue
        numbers = np.asarray(values, dtype=int)  # nnU-Net also takes "1"
        true, predicted = np.isin(truth, numbers), np.isin(prediction, numbers)
        result[name] = {
            "dice": dice(true, predicted), "hd95_mm": hd95_mm(true, predicted, spacing_mm=spacing_mm),
            "surface_dice": surface_dice(true, predicted, spacing_mm=spacing_mm, tolerance_mm=tolerance_mm)}
    return result


def _monai_metrics() -> ModuleType:
    """Import MONAI's metrics, and not transformers, which MONAI takes along where it is installed.

    Some versions of transformers (5.12 to 5.20 were seen) put modules into sys.modules that import others when they are
    looked at. nnU-Net looks at all when it searches for a trainer: "dictionary changed size during iteration".
    """
    hide = "transformers" not in sys.modules
    if hide:
        sys.modules["transformers"] = None  # type: ignore[assignment]  # an import of it fails, as if not installed
    try:
        return import_module("monai.metrics")
    finally:
        if hide:
            del sys.modules["transformers"]


def _quietly(metric: Any, truth: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float],
             **options: Any) -> float:
    """Run one of MONAI's metrics on the part of the masks that holds something."""
    import torch

    box = ndimage.find_objects((truth | prediction).astype(np.uint8))[0]
    # A single slice is a 2D image, not a slab with a top and a bottom, whose every voxel would be surface.
    flat = [axis for axis, size in enumerate(truth.shape) if size == 1] if truth.ndim == 3 else []
    axes = flat[:1]
    pair = [torch.from_numpy(np.ascontiguousarray(np.squeeze(mask[box], tuple(axes))))[None, None].float()
            for mask in (prediction, truth)]
    spacing = [float(mm) for axis, mm in enumerate(spacing_mm) if axis not in axes]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI warns of its own deprecated arguments
        return float(metric(*pair, include_background=True, spacing=spacing, **options).item())


def _check(truth: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float]) -> None:
    _same_shape(truth, prediction)
    if len(spacing_mm) != truth.ndim:
        raise ConfigurationError(f"spacing_mm has {len(spacing_mm)} numbers ({spacing_mm}), the masks have "
                                 f"{truth.ndim} axes; give the voxel size along each axis, in mm.")


def _same_shape(truth: np.ndarray, prediction: np.ndarray) -> None:
    if truth.shape != prediction.shape:
        raise ConfigurationError(f"truth has shape {truth.shape}, prediction {prediction.shape}; both must lie on one "
                                 f"voxel grid: resample the prediction to the truth first.")
