"""The masks of a case as one label map on the grid of its image, with everything that is wrong with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import SimpleITK

from ..checks import same_place
from ..orientation import Header
from .found import INTEGERS, Found, Part
from .labels import Labels
from .volumes import same_space

_COUNTED = 1 << 16  # labels are smaller


@dataclass
class LabelMap:
    """The label map of one case.

    voxels: axes as in SimpleITK's arrays, None if there is none. changed: whether it differs from the file that holds
    it, so that a link to the file would be wrong.
    """

    voxels: np.ndarray | None = None
    changed: bool = False
    faults: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def counts_of(voxels: np.ndarray) -> dict[float, int]:
    """Return how many voxels hold each value, from the smallest value to the largest."""
    if voxels.dtype.kind in "ui" and voxels.size and voxels.min() >= 0 and voxels.max() < _COUNTED:
        counts = np.bincount(voxels.ravel(order="K"))  # many times faster than sorting all voxels
        return {int(value): int(counts[value]) for value in np.flatnonzero(counts)}
    return dict(zip(*(a.tolist() for a in np.unique(voxels, return_counts=True))))


def read_label_map(case: Found, labels: Labels, image: SimpleITK.Image, *, resample: bool,
                   known_values: bool = False) -> LabelMap:
    """Read the masks of a case.

    image: the first channel. resample: bring masks on another grid of the same space to that of the image.
    known_values: leave the values as they are, as in an nnU-Net data set that is there already.

    Raises:
        Exception: whatever reading a damaged file raises.
    """
    found = LabelMap()
    total: np.ndarray | None = None
    overlaps: dict[str, int] = {}
    for label, part in case.masks.items():
        if label != INTEGERS and label not in labels.numbers:
            continue  # the user named others
        voxels = _on_grid(part, image, resample, found)
        if voxels is None:
            continue
        if label == INTEGERS:
            total = voxels if known_values else _renumbered(voxels, labels.of(case), part, found)
            continue
        if len(counts_of(voxels).keys() - {0}) > 1:
            found.faults.append(f"{part.text} holds several values ({_some(voxels)}), but its name stands for one "
                                "label. If it holds several, name them with --labels NAME=VALUE")
            continue
        total = np.zeros(voxels.shape, np.uint8) if total is None else total
        if n := int(np.count_nonzero(total[voxels != 0])):
            overlaps[label] = n
        total[voxels != 0] = labels.numbers[label]
        found.changed = True
    if overlaps:
        found.warnings.append("labels overlap: " + ", ".join(
            f"{label} takes {n} voxels of others" for label, n in overlaps.items()) +
            ". The order in --labels decides: later ones lie on top")
    if missing := [n for n in labels.numbers if INTEGERS not in case.masks and n not in case.masks]:
        found.warnings.append(f"no mask for {', '.join(missing)}: nnU-Net learns that there is none in this case. If "
                              "it was only not drawn, leave the case out")
    found.voxels = total
    return found


def _on_grid(part: Part, image: SimpleITK.Image, resample: bool, found: LabelMap) -> np.ndarray | None:
    """Return a mask's whole numbers on the image's grid; None after a fault."""
    mask = part.load()
    if mask.GetNumberOfComponentsPerPixel() > 1:
        colours = SimpleITK.GetArrayViewFromImage(mask)
        if not (colours == colours[..., :1]).all():
            found.faults.append(f"{part.text} is a colour image; a mask needs one whole number per pixel")
            return None
        mask, found.changed = SimpleITK.VectorIndexSelectionCast(mask, 0), True
    voxels = SimpleITK.GetArrayFromImage(mask)
    if voxels.dtype.kind == "f" and not (voxels == np.rint(voxels)).all():
        found.faults.append(f"{part.text} holds values that are no whole numbers ({_some(voxels)}). Probabilities need "
                            "a threshold first; a mask that was resampled must be made again with nearest neighbours")
        return None
    return _moved(part, mask, image, voxels, resample, found)


def _moved(part: Part, mask: SimpleITK.Image, image: SimpleITK.Image, voxels: np.ndarray, resample: bool,
           found: LabelMap) -> np.ndarray | None:
    mine, wanted = Header.of(mask), Header.of(image)
    if mine.size == wanted.size and same_place(mine, wanted):
        return voxels
    if len(mine.size) == len(wanted.size) == 3 and wanted.codes:
        turned = SimpleITK.DICOMOrient(mask, wanted.codes)
        if turned.GetSize() == wanted.size and same_place(Header.of(turned), wanted):
            found.changed = True  # the same voxels in the same place, stored in another order
            return SimpleITK.GetArrayFromImage(turned)
    sizes = f"{_times(mine.size)} voxels, the image has {_times(wanted.size)}"
    if len(mine.size) != len(wanted.size) or not _boxes_meet(mask, image):
        found.faults.append(f"{part.text} does not overlap its image in space ({sizes}). Is it the mask of another "
                            "image, or was its header lost? Where only the header is wrong, SimpleITK's "
                            "mask.CopyInformation(image) puts it right")
        return None
    on_voxels = _on_voxels_of(mask, image)
    if not (resample or on_voxels):
        found.faults.append(f"{part.text} lies on another grid than its image ({sizes}). --resample-masks brings it to "
                            "the image's grid with nearest neighbours")
        return None
    moved = SimpleITK.Resample(mask, image, SimpleITK.Transform(), SimpleITK.sitkNearestNeighbor)
    result = SimpleITK.GetArrayFromImage(moved)
    if voxels.any() and not result.any():
        found.faults.append(f"{part.text}: all it marks lies outside the image. Is it the mask of another image?")
        return None
    found.changed = True
    if not on_voxels:
        found.warnings.append(f"{part.text} was brought to the image's grid ({sizes})")
    return result


def _on_voxels_of(mask: SimpleITK.Image, image: SimpleITK.Image) -> bool:
    """Whether the mask's voxels are voxels of the image: it covers a part of the image, and nothing is interpolated."""
    same_axes = np.allclose(mask.GetSpacing(), image.GetSpacing(), rtol=1e-3) and np.allclose(
        mask.GetDirection(), image.GetDirection(), atol=1e-3)
    corner = np.array(image.TransformPhysicalPointToContinuousIndex(mask.GetOrigin()))
    return bool(same_axes and np.abs(corner - np.rint(corner)).max() < 0.01)


def _boxes_meet(one: SimpleITK.Image, other: SimpleITK.Image) -> bool:
    (low, high), (low2, high2) = map(_box, (one, other))
    return bool((np.maximum(low, low2) < np.minimum(high, high2)).all())


def _box(volume: SimpleITK.Image) -> tuple[np.ndarray, np.ndarray]:
    ends = [(-0.5, n - 0.5) for n in volume.GetSize()]
    corners = np.array([volume.TransformContinuousIndexToPhysicalPoint(c)
                        for c in np.stack(np.meshgrid(*ends), -1).reshape(-1, len(ends)).tolist()])
    return corners.min(0), corners.max(0)


def _renumbered(voxels: np.ndarray, mapping: Mapping[int, int], part: Part, found: LabelMap) -> np.ndarray | None:
    values = [int(v) for v in counts_of(voxels)]
    if unknown := [v for v in values if v and v not in mapping]:
        found.faults.append(f"{part.text} holds {_shown(unknown)}, which no label names. Add NAME={unknown[0]} to "
                            f"--labels, or background={unknown[0]} if it means nothing")
        return None
    if all(mapping.get(v, 0) == v for v in values):
        return voxels
    found.changed = True
    result = np.zeros(voxels.shape, np.uint8 if max(mapping.values()) < 256 else np.uint16)
    for value in values:
        if value:
            result[voxels == value] = mapping[value]
    return result


def as_mask(found: LabelMap, image: SimpleITK.Image) -> SimpleITK.Image:
    """Return the label map as an image to be written, in the smallest type that holds it."""
    assert found.voxels is not None
    kind = np.uint8 if found.voxels.max(initial=0) < 256 else np.uint16
    return same_space(image, np.ascontiguousarray(found.voxels.astype(kind)))


def _some(voxels: np.ndarray) -> str:
    return _shown([float(v) for v in counts_of(voxels) if v])


def _shown(values: list[float] | list[int]) -> str:
    return ", ".join(f"{v:g}" for v in values[:3]) + (", ..." if len(values) > 3 else "")


def _times(size: tuple[int, ...]) -> str:
    return " x ".join(map(str, size))
