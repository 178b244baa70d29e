"""dicom.py: series with SEG, RTSTRUCT or NIfTI masks lie where the headers say; irregular series are refused."""

from __future__ import annotations

import numpy as np
import pytest
import SimpleITK
from image_folders import array, case, tree, write

from nnunet_dante.datasets.dataset import open_target
from nnunet_dante.datasets.gather import dicom
from nnunet_dante.datasets.gather.gather import gather
from nnunet_dante.errors import DatasetError

pytest.importorskip("pydicom")
pytest.importorskip("highdicom")
import dicom_files  # noqa: E402
import pydicom  # noqa: E402

PLACE = {"codes": "PIR", "turned_deg": 15.0, "spacing": (0.75, 1.5, 4.0), "origin": (-20.0, 30.0, 7.0)}


@pytest.fixture
def source(tmp_path, nnunet_paths):
    return tmp_path / "source"


def make(source, **options):
    before, said = tree(source), []
    gather(source, 123, "D", say=said.append, **options)
    assert tree(source) == before
    return open_target(123), "\n".join(said)


def check_image(path, image):
    new = SimpleITK.ReadImage(str(path))
    assert np.array_equal(SimpleITK.GetArrayFromImage(new), SimpleITK.GetArrayFromImage(image) - 1024)
    for method in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert np.allclose(getattr(new, method)(), getattr(image, method)(), atol=1e-4)


def test_a_dicom_seg_on_an_oblique_series(source):
    for name in ("A", "B"):
        image, mask = case(4 + (name == "B"), **PLACE)
        files = dicom_files.series(image, source / name / "scan")
        drawn = SimpleITK.GetArrayFromImage(mask)
        dicom_files.segmentation(files, {"liver": drawn == 1, "spleen": drawn == 2}, source / name / "seg.dcm")
    dicom_files.series(case(9)[0], source / "A" / "scout")
    target, said = make(source)
    assert "DICOM series with masks as SEG" in said and "1 series without mask are left out: A/scout" in said
    assert target.dataset_json["channel_names"] == {"0": "CT"} and target.warnings == ()
    check_image(target.cases["B_scan"].images[0], image)
    assert np.array_equal(array(target.cases["B_scan"].mask), drawn)
    texts = [(target.raw / name).read_text() for name in ("groups.csv", "cases.csv", "dataset.json", "preview.html")]
    assert not any("secret" in text.lower() for text in texts)


def test_structures_are_filled_with_their_holes(source):
    image, _ = case(4, shape=(24, 20, 5), **PLACE)
    files = dicom_files.series(image, source / "P")
    square = [(3.6, 2.6), (14.4, 2.6), (14.4, 12.4), (3.6, 12.4)]
    hole = [(6.6, 5.6), (9.4, 5.6), (9.4, 8.4), (6.6, 8.4)]
    dicom_files.structures(files, {"organ": [dicom_files.outline(image, c, 2) for c in (square, hole)]},
                           source / "P" / "rs.dcm")
    target, said = make(source)
    expected = np.zeros((5, 20, 24), np.uint8)
    expected[2, 3:13, 4:15] = 1
    expected[2, 6:9, 7:10] = 0
    assert "RTSTRUCT" in said and np.array_equal(array(target.cases["P"].mask), expected)


def test_structures_of_another_image_are_refused(source):
    image, _ = case(4, **PLACE)
    files = dicom_files.series(image, source / "P")
    dicom_files.structures(files, {"organ": [dicom_files.outline(image, [(2, 2), (6, 2), (6, 6)], 2.5)]},
                           source / "P" / "rs.dcm")
    with pytest.raises(DatasetError, match="contours do not lie on the slices"):
        make(source)


@pytest.mark.parametrize("layout", ["inside", "beside", "folders"])
def test_masks_as_nifti(source, layout):
    for n in range(2):
        image, mask = case(n, **PLACE)
        dicom_files.series(image, source / {"inside": f"P{n}", "beside": f"P{n}/dcm", "folders": f"images/P{n}"}[layout])
        write(mask, source / {"inside": f"P{n}/x_seg.nii.gz", "beside": f"P{n}/mask.nii.gz",
                              "folders": f"labels/P{n}.nii.gz"}[layout])
    target, said = make(source, labels=["liver=1,spleen=2"])
    assert sorted(target.cases) == ["P0", "P1"] and "DICOM series" in said
    check_image(target.cases["P1"].images[0], image)
    assert np.array_equal(array(target.cases["P1"].mask), SimpleITK.GetArrayFromImage(mask))


def gap(files):
    files[4].unlink()


def duplicate(files):
    ds = pydicom.dcmread(files[3])
    ds.SOPInstanceUID = pydicom.uid.generate_uid()
    ds.save_as(files[3].with_name("copy"), enforce_file_format=True)


def tilt(files):
    for k, file in enumerate(files):
        ds = pydicom.dcmread(file)
        x, y = np.reshape(np.array(ds.ImageOrientationPatient, float), (2, 3))
        ds.ImagePositionPatient = [f"{v:.6f}" for v in np.array(ds.ImagePositionPatient, float) + 0.8 * k * y]
        ds.save_as(file, enforce_file_format=True)


def without_place(files):
    ds = pydicom.dcmread(files[0])
    del ds.ImagePositionPatient
    ds.save_as(files[0], enforce_file_format=True)


@pytest.mark.parametrize(("damage", "message"), [
    (gap, r"slices are not regular: IM\d+ and IM\d+ are 8.00 mm apart, most are 4.00 mm. A slice is missing"),
    (duplicate, "1 slices lie where another one lies"), (tilt, "tilted gantry"),
    (without_place, "do not say where they lie")])
def test_irregular_series_are_refused(source, damage, message):
    image, mask = case(1, **PLACE)
    damage(dicom_files.series(image, source / "P"))
    write(mask, source / "P" / "mask.nii.gz")
    with pytest.raises(DatasetError, match=message):
        make(source, labels=["liver=1,spleen=2"])


def test_a_multi_frame_image(source):
    """The frames of a segmentation are those of any multi-frame image, with a place for each."""
    image, mask = case(4, **PLACE)
    files = dicom_files.series(image, source / "scan")
    dicom_files.segmentation(files, {"all": np.ones(SimpleITK.GetArrayFromImage(mask).shape, bool)}, source / "m.dcm")
    read = SimpleITK.DICOMOrient(dicom.read_series((source / "m.dcm",)), "PIR")
    assert read.GetSize() == image.GetSize()
    assert np.allclose(read.GetOrigin(), image.GetOrigin(), atol=1e-3)
    assert np.allclose(read.GetSpacing(), image.GetSpacing(), atol=1e-3)


def test_without_the_libraries_the_message_says_what_to_install(source, monkeypatch):
    dicom_files.series(case()[0], source / "P")
    monkeypatch.setattr(dicom, "find_spec", lambda name: None)
    with pytest.raises(DatasetError, match=r"pip install 'nnunet-dante\[dicom\]'"):
        make(source)
