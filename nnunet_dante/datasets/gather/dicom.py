"""DICOM: image series, and masks drawn on them as DICOM SEG or RTSTRUCT, or stored as NIfTI beside them.

pydicom reads headers, SimpleITK (GDCM) the voxels of series, which it does for every compression, and highdicom
multi-frame images and segmentations. How slices lie is worked out here from the headers: GDCM itself reads a series
with gaps, duplicates or a tilted gantry as if its slices were regular.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK
from skimage.draw import polygon2mask

from ...errors import DatasetError
from ..checks import shorten
from .found import File, Found, Layout, Part, unique_names
from .pairs import find_pairs
from .volumes import same_space

_SUFFIXES = ("", ".dcm", ".dicom", ".ima")
_MASKS = ("SEG", "RTSTRUCT")
_GAP = 0.01  # of the distance of slices, and in mm at least; scanners round positions
_OFF_SLICE = 0.3  # of the distance of slices: contours so far from one were drawn on other slices
_TAGS = ["SeriesInstanceUID", "FrameOfReferenceUID", "PatientID", "Modality", "Rows", "Columns", "PixelSpacing",
         "ImagePositionPatient", "ImageOrientationPatient", "NumberOfFrames", "SliceThickness", "SegmentSequence",
         "ReferencedSeriesSequence", "ReferencedFrameOfReferenceSequence", "StructureSetROISequence"]


def find_dicom(files: Sequence[File], *, masks: Sequence[str] = (), labels: Sequence[str] = ()) -> Layout | None:
    """Return the cases of the DICOM series among the files; None if there are no DICOM files.

    Raises:
        DatasetError: pydicom or highdicom is not installed, or a header cannot be read.
    """
    found = [f for f in files if f.ending is None and _is_dicom(f.path)]
    if not found:
        return None
    if not (find_spec("pydicom") and find_spec("highdicom")):
        raise DatasetError(f"The folder holds {len(found)} DICOM files, which are read with pydicom and highdicom. "
                           "Install them: pip install 'nnunet-dante[dicom]'.")
    headers = {f: _header(f) for f in found}
    drawn = {f: h for f, h in headers.items() if h.get("Modality") in _MASKS}
    series: dict[str, list[File]] = {}
    for f, h in headers.items():
        if f not in drawn and "Rows" in h:
            series.setdefault(str(h.SeriesInstanceUID), []).append(f)
    if not drawn:
        return _with_other_masks(files, series, masks, labels)
    return _with_drawn_masks(headers, drawn, series)


def _is_dicom(path: Path) -> bool:
    if path.suffix.lower() not in _SUFFIXES and not path.suffix[1:].isdecimal():
        return False
    with path.open("rb") as stream:
        return stream.read(132)[128:] == b"DICM"


def _header(file: File) -> Any:
    import pydicom

    try:
        return pydicom.dcmread(file.path, stop_before_pixels=True, specific_tags=_TAGS)
    except Exception as error:  # whatever pydicom raises on a damaged file
        raise DatasetError(f"{file.relative} cannot be read as DICOM ({type(error).__name__}: {error}). Copy it again, "
                           "or take it out of the folder.") from error


def _series_part(files: Sequence[File]) -> Part:
    paths = tuple(f.path for f in files)
    where = "/".join(files[0].folders) or "."
    text = f"{where} (series of {len(files)} files)" if len(files) > 1 else files[0].relative
    return Part(paths, text, partial(read_series, paths))


def _with_other_masks(files: Sequence[File], series: dict[str, list[File]], masks: Sequence[str],
                      labels: Sequence[str]) -> Layout | None:
    """Return cases of series whose masks are other files; a series counts as one file named as its folder."""
    parts: dict[File, Part] = {}
    for number, members in enumerate(series.values()):
        folders = members[0].folders or (members[0].path.parent.name,)
        shared = sum(m[0].folders == members[0].folders for m in series.values()) > 1
        stem = f"{folders[-1]} {number}" if shared else folders[-1]
        parts[File(members[0].path, folders[:-1], stem, ".dcm")] = _series_part(members)
    layout = find_pairs([*(f for f in files if f.ending is not None), *parts], masks=masks, labels=labels, series=parts)
    return None if layout is None else Layout(description=f"DICOM series; {layout.description}", cases=layout.cases,
                                              notes=layout.notes)


def _with_drawn_masks(headers: dict[File, Any], drawn: dict[File, Any], series: dict[str, list[File]]) -> Layout:
    """Return a case for each series on which a SEG or RTSTRUCT was drawn."""
    masks: dict[str, dict[str, Part]] = {}
    notes: list[str] = []
    for file, header in drawn.items():
        uid = _drawn_on(header, headers, series)
        if uid is None:
            notes.append(f"{file.relative} was drawn on a series that is not here")
            continue
        image = _series_part(series[uid])
        regions = _segments(header) if header.Modality == "SEG" else _contours(header)
        for name, number in regions:
            load = partial(read_segment if header.Modality == "SEG" else read_contours, file.path, number, image.files)
            known = masks.setdefault(uid, {})
            known[name if name not in known else f"{name} {file.relative}"] = Part(
                (file.path, *image.files), f"{file.relative} ({name})", load)
    if left := [_series_part(members).text for uid, members in series.items() if uid not in masks]:
        notes.append(f"{len(left)} series without mask are left out: {shorten(left)}")
    names = unique_names(["_".join(series[uid][0].folders) or "case" for uid in masks])
    patients: dict[str, str] = {}  # the names and numbers of patients stay in the source
    cases = []
    for name, (uid, found) in zip(names, masks.items()):
        patient = patients.setdefault(str(headers[series[uid][0]].get("PatientID", name)), name)
        channel = str(headers[series[uid][0]].get("Modality", ""))
        cases.append(Found(name, patient, {channel: _series_part(series[uid])}, found))
    kinds = " and ".join(sorted({str(h.Modality) for h in drawn.values()}))
    return Layout(description=f"DICOM series with masks as {kinds}", cases=cases, notes=notes)


def _drawn_on(header: Any, headers: dict[File, Any], series: dict[str, list[File]]) -> str | None:
    """Return the series that a SEG or RTSTRUCT names, or else the only one in the same frame of reference."""
    named = [str(s.SeriesInstanceUID) for s in header.get("ReferencedSeriesSequence", [])]
    frames = [str(header.get("FrameOfReferenceUID", ""))]
    for frame in header.get("ReferencedFrameOfReferenceSequence", []):
        frames.append(str(frame.get("FrameOfReferenceUID", "")))
        for study in frame.get("RTReferencedStudySequence", []):
            named += [str(s.SeriesInstanceUID) for s in study.get("RTReferencedSeriesSequence", [])]
    if known := [uid for uid in named if uid in series]:
        return known[0]
    same = [uid for uid, members in series.items()
            if frames and str(headers[members[0]].get("FrameOfReferenceUID", "-")) in frames]
    return same[0] if len(same) == 1 else None


def _segments(header: Any) -> list[tuple[str, int]]:
    return [(str(s.SegmentLabel), int(s.SegmentNumber)) for s in header.SegmentSequence]


def _contours(header: Any) -> list[tuple[str, int]]:
    return [(str(s.ROIName), int(s.ROINumber)) for s in header.StructureSetROISequence]


@lru_cache(maxsize=4)  # an image and the masks that are drawn on it are read one after the other
def read_series(paths: tuple[Path, ...]) -> SimpleITK.Image:
    """Return the volume of a series, with rescaled values (Hounsfield units).

    Raises:
        DatasetError: its slices do not make a regular volume.
    """
    import pydicom

    headers = {p: pydicom.dcmread(p, stop_before_pixels=True, specific_tags=_TAGS) for p in paths}
    if len(paths) == 1 and int(headers[paths[0]].get("NumberOfFrames", 1) or 1) > 1:
        return _multi_frame(paths[0])
    try:
        ordered, steps, directions = _in_order(headers)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"the slices do not say where they lie ({error}), so they make no volume") from error
    reader = SimpleITK.ImageSeriesReader()
    reader.SetFileNames([str(p) for p in ordered])
    volume = reader.Execute()
    first = headers[ordered[0]]
    down, right = (float(mm) for mm in first.PixelSpacing)  # distance of rows, distance of columns
    volume.SetSpacing((right, down, steps))
    volume.SetOrigin([float(mm) for mm in first.ImagePositionPatient])
    volume.SetDirection(directions.ravel().tolist())
    return volume


def _in_order(headers: dict[Path, Any]) -> tuple[list[Path], float, np.ndarray]:
    """Return the files from slice to slice, the distance of slices in mm, and the directions of the axes x, y, z."""
    rounded = {tuple(np.round(np.asarray(h.ImageOrientationPatient, float), 3)) + (h.Rows, h.Columns)
               for h in headers.values()}
    if len(rounded) > 1:
        raise DatasetError("its slices have several directions or sizes, as a scout has. Take the others out")
    x, y = np.reshape(np.asarray(next(iter(headers.values())).ImageOrientationPatient, float), (2, 3))
    directions = np.stack([x, y, np.cross(x, y)], axis=1)
    places = {p: np.asarray(h.ImagePositionPatient, float) @ directions for p, h in headers.items()}
    ordered = sorted(places, key=lambda p: places[p][2])
    along = np.array([places[p] for p in ordered])
    if len(ordered) == 1:
        return ordered, float(next(iter(headers.values())).get("SliceThickness") or 1.0), directions
    steps = np.diff(along[:, 2])
    distance = float(np.median(steps[steps > _GAP])) if (steps > _GAP).any() else 0.0
    if (steps <= _GAP).any():
        twice = [ordered[i + 1].name for i in np.flatnonzero(steps <= _GAP)]
        raise DatasetError(f"{len(twice)} slices lie where another one lies ({shorten(twice)}): a copy, an echo or a "
                           "time point. Keep one file per place")
    if (gaps := np.flatnonzero(np.abs(steps - distance) > max(_GAP, _GAP * distance))).size:
        i = int(gaps[0])
        raise DatasetError(f"its slices are not regular: {ordered[i].name} and {ordered[i + 1].name} are "
                           f"{steps[i]:.2f} mm apart, most are {distance:.2f} mm. A slice is missing, or the distance "
                           "changes")
    if np.abs(along[-1, :2] - along[0, :2]).max() > max(_GAP * abs(along[-1, 2] - along[0, 2]), 0.1):
        raise DatasetError("its slices are shifted against each other (tilted gantry). dcm2niix straightens such a "
                           "series; give the result as NIfTI")
    return ordered, distance, directions


def _multi_frame(path: Path) -> SimpleITK.Image:
    import highdicom

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            volume = highdicom.imread(path).get_volume(dtype=np.float32)
    except Exception as error:  # frames that make no regular volume, or that cannot be decompressed
        raise DatasetError(f"the frames of {path.name} make no regular volume ({error})") from error
    return _as_image(volume)


def _as_image(volume: Any) -> SimpleITK.Image:
    axes = np.asarray(volume.affine)[:3, :3][:, ::-1]  # columns x, y, z (LPS+); highdicom has slices first
    spacing = np.linalg.norm(axes, axis=0)
    image = SimpleITK.GetImageFromArray(np.ascontiguousarray(volume.array))
    image.SetSpacing(spacing.tolist())
    image.SetDirection((axes / spacing).ravel().tolist())
    image.SetOrigin(np.asarray(volume.affine)[:3, 3].tolist())
    if np.linalg.det(axes / spacing) < 0:  # SimpleITK wants right-handed axes
        image = SimpleITK.Flip(image, (False, False, True))
    return image


def read_segment(path: Path, number: int, images: tuple[Path, ...]) -> SimpleITK.Image:
    """Return one segment of a DICOM SEG on the grid of its image, where its slices are some of the image's.

    A segment on another grid is returned as it lies.
    """
    import highdicom

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        volume = highdicom.seg.segread(path).get_volume(segment_numbers=[number], combine_segments=True, relabel=True,
                                                        skip_overlap_checks=True)
    mask, image = _as_image(volume), read_series(images)
    shown = SimpleITK.DICOMOrient(mask, SimpleITK.DICOMOrientImageFilter().GetOrientationFromDirectionCosines(
        image.GetDirection()))
    start = np.array(image.TransformPhysicalPointToContinuousIndex(shown.GetOrigin()))
    if (np.allclose(shown.GetSpacing(), image.GetSpacing(), rtol=1e-3) and np.abs(start - np.rint(start)).max() < 0.05
            and np.allclose(shown.GetDirection(), image.GetDirection(), atol=1e-3)):
        return SimpleITK.Resample(mask, image, SimpleITK.Transform(), SimpleITK.sitkNearestNeighbor)
    return mask


def read_contours(path: Path, number: int, images: tuple[Path, ...]) -> SimpleITK.Image:
    """Return one region of an RTSTRUCT, filled on the grid of its image.

    Raises:
        DatasetError: its contours do not lie on the slices of the image.
    """
    import pydicom

    header = pydicom.dcmread(path)
    loops = [np.reshape(np.asarray(contour.ContourData, float), (-1, 3))
             for region in header.get("ROIContourSequence", []) if int(region.ReferencedROINumber) == number
             for contour in region.get("ContourSequence", [])]
    return filled(loops, read_series(images))


def filled(loops: Sequence[np.ndarray], image: SimpleITK.Image) -> SimpleITK.Image:
    """Return a mask with the voxels whose centres lie inside the contours; a contour inside another one is a hole.

    loops: each of shape (points, 3), in mm (LPS+). image: gives the grid.

    Raises:
        DatasetError: a contour does not lie on a slice of the image.
    """
    columns, rows, slices = image.GetSize()
    mask = np.zeros((slices, rows, columns), bool)
    directions = np.reshape(image.GetDirection(), (3, 3))
    for loop in loops:
        index = (loop - np.array(image.GetOrigin())) @ directions / np.array(image.GetSpacing())  # columns x, y, z
        k = int(np.rint(index[:, 2].mean()))
        if np.abs(index[:, 2] - k).max() > _OFF_SLICE:
            raise DatasetError("its contours do not lie on the slices of the image, so they were drawn on another one")
        if 0 <= k < slices:
            mask[k] ^= polygon2mask((rows, columns), index[:, 1::-1])
    return same_space(image, mask.astype(np.uint8))
