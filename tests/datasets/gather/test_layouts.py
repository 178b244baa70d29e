"""Each layout becomes a data set that this package's own checks accept, and nothing in the source is changed."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
import SimpleITK
from image_folders import array, case, only, tree, volume, write
from PIL import Image

from nnunet_dante.datasets.dataset import open_target
from nnunet_dante.datasets.gather.gather import gather
from nnunet_dante.datasets.shots import read_groups

LABELS = ["liver=1,spleen=2"]


@pytest.fixture
def made(nnunet_paths, tmp_path):
    """Make the data set of tmp_path/source, check it as `transfer` does, and that the source is as it was."""
    def make(**options):
        source = tmp_path / "source"
        before, said = tree(source), []
        found = gather(source, 123, "Mine", say=said.append, **options)
        assert tree(source) == before
        target = open_target(123)
        return found, target, "\n".join(said)
    return make


@pytest.fixture
def source(tmp_path):
    folder = tmp_path / "source"
    folder.mkdir()
    return folder


def linked(new, old) -> bool:
    return new.stat().st_ino == old.stat().st_ino


def labels_of(target) -> dict:
    return {k: v for k, v in target.dataset_json["labels"].items() if v}


def test_two_folders(source, made):
    for n in range(3):
        image, mask = case(n)
        write(image, source / "images" / f"P0{n}.nii.gz")
        write(mask, source / "labels" / f"P0{n}.nii.gz")
    found, target, said = made(labels=LABELS)
    assert "images and masks in folders of their own; the masks are told by their names or folders" in said
    assert sorted(target.cases) == ["P00", "P01", "P02"] and labels_of(target) == {"liver": 1, "spleen": 2}
    assert target.warnings == ()
    assert all(linked(target.cases[f"P0{n}"].mask, source / "labels" / f"P0{n}.nii.gz") for n in range(3))
    assert found.written and (target.raw / "preview.html").read_text().count("<img") == 3
    assert Image.open(target.raw / "preview" / "P00.jpg").size[1] == 220


@pytest.mark.parametrize("pattern", ["{}_seg", "{}_mask", "{}-label", "mask_{}", "{}.seg", "{} Segmentation"])
@pytest.mark.parametrize("name", ["P01", "Müller, Anna 1.2"])
def test_beside_each_other(source, made, pattern, name):
    image, mask = case(codes="RAS", spacing=(0.7, 0.7, 5.0))
    write(image, source / f"{name}.nii.gz")
    write(mask, source / f"{pattern.format(name)}.nii.gz")
    _, target, said = made(labels=LABELS)
    assert "beside each other" in said
    assert list(target.cases) == ["P01" if name == "P01" else "Muller_Anna_1_2"]


def test_channels_by_suffix_as_in_brats(source, made):
    for n in range(2):
        for m, channel in enumerate(("t1", "t2")):
            write(case(10 * n + m)[0], source / f"BraTS_{n}" / f"BraTS_{n}_{channel}.nii.gz")
        write(case(n)[1], source / f"BraTS_{n}" / f"BraTS_{n}_seg.nii.gz")
    _, target, said = made(labels=LABELS, channels=["T2,T1"])
    assert target.dataset_json["channel_names"] == {"0": "T2", "1": "T1"}
    assert linked(target.cases["BraTS_1"].images[0], source / "BraTS_1" / "BraTS_1_t2.nii.gz")


@pytest.mark.parametrize("folder", ["segmentations", "."])
def test_a_folder_per_patient_with_a_mask_per_organ_as_totalsegmentator_writes(source, made, folder):
    for n in range(2):
        image, mask = case(n, codes="RPI", turned_deg=20)
        write(image, source / f"s000{n}" / "ct.nii.gz")
        write(only(mask, 1), source / f"s000{n}" / folder / "liver.nii.gz")
        write(only(mask, 2), source / f"s000{n}" / folder / "kidney_left.nii.gz")
    _, target, said = made()
    assert "one folder per patient" in said
    assert ("by their voxels" in said) == (folder == ".")
    assert labels_of(target) == {"kidney_left": 1, "liver": 2}
    expected = np.choose(array(write(mask, source.parent / "expected.nii.gz")), (0, 2, 1))
    assert np.array_equal(array(target.cases["s0001"].mask), expected)
    assert target.warnings == ()


def test_bids_with_masks_among_the_derivatives(source, made):
    for n in range(2):
        image, mask = case(n)
        write(image, source / f"sub-0{n}" / "ses-1" / "anat" / f"sub-0{n}_ses-1_T1w.nii.gz")
        write(mask, source / "derivatives" / "labels" / f"sub-0{n}" / "ses-1" / "anat" / f"sub-0{n}_ses-1_T1w_seg.nii.gz")
    _, target, _ = made(labels=LABELS)
    assert sorted(target.cases) == ["sub_00_ses_1_T1w", "sub_01_ses_1_T1w"]


def test_equal_names_in_two_folders_keep_the_folders_name(source, made):
    image, mask = case()
    write(image, source / "P1" / "ct.nii.gz")
    for value, side in enumerate(("left", "right"), 1):
        write(only(mask, value), source / "P1" / side / "kidney_mask.nii.gz")
    _, target, _ = made()
    assert labels_of(target) == {"left_kidney": 1, "right_kidney": 2}


def test_labels_choose_from_the_masks_of_organs_and_give_their_order(source, made):
    image, mask = case(values=(1, 2, 3))
    write(image, source / "P01_image.nrrd")
    for value, name in enumerate(("liver", "spleen", "aorta"), 1):
        write(only(mask, value), source / f"P01_{name}_mask.nrrd")
    _, target, said = made(labels=["spleen", "liver"])
    assert labels_of(target) == {"spleen": 1, "liver": 2} and "left out: aorta" in said
    assert set(np.unique(array(target.cases["P01"].mask))) == {0, 1, 2}
    assert linked(target.cases["P01"].images[0], source / "P01_image.nrrd")


@pytest.mark.parametrize("ending", [".nii", ".nrrd", ".mha", ".mhd"])
def test_other_formats_stay_or_become_nifti_with_the_same_place_in_space(source, made, ending):
    image, mask = case(codes="PLS", turned_deg=33, spacing=(0.5, 1.5, 4.0), origin=(-7, 31, 5))
    write(image, source / "images" / f"a{ending}")
    write(mask, source / "masks" / f"a{ending}")
    _, target, _ = made(labels=LABELS)
    new = target.cases["a"].images[0]
    assert new.name.endswith(".nii.gz" if ending == ".mhd" else ending)
    read = SimpleITK.ReadImage(str(new))
    assert np.array_equal(SimpleITK.GetArrayFromImage(read), SimpleITK.GetArrayFromImage(image))
    assert read.GetPixelID() == image.GetPixelID()
    for method in ("GetSpacing", "GetOrigin", "GetDirection"):
        assert np.allclose(getattr(read, method)(), getattr(image, method)(), atol=1e-5)


def test_mixed_formats_become_the_one_of_most_files(source, made):
    for n, ending in enumerate((".nii.gz", ".nii.gz", ".mha")):
        image, mask = case(n)
        write(image, source / "img" / f"{n}a{ending}")
        write(mask, source / "seg" / f"{n}a.nii.gz")
    _, target, said = made(labels=LABELS)
    assert {p.name[-7:] for c in target.cases.values() for p in (*c.images, c.mask)} == {".nii.gz"}
    assert "5 files will be linked as they are, 1 will be written as .nii.gz" in said


def test_a_file_with_four_axes_is_one_channel_each(source, made):
    one, mask = case()
    other, _ = case(1)
    write(SimpleITK.JoinSeries([one, other]), source / "image" / "p.nii.gz")
    write(mask, source / "label" / "p.nii.gz")
    _, target, _ = made(labels=LABELS, channels=["T2", "ADC"])
    assert [np.array_equal(array(path), SimpleITK.GetArrayFromImage(i)) for path, i in zip(
        target.cases["p"].images, (one, other))] == [True, True]


def test_the_medical_segmentation_decathlon(source, made):
    image, mask = case()
    write(image, source / "imagesTr" / "heart_1.nii.gz")
    write(mask, source / "labelsTr" / "heart_1.nii.gz")
    write(case(3)[0], source / "imagesTs" / "heart_2.nii.gz")
    (source / "imagesTr" / "._heart_1.nii.gz").write_bytes(b"macOS")
    (source / "dataset.json").write_text(json.dumps({
        "modality": {"0": "MRI"}, "labels": {"0": "background", "1": "Anterior", "2": "Posterior"},
        "training": [{"image": "./imagesTr/heart_1.nii.gz", "label": "./labelsTr/heart_1.nii.gz"}],
        "test": ["./imagesTs/heart_2.nii.gz"]}))
    _, target, said = made()
    assert labels_of(target) == {"Anterior": 1, "Posterior": 2} and target.dataset_json["channel_names"] == {"0": "MRI"}
    assert list(target.cases) == ["heart_1"] and (target.raw / "imagesTs" / "heart_2_0000.nii.gz").is_file()
    assert "Without mask: 1 (heart_2)" in said


def test_an_nnunet_data_set_with_regions_keeps_its_dataset_json(source, made):
    image, mask = case()
    write(image, source / "imagesTr" / "c_0000.nii.gz")
    write(mask, source / "labelsTr" / "c.nii.gz")
    labels = {"background": 0, "whole": [1, 2], "core": 2}
    (source / "dataset.json").write_text(json.dumps({
        "channel_names": {"0": "CT"}, "labels": labels, "regions_class_order": [1, 2], "numTraining": 9,
        "file_ending": ".nii.gz", "licence": "mine"}))
    _, target, _ = made()
    assert target.dataset_json["labels"] == labels and target.dataset_json["licence"] == "mine"
    assert target.dataset_json["numTraining"] == 1 and linked(target.cases["c"].mask, source / "labelsTr" / "c.nii.gz")


@pytest.mark.parametrize("ending", [".png", ".jpg", ".bmp", ".tif", ".tiff"])
@pytest.mark.parametrize("colour", [False, True])
def test_photographs(source, made, ending, colour):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 16, 3) if colour else (20, 16), np.uint8)
    mask = np.zeros((20, 16), np.uint8)
    mask[4:9, 3:11] = 255
    for folder, content in (("images", pixels), ("masks", mask)):
        (source / folder).mkdir()
        Image.fromarray(content).save(source / folder / f"skin 1{ending if folder == 'images' else '.png'}")
    _, target, _ = made(labels=["mole=255"])
    assert list(target.dataset_json["channel_names"].values()) == (["R", "G", "B"] if colour else ["image"])
    new = np.asarray(Image.open(target.cases["skin_1"].images[0]))
    assert np.array_equal(new, np.asarray(Image.open(source / "images" / f"skin 1{ending}")))
    assert np.array_equal(np.asarray(Image.open(target.cases["skin_1"].mask)), mask // 255)


def test_a_palette_is_no_colour(source, made):
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 16), np.uint8)).save(source / "a.png")
    mask = Image.fromarray(np.eye(20, 16, dtype=np.uint8), mode="P")
    mask.putpalette([0, 0, 0, 200, 30, 30])
    mask.save(source / "a_mask.png")
    _, target, _ = made(labels=["line=1"])
    assert np.array_equal(np.asarray(Image.open(target.cases["a"].mask)), np.eye(20, 16))


def test_stacks_of_tiffs_become_nifti(source, made):
    image, mask = case()
    write(image, source / "img" / "a.tif")
    write(mask, source / "gt" / "a.tif")
    _, target, _ = made(labels=LABELS)
    assert np.array_equal(array(target.cases["a"].images[0]), SimpleITK.GetArrayFromImage(image))
    assert SimpleITK.ReadImage(str(target.cases["a"].mask)).GetSpacing() == (1, 1, 1)


def test_groups_are_the_patients_in_the_form_that_shots_reads(source, made):
    for patient in ("P1", "P2"):
        for n, visit in enumerate(("visit1", "visit2")):
            image, mask = case(n + 10 * (patient == "P2"))
            write(image, source / patient / visit / "image.nii.gz")
            write(mask, source / patient / visit / "mask.nii.gz")
    _, target, said = made(labels=LABELS)
    assert read_groups(target.raw / "groups.csv") == {"P1": ["P1_visit1", "P1_visit2"], "P2": ["P2_visit1", "P2_visit2"]}
    assert "2 patients have several cases" in said


def test_the_table_says_what_is_unusual(source, made):
    for n in range(5):
        image, mask = case(n, spacing=(1, 1, 9 if n == 3 else 3), codes="RAS" if n == 4 else "LPS")
        write(image, source / "images" / f"k{n}.nii.gz")
        write(mask, source / "labels" / f"k{n}.nii.gz")
    _, target, said = made(labels=LABELS)
    rows = {row["case"]: row for row in csv.DictReader((target.raw / "cases.csv").open())}
    assert [rows[f"k{n}"]["unusual"] for n in range(5)] == ["", "", "", "spacing 3 mm", "orientation"]
    assert rows["k0"]["shape"] == "14 x 12 x 9" and rows["k0"]["liver voxels"] == "48"
    assert "Unusual: k3 in spacing 3 mm." in said


def test_images_without_masks_go_where_no_training_sees_them(source, made):
    for n in range(3):
        image, mask = case(n)
        write(image, source / f"q{n}.nii.gz")
        if n < 2:
            write(mask, source / f"q{n}_seg.nii.gz")
    _, target, said = made(labels=LABELS)
    assert sorted(target.cases) == ["q0", "q1"] and "Without mask: 1 (q2)" in said
    assert [p.name for p in (target.raw / "imagesTs").iterdir()] == ["q2_0000.nii.gz"]


def test_flat_images_that_are_nifti_stay(source, made):
    image, mask = case(shape=(20, 16), dtype=np.float32)
    write(image, source / "images" / "f.nii.gz")
    write(mask, source / "labels" / "f.nii.gz")
    _, target, _ = made(labels=LABELS)
    assert linked(target.cases["f"].images[0], source / "images" / "f.nii.gz")


def test_volume_helper_leads_where_it_says():
    assert SimpleITK.DICOMOrientImageFilter().GetOrientationFromDirectionCosines(
        volume(np.zeros((2, 3, 4)), codes="PIR").GetDirection()) == "PIR"


def slicer(mask: SimpleITK.Image, segments: list[tuple[str, int, int]], path) -> None:
    """Write a segmentation as 3D Slicer does: name, value and layer of each segment."""
    for n, (name, value, layer) in enumerate(segments):
        mask.SetMetaData(f"Segment{n}_Name", name)
        mask.SetMetaData(f"Segment{n}_LabelValue", str(value))
        mask.SetMetaData(f"Segment{n}_Layer", str(layer))
    write(mask, path)


def test_segments_of_slicer_have_their_names_also_where_files_number_them_differently(source, made):
    for n, segments in enumerate(([("liver", 1, 0), ("spleen", 2, 0)], [("spleen", 1, 0), ("liver", 2, 0)])):
        image, mask = case(n, values=(1, 2))
        write(image, source / f"P0{n}.nrrd")
        slicer(mask, segments, source / f"P0{n}.seg.nrrd")
    _, target, _ = made()
    assert labels_of(target) == {"liver": 1, "spleen": 2}
    first, second = (array(target.cases[name].mask) for name in ("P00", "P01"))
    assert np.array_equal(first, SimpleITK.GetArrayFromImage(case(0, values=(1, 2))[1]))
    drawn = SimpleITK.GetArrayFromImage(case(1, values=(1, 2))[1])
    assert np.array_equal(second, np.choose(drawn, [0, 2, 1]))


def test_segments_of_slicer_that_overlap_lie_in_layers_and_the_file_covers_only_what_is_drawn(source, made):
    image, mask = case(values=(1,))
    write(image, source / "P01.nrrd")
    organ = SimpleITK.GetArrayFromImage(mask) == 1
    inside = organ.copy()
    inside[..., : np.argwhere(organ)[:, 2].mean().astype(int)] = False
    layers = SimpleITK.GetImageFromArray(np.stack([organ, inside], -1).astype(np.uint8), isVector=True)
    layers.CopyInformation(mask)
    low, high = np.argwhere(organ).min(0)[::-1].tolist(), (np.argwhere(organ).max(0)[::-1] + 1).tolist()
    cropped = layers[tuple(slice(a, b) for a, b in zip(low, high))]
    slicer(cropped, [("liver", 1, 0), ("lesion", 1, 1)], source / "P01.seg.nrrd")
    _, target, said = made(labels=["liver,lesion"])
    assert labels_of(target) == {"liver": 1, "lesion": 2} and "lesion takes" in said and "grid" not in said
    assert np.array_equal(array(target.cases["P01"].mask), np.where(inside, 2, organ))
    assert inside.any() and (organ & ~inside).any() and cropped.GetSize() != image.GetSize()
