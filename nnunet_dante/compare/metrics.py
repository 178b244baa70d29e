"""Dice, 95 % Hausdorff distance and surface Dice of one segmentation, by label name.

All three follow one rule for empty masks. If both masks are empty, the score is nan ("not defined") and does not count
in means. If only one is empty, Dice and surface Dice are 0 and the distance is infinite; tables call this "missed".
Means of distances are over the finite ones, and tables show the share of missed structures beside them.

The surface metrics are those of MONAI. Dice is computed here, because MONAI's Dice is nan wherever the truth is empty,
even if something was predicted.
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



def dice(truth: np.ndarray, prediction: np.ndarray) -> float:
    """Return 2 |T and P| / (|T| + |P|) of two boolean masks of the same shape.

    Raises:
        ConfigurationError: the shapes differ.
    """
    _check(truth, prediction)
    total = int(truth.sum()) + int(prediction.sum())
    return 2 * int((truth & prediction).sum()) / total if total else float("nan")


def hd95_mm(truth: np.ndarray, prediction: np.ndarray, *, spacing_mm: Sequence[float]) -> float:
    """Return the 95 % Hausdorff distance of two boolean masks, in mm.

    A directed distance is the 95th percentile of the distances from the surface voxels of one mask to the nearest
    surface voxel of the other. The result is the larger of the two directed distances (Metrics Reloaded, Maier-Hein
    2024).

    spacing_mm: voxel size along each array axis.

    Raises:
        ConfigurationError: the shapes differ, or the number of spacings is not the number of axes.
    """
    _check(truth, prediction, spacing_mm)
    if not (truth.any() and prediction.any()):
        return float("nan") if truth.any() == prediction.any() else float("inf")
    return _quietly(_monai_metrics().compute_hausdorff_distance, truth, prediction, spacing_mm, percentile=95)


def surface_dice(truth: np.ndarray, prediction: np.ndarray, *, spacing_mm: Sequence[float],
                 tolerance_mm: float) -> float:
    """Return the share of both surfaces, by area, that lies within `tolerance_mm` of the other surface (Nikolov 2021).

    spacing_mm: voxel size along each array axis.

    Raises:
        ConfigurationError: as for `hd95_mm`, or the tolerance is negative or not finite.
    """
    _check(truth, prediction, spacing_mm)
    if not 0 <= tolerance_mm < float("inf"):
        raise ConfigurationError(f"tolerance_mm is {tolerance_mm}; give the distance in mm up to which two surfaces "
                                 f"agree, such as 2.")
    if not (truth.any() and prediction.any()):
        return float("nan") if truth.any() == prediction.any() else 0.0
    return _quietly(_monai_metrics().compute_surface_dice, truth, prediction, spacing_mm,
                    class_thresholds=[float(tolerance_mm)], use_subvoxels=True)


def score(truth: np.ndarray, prediction: np.ndarray, *, labels: LabelValues, spacing_mm: Sequence[float],
          tolerance_mm: float = 2.0, predicted_labels: LabelValues | None = None) -> dict[str, dict[str, float]]:
    """Return {label name: {"dice", "hd95_mm", "surface_dice"}} of two integer masks, without the background.

    labels: "labels" of dataset.json; several integers under one name are a region. Voxels that the truth marks "ignore"
        do not count.
    spacing_mm: voxel size along each array axis.
    tolerance_mm: tolerance of the surface Dice.
    predicted_labels: labels of the prediction, where its numbers are not those of the truth. Labels that only one of
        the two has are left out.
    """
    if "ignore" in labels:
        prediction = np.where(_where(truth, labels["ignore"]), 0, prediction)
    result = {}
    for name, values in labels.items():
        own_values = (labels if predicted_labels is None else predicted_labels).get(name)
        if name in ("background", "ignore") or own_values is None:
            continue
        true, predicted = _where(truth, values), _where(prediction, own_values)
        result[name] = {
            "dice": dice(true, predicted), "hd95_mm": hd95_mm(true, predicted, spacing_mm=spacing_mm),
            "surface_dice": surface_dice(true, predicted, spacing_mm=spacing_mm, tolerance_mm=tolerance_mm)}
    return result


def _where(mask: np.ndarray, values: int | Sequence[int]) -> np.ndarray:
    return np.isin(mask, np.asarray(values, dtype=int))  # nnU-Net also takes "1"


def _monai_metrics() -> ModuleType:
    """Import MONAI's metrics without transformers, which MONAI would import where it is installed.

    Some versions of transformers (seen: 5.12 to 5.20) put modules into sys.modules that import more modules as soon as
    somebody reads their attributes. nnU-Net does that while it searches for a trainer, and would stop with "dictionary
    changed size during iteration".
    """
    hide = "transformers" not in sys.modules
    if hide:
        sys.modules["transformers"] = None  # type: ignore[assignment]  # importing it fails, as if it were not installed
    try:
        return import_module("monai.metrics")
    finally:
        if hide:
            del sys.modules["transformers"]


def _quietly(metric: Any, truth: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float],
             **options: Any) -> float:
    """Run one of MONAI's metrics on the smallest box around both masks."""
    import torch

    box = ndimage.find_objects((truth | prediction).astype(np.uint8))[0]
    # A volume of one slice is treated as a 2D image. As a 3D slab, each of its voxels would be on the surface.
    flat = truth.shape.index(1) if truth.ndim == 3 and 1 in truth.shape else None
    parts = [mask[box] if flat is None else mask[box].squeeze(flat) for mask in (prediction, truth)]
    pair = [torch.from_numpy(np.ascontiguousarray(part))[None, None].float() for part in parts]
    spacing = [float(mm) for axis, mm in enumerate(spacing_mm) if axis != flat]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # MONAI warns of its own deprecated arguments
        return float(metric(*pair, include_background=True, spacing=spacing, **options).item())


def _check(truth: np.ndarray, prediction: np.ndarray, spacing_mm: Sequence[float] | None = None) -> None:
    if truth.shape != prediction.shape:
        raise ConfigurationError(f"truth has shape {truth.shape}, prediction {prediction.shape}; both must lie on one "
                                 f"voxel grid: resample the prediction to the truth first.")
    if spacing_mm is not None and len(spacing_mm) != truth.ndim:
        raise ConfigurationError(f"spacing_mm has {len(spacing_mm)} numbers ({spacing_mm}), the masks have "
                                 f"{truth.ndim} axes; give the voxel size along each axis, in mm.")
