"""DICOM series, segmentations and structure sets, written by pydicom and highdicom from an image of SimpleITK."""

from __future__ import annotations

from pathlib import Path

import highdicom
import numpy as np
import pydicom
import SimpleITK
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.sr.codedict import codes
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, RTStructureSetStorage, generate_uid


def _file(storage: str, modality: str) -> Dataset:
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.SOPClassUID, ds.SOPInstanceUID, ds.Modality = storage, generate_uid(), modality
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = storage, ds.SOPInstanceUID
    ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    ds.PatientID, ds.PatientName, ds.PatientBirthDate, ds.PatientSex = "secret", "Anna^Secret", "", ""
    ds.StudyID = ds.AccessionNumber = ds.StudyDate = ds.StudyTime = ds.ReferringPhysicianName = ""
    return ds


def series(image: SimpleITK.Image, folder: Path, *, slope: float = 1.0) -> list[Path]:
    """Write a CT series, one file per slice, names in the reverse order of places; returns the files by slice."""
    folder.mkdir(parents=True, exist_ok=True)
    array = SimpleITK.GetArrayFromImage(image)
    x, y, _ = np.reshape(image.GetDirection(), (3, 3)).T
    uids, files = [generate_uid() for _ in range(3)], []
    for k in range(len(array)):
        ds = _file(CTImageStorage, "CT")
        ds.StudyInstanceUID, ds.SeriesInstanceUID, ds.FrameOfReferenceUID = uids
        ds.SeriesNumber, ds.InstanceNumber, ds.SliceThickness, ds.PositionReferenceIndicator = 1, k + 1, 1, ""
        ds.ImagePositionPatient = [round(v, 8) for v in image.TransformIndexToPhysicalPoint((0, 0, k))]
        ds.ImageOrientationPatient = [round(v, 8) for v in (*x, *y)]
        ds.PixelSpacing = [image.GetSpacing()[1], image.GetSpacing()[0]]
        ds.Rows, ds.Columns = array.shape[1:]
        ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, "MONOCHROME2", 1
        ds.BitsAllocated, ds.BitsStored, ds.HighBit = 16, 16, 15
        ds.RescaleSlope, ds.RescaleIntercept, ds.PixelData = slope, -1024, array[k].astype("<i2").tobytes()
        files.append(folder / f"IM{len(array) - k:04d}")
        ds.save_as(files[-1], enforce_file_format=True)
    return files


def segmentation(files: list[Path], masks: dict[str, np.ndarray], path: Path) -> None:
    """Write a DICOM SEG; masks: name -> (slices, rows, columns)."""
    describe = [highdicom.seg.SegmentDescription(
        n, name, codes.SCT.Organ, codes.SCT.Organ, highdicom.seg.SegmentAlgorithmTypeValues.MANUAL)
        for n, name in enumerate(masks, 1)]
    highdicom.seg.Segmentation(
        [pydicom.dcmread(f) for f in files], np.stack([m.astype(np.uint8) for m in masks.values()], -1),
        highdicom.seg.SegmentationTypeValues.BINARY, describe, generate_uid(), 2, generate_uid(), 1, "m", "m", "1", "1",
    ).save_as(path)


def structures(files: list[Path], loops: dict[str, list[np.ndarray]], path: Path) -> None:
    """Write an RTSTRUCT; loops: name -> contours of shape (points, 3) in mm."""
    image = pydicom.dcmread(files[0])
    ds = _file(RTStructureSetStorage, "RTSTRUCT")
    ds.StudyInstanceUID, ds.SeriesInstanceUID = image.StudyInstanceUID, generate_uid()
    one = Dataset()
    one.SeriesInstanceUID = image.SeriesInstanceUID
    study, frame = Dataset(), Dataset()
    study.RTReferencedSeriesSequence = [one]
    frame.FrameOfReferenceUID, frame.RTReferencedStudySequence = image.FrameOfReferenceUID, [study]
    ds.ReferencedFrameOfReferenceSequence = [frame]
    ds.StructureSetROISequence, ds.ROIContourSequence = [], []
    for n, (name, curves) in enumerate(loops.items(), 1):
        roi, contours = Dataset(), Dataset()
        roi.ROINumber, roi.ROIName, contours.ReferencedROINumber, contours.ContourSequence = n, name, n, []
        for curve in curves:
            item = Dataset()
            item.ContourGeometricType, item.NumberOfContourPoints = "CLOSED_PLANAR", len(curve)
            item.ContourData = [f"{v:.4f}" for v in curve.ravel()]
            contours.ContourSequence.append(item)
        ds.StructureSetROISequence.append(roi)
        ds.ROIContourSequence.append(contours)
    ds.save_as(path, enforce_file_format=True)


def outline(image: SimpleITK.Image, corners: list[tuple[float, float]], k: int) -> np.ndarray:
    """A contour on slice k in mm, from (column, row) corners in voxels."""
    return np.array([image.TransformContinuousIndexToPhysicalPoint((float(c), float(r), float(k))) for c, r in corners])
