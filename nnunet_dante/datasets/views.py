"""How a volume is looked at: the plane that shows it best, its slices upright, and the colours of its labels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import SimpleITK

# Okabe and Ito's colours, which most people with a colour vision deficiency can tell apart. Black and grey are left
# out, because images have them. Neighbours in this order also differ in lightness.
COLOURS = ("#E69F00", "#0072B2", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
_THICK = 1.5  # if voxels are so many times longer along one axis, the image is a stack of slices along it
# Axes of a sagittal, coronal and axial view, as the directions to the right, down, and from slice to slice.
_PLANES = ("PIL", "LIP", "LPS")


def viewing_plane(mask: Path | SimpleITK.Image) -> str:
    """Return the axes in which a mask is shown, one of `_PLANES`.

    Thick slices are shown as they were taken. If voxels are almost cubes, the view is the one that shows most of the
    labels: it looks along the direction in which they are shortest.
    """
    voxels, size_mm = upright(mask, "LPS")
    labelled = np.argwhere(voxels > 0)
    if voxels.shape[2] > 1 and max(size_mm) >= _THICK * min(size_mm):
        return _PLANES[int(np.argmax(size_mm))]  # thick from left to right: sagittal slices
    if voxels.shape[2] > 1 and len(labelled):
        return _PLANES[int(np.argmin(np.ptp(labelled, axis=0) * size_mm))]
    return "LPS"


def upright(volume: Path | SimpleITK.Image, plane: str) -> tuple[np.ndarray, list[float]]:
    """Return a volume, or the file of one, with its axes in the directions `plane`, and its voxel size in mm."""
    image = SimpleITK.ReadImage(str(volume)) if isinstance(volume, Path) else volume
    if image.GetNumberOfComponentsPerPixel() > 1:  # a colour image
        image = SimpleITK.VectorIndexSelectionCast(image, 0)
    if image.GetDimension() == 3:
        image = SimpleITK.DICOMOrient(image, plane)
    voxels = SimpleITK.GetArrayFromImage(image).T
    spacing_mm = [*image.GetSpacing(), 1.0][:3]
    return (voxels if voxels.ndim == 3 else voxels[:, :, None]), spacing_mm
