"""Files of Dafne and Dante: bundles and uploads (.npz) with image and masks, and masks alone (.npz, .npy, NIfTI).

Dafne stores arrays as on its screen (rows, columns, slices), but the masks of a 3D model, and whole bundles with one,
in other orders of axes; the file does not always say which. It is told from the shapes, and asked for where they do
not tell it. Formats: found with the Dafne client 2.1.0a0.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import nibabel
import numpy as np
import SimpleITK

from ...errors import DatasetError
from ..checks import shorten
from .found import INTEGERS, File, Found, Layout, Part, unique_names
from .labels import read_legend
from .volumes import read_volume, same_space

_PAIRS = ("RL", "AP", "SI")
_SETTINGS = ("orientation", "affine", "resolution", "comment", "model", "dice", "contrast_names")


def find_dafne(files: Sequence[File], *, mask_axes: str | None = None, orientation: str | None = None) -> Layout | None:
    """Return the cases in Dafne's .npz and .npy files; None if there are none.

    mask_axes: "screen" or "xyz", the order of the masks' axes where shapes do not tell it. orientation: where rows,
    columns and slices lead, such as PLS, for files without affine.
    """
    archives = {f: _keys(f.path) for f in files if f.path.suffix == ".npz"}
    bundles = [f for f, keys in archives.items() if "data" in keys]
    masks_only = [f for f, keys in archives.items() if "orientation" in keys and "data" not in keys]
    arrays = [f for f in files if f.path.suffix == ".npy"]
    cases = [_bundle(f, archives[f], mask_axes, orientation) for f in bundles]
    notes: list[str] = []
    images = [f for f in files if f.ending is not None]
    for f in masks_only:
        load = partial(_region_in_archive, f.path)
        regions = {k: partial(load, k) for k in archives[f] if k not in _SETTINGS}
        cases += _with_image(f, images, regions, mask_axes, notes)
    for f in (a for a in arrays if a.path.stem == "orientation"):
        regions = {a.path.stem: partial(_region_in_file, a.path, f.path) for a in arrays
                   if a.folders == f.folders and a is not f}
        cases += _with_image(f, images, regions, mask_axes, notes)
    if not cases and not notes:
        return None
    kinds = [f"{len(found)} {text}" for found, text in (
        (bundles, "files with image and masks"), (masks_only, "files of masks"),
        ([a for a in arrays if a.path.stem == "orientation"], "folders of masks")) if found]
    named = [c for c in cases if c.images]
    names = unique_names([c.name for c in named])
    return Layout(description=f"Dafne's or Dante's training files: {', '.join(kinds)}", notes=notes,
                  cases=[Found(n, n, c.images, c.masks) for n, c in zip(names, named)])


def _keys(path: Path) -> list[str]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            return list(archive.files)
    except Exception as error:  # whatever numpy and zipfile raise
        raise DatasetError(f"{path} cannot be read ({type(error).__name__}: {error}). Save it again, or take it out of "
                           "the folder.") from error


def _bundle(file: File, keys: Sequence[str], mask_axes: str | None, orientation: str | None) -> Found:
    data = sorted((k for k in keys if re.fullmatch(r"data\d*", k)), key=lambda k: int(k[4:] or 1))
    with np.load(file.path, allow_pickle=False) as archive:
        contrasts = archive["contrast_names"].tolist() if "contrast_names" in keys else []
    names = contrasts if len(contrasts) == len(data) else data if len(data) > 1 else [""]
    images = {str(n): Part((file.path,), f"{file.relative} ({k})", partial(_image_in_bundle, file.path, k, orientation))
              for n, k in zip(names, data)}
    masks = {k.removeprefix("mask").removeprefix("_"): Part(
        (file.path,), f"{file.relative} ({k})", partial(_mask_in_bundle, file.path, k, orientation, mask_axes))
        for k in sorted(keys) if k.startswith("mask")}
    return Found(file.path.stem, file.path.stem, images, masks)


def _image_in_bundle(path: Path, key: str, orientation: str | None) -> SimpleITK.Image:
    with np.load(path, allow_pickle=False) as archive:
        array = archive[key]
        return _placed(_on_screen(array) if "model" in archive.files else array, _affine(archive, path, orientation))


def _mask_in_bundle(path: Path, key: str, orientation: str | None, mask_axes: str | None) -> SimpleITK.Image:
    with np.load(path, allow_pickle=False) as archive:
        array, affine = archive[key], _affine(archive, path, orientation)
        if "model" in archive.files:
            return _placed(_on_screen(array), affine)
        codes = "".join(nibabel.aff2axcodes(affine))
        return _placed(screen_order(array, codes, archive["data"].shape, mask_axes, f"{path.name} ({key})"), affine)


def _on_screen(array: np.ndarray) -> np.ndarray:
    return array.transpose(1, 2, 0)  # a bundle with a model has slices first


def _affine(archive: Mapping[str, np.ndarray], path: Path, orientation: str | None) -> np.ndarray:
    """Return the affine (RAS+) of rows, columns and slices."""
    if "affine" in archive:
        affine = np.asarray(archive["affine"], float)
        if affine.shape == (4, 4) and np.isfinite(affine).all() and abs(np.linalg.det(affine[:3, :3])) > 1e-9:
            return affine
    if orientation is None:
        raise DatasetError(f"{path.name} has no affine, so nobody knows how the image lies. Give --orientation with "
                           "the directions in which rows, columns and slices grow, such as PLS")
    axes = nibabel.orientations.axcodes2ornt(tuple(orientation.upper()))
    affine = np.zeros((4, 4))
    sizes = np.asarray(archive["resolution"], float) if "resolution" in archive else np.ones(3)
    for column, (axis, flip) in enumerate(axes):
        affine[int(axis), column] = flip * sizes[column]
    affine[3, 3] = 1
    return affine


def _placed(array: np.ndarray, affine: np.ndarray) -> SimpleITK.Image:
    """Return an array (axes as in the affine, RAS+) as an image; a slight shear from rounding is taken out."""
    array = array[:, :, None] if array.ndim == 2 else array
    spacing = np.linalg.norm(affine[:3, :3], axis=0)
    left, _, right = np.linalg.svd(affine[:3, :3] / spacing)
    directions = left @ right
    if np.abs(directions - affine[:3, :3] / spacing).max() > 1e-3:
        raise DatasetError("its axes are not at right angles")
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(array.T))
    image.SetSpacing(spacing.tolist())
    image.SetDirection((np.diag([-1, -1, 1]) @ directions).ravel().tolist())
    image.SetOrigin((affine[:3, 3] * [-1, -1, 1]).tolist())
    return image


def screen_order(array: np.ndarray, codes: str, screen: Sequence[int], mask_axes: str | None, text: str) -> np.ndarray:
    """Return a mask of Dafne in the order of the screen: rows, columns, slices.

    array: in this order, or with the axes along x, y, z, each in the direction that it has on the screen.
    codes: where the axes of the screen lead, such as PLS. screen: the screen's shape. text: names the mask.

    Raises:
        DatasetError: neither order fits, or both do and `mask_axes` does not say which.
    """
    axes = [next(i for i, code in enumerate(codes) if code in pair) for pair in _PAIRS]
    readings = {"screen": array, "xyz": array.transpose(np.argsort(axes))}
    fitting = {name: a for name, a in readings.items() if a.shape == tuple(screen)}
    if mask_axes in fitting:
        return fitting[mask_axes]
    if not fitting:
        raise DatasetError(f"{text} has the shape {array.shape}, which is not that of its image, {tuple(screen)}")
    if len(fitting) == 2 and axes != [0, 1, 2]:
        raise DatasetError(f"{text}: Dafne stores masks in two orders of axes, and both fit this image. Export the "
                           "masks as NIfTI, one per region, or give --mask-axes: screen if they were drawn by hand or "
                           "by a 2D model, xyz if they come from a 3D model. Then look at the preview")
    return next(iter(fitting.values()))


def _region_in_archive(path: Path, key: str) -> tuple[np.ndarray, str]:
    with np.load(path, allow_pickle=False) as archive:
        return archive[key], "".join(archive["orientation"].tolist())


def _region_in_file(path: Path, orientation: Path) -> tuple[np.ndarray, str]:
    return np.load(path, allow_pickle=False), "".join(np.load(orientation, allow_pickle=False).tolist())


def _with_image(file: File, images: Sequence[File], regions: Mapping[str, partial], mask_axes: str | None,
                notes: list[str]) -> list[Found]:
    """Return the case of masks without image: its image has the same name, or is the only one in the folder."""
    same = [i for i in images if i.stem == file.path.stem] or [i for i in images if i.folders == file.folders] or [
        i for i in images if i.folders == file.folders[:-1]]
    if len(same) != 1:
        notes.append(f"{file.relative} holds masks without an image, and {len(same) or 'no'} images belong to it by "
                     f"name or folder{': ' + shorten([i.relative for i in same]) if same else ''}")
        return []
    name = file.path.stem if same[0].stem == file.path.stem else "_".join((*same[0].folders, same[0].stem))
    masks = {n: Part((file.path, same[0].path), f"{file.relative} ({n})",
                     partial(_on_image, same[0].path, load, mask_axes, f"{file.relative} ({n})"))
             for n, load in sorted(regions.items())}
    return [Found(name, name, {"": Part.of(same[0].path, same[0].relative)}, masks)]


def _on_image(image: Path, load: partial, mask_axes: str | None, text: str) -> SimpleITK.Image:
    """Return a region as a mask: it has no place of its own, so it gets that of the image as the screen showed it."""
    array, codes = load()
    return _as_shown(array, codes, read_volume(image), mask_axes, text)


def _as_shown(array: np.ndarray, codes: str, image: SimpleITK.Image, mask_axes: str | None,
              text: str) -> SimpleITK.Image:
    shown = SimpleITK.DICOMOrient(image, codes)
    return same_space(shown, np.ascontiguousarray(screen_order(array, codes, shown.GetSize(), mask_axes, text).T))


def with_legends(cases: Sequence[Found], mask_axes: str | None) -> list[Found]:
    """Return the cases with the labels of masks that have a legend beside them (X.nii.gz.csv), as Dafne exports them.

    If a 3D model drew the mask, its header is wrong; the image's size tells it. So such a mask is always written anew.
    """
    result = []
    for case in cases:
        mask = next(iter(case.masks.values()), None)
        legend = mask.whole.with_name(f"{mask.whole.name}.csv") if mask is not None and mask.whole is not None else None
        if len(case.masks) != 1 or mask is None or legend is None or not legend.is_file():
            result.append(case)
            continue
        image = next(iter(case.images.values()))
        part = Part((*mask.files, legend), mask.text, partial(_compact, mask, image, mask_axes))
        result.append(Found(case.name, case.patient, case.images, {INTEGERS: part}, read_legend(legend)))
    return result


def _compact(mask: Part, image: Part, mask_axes: str | None) -> SimpleITK.Image:
    stored = mask.load()
    codes = SimpleITK.DICOMOrientImageFilter().GetOrientationFromDirectionCosines(stored.GetDirection())
    return _as_shown(SimpleITK.GetArrayFromImage(stored).T, codes, image.load(), mask_axes, mask.text)
