"""dafne.py: every export of Dafne gives the masks that were drawn, or is refused; both orders of axes are told apart."""

from __future__ import annotations

import nibabel
import numpy as np
import pytest
import SimpleITK
from image_folders import array, case, tree, write

from nnunet_dante.datasets.dataset import open_target
from nnunet_dante.datasets.gather.gather import gather
from nnunet_dante.errors import DatasetError

CODES = "PLS"  # an axial view: rows grow to posterior, columns to the left


def screen(codes: str, turned_deg: float = 0.0, shape=(14, 12, 9)):
    """Image and mask as files, and as Dafne holds them: arrays (rows, columns, slices), and the affine of these."""
    image, mask = case(3, shape=shape, codes="RAS", spacing=(0.8, 1.1, 2.0), origin=(4, 5, 6), turned_deg=turned_deg)
    shown = [SimpleITK.DICOMOrient(i, codes) for i in (image, mask)]
    arrays = [SimpleITK.GetArrayFromImage(i).T for i in shown]
    affine = np.eye(4)
    affine[:3, :3] = np.diag([-1, -1, 1]) @ np.reshape(shown[0].GetDirection(), (3, 3)) * shown[0].GetSpacing()
    affine[:3, 3] = np.array(shown[0].GetOrigin()) * [-1, -1, 1]
    assert "".join(nibabel.aff2axcodes(affine)) == codes
    return image, mask, *arrays, affine


def xyz(a: np.ndarray, codes: str) -> np.ndarray:
    return a.transpose([next(i for i, c in enumerate(codes) if c in pair) for pair in ("RL", "AP", "SI")])


def make(source, **options):
    before = tree(source)
    gather(source, 123, "D", say=lambda _: None, **options)
    assert tree(source) == before
    return open_target(123)


def check(target, image, mask):
    """The data set holds the image and the mask at their places in space, whatever the order of axes."""
    (found,) = target.cases.values()
    for path, expected in ((found.images[0], image), (found.mask, mask)):
        new = SimpleITK.DICOMOrient(SimpleITK.ReadImage(str(path)), "RAS")
        assert np.array_equal(SimpleITK.GetArrayFromImage(new), SimpleITK.GetArrayFromImage(expected))
        for method in ("GetSpacing", "GetOrigin", "GetDirection"):
            assert np.allclose(getattr(new, method)(), getattr(expected, method)(), atol=1e-4)
    assert target.warnings == ()


@pytest.fixture
def source(tmp_path, nnunet_paths):
    (tmp_path / "source").mkdir()
    return tmp_path / "source"


@pytest.mark.parametrize("codes", ["PLS", "IAL", "LIP"])
@pytest.mark.parametrize("turned", [0.0, 12.0])
@pytest.mark.parametrize("kind", ["drawn", "upload of a 3D model", "bundle of a 3D model"])
def test_bundles_and_uploads(source, codes, turned, kind):
    image, mask, shown, drawn, affine = screen(codes, turned)
    content = {"data": shown, "affine": affine, "resolution": [1, 1, 1], "comment": "",
               "mask_A": drawn == 1, "mask_B": drawn == 2}
    if kind == "upload of a 3D model":
        content |= {k: xyz(content[k], codes) for k in ("mask_A", "mask_B")}
    elif kind == "bundle of a 3D model":
        content |= {k: content[k].transpose(2, 0, 1) for k in ("data", "mask_A", "mask_B")} | {"model": "M"}
    np.savez(source / "data_1.npz", **{k: v.astype(np.uint8) if k.startswith("mask") else v for k, v in content.items()})
    check(make(source), image, mask)


def test_equal_axes_are_asked_for(source):
    image, mask, shown, drawn, affine = screen(CODES, shape=(12, 12, 9))
    content = {"data": shown, "affine": affine, "mask_A": (drawn == 1).astype(np.uint8),
               "mask_B": (drawn == 2).astype(np.uint8)}
    np.savez(source / "a.npz", **content)
    with pytest.raises(DatasetError, match="a: a.npz .mask_A.: Dafne stores masks in two orders.*--mask-axes: screen if"):
        make(source)
    check(make(source, mask_axes="screen"), image, mask)


def test_files_of_dante_without_affine_need_the_orientation(source):
    image, mask, shown, drawn, affine = screen(CODES)
    for n in range(2):
        (source / f"fold{n}").mkdir()
        np.savez(source / f"fold{n}" / f"p{n}.npz", data=shown + n, resolution=[1.1, 0.8, 2.0],
                 mask_A=(drawn == 1).astype(np.uint8), **({"mask_B": (drawn == 2).astype(np.uint8)} if n else {}))
    with pytest.raises(DatasetError, match="p0.npz has no affine.*--orientation"):
        make(source)
    target = make(source, orientation="PLS")
    assert target.dataset_json["labels"] == {"background": 0, "A": 1, "B": 2}
    new = SimpleITK.DICOMOrient(SimpleITK.ReadImage(str(target.cases["p1"].mask)), "RAS")
    assert np.array_equal(SimpleITK.GetArrayFromImage(new), SimpleITK.GetArrayFromImage(mask))
    assert np.allclose(new.GetSpacing(), (0.8, 1.1, 2.0))


@pytest.mark.parametrize("model", [False, True])
@pytest.mark.parametrize("kind", ["npz", "npy", "compact"])
def test_masks_alone_find_their_image(source, kind, model):
    codes = "IAL"
    image, mask, _, drawn, affine = screen(codes, 7.0)
    write(image, source / "P1" / "scan.nii.gz")
    regions = {name: xyz(a, codes) if model else a for name, a in (
        ("A", (drawn == 1).astype(np.uint8)), ("B", (drawn == 2).astype(np.uint8)))}
    if kind == "npz":
        np.savez(source / "P1" / "masks.npz", orientation=list(codes), affine=affine, **regions)
    elif kind == "npy":
        (source / "P1" / "npy").mkdir()
        for name, a in (regions | {"orientation": np.array(list(codes))}).items():
            np.save(source / "P1" / "npy" / f"{name}.npy", a)
    else:
        total = xyz(drawn, codes) if model else drawn
        nibabel.save(nibabel.Nifti1Image(np.where(total, 3 - total, 0).astype(np.uint16), affine), source / "P1" / "c.nii.gz")
        (source / "P1" / "c.nii.gz.csv").write_text("Value,Label\n1,B\n2,A\n")
    target = make(source)
    assert sorted(target.dataset_json["labels"]) == ["A", "B", "background"]
    values = target.dataset_json["labels"]
    order = np.array([0, values["A"], values["B"]], np.uint8)
    check(target, image, SimpleITK.Cast(SimpleITK.ChangeLabel(mask, {1: int(order[1]), 2: int(order[2])}), mask.GetPixelID()))


def test_regions_as_nifti_lose_the_running_number_that_siblings_share(source):
    image, mask = case(codes="RAS")
    write(image, source / "P1" / "image.nii.gz")
    for value, name in ((1, "Vastus_Lateralis"), (2, "Soleus")):
        turned = SimpleITK.DICOMOrient(SimpleITK.Cast(mask == value, SimpleITK.sitkUInt16), CODES)
        write(turned, source / "P1" / "nifti" / f"{name}_12.nii.gz")
    target = make(source)
    assert target.dataset_json["labels"] == {"background": 0, "Soleus": 1, "Vastus_Lateralis": 2}
    assert np.array_equal(array(target.cases["P1"].mask) == 2, SimpleITK.GetArrayFromImage(mask) == 1)


def test_a_damaged_file_and_masks_without_image(source):
    np.savez(source / "m.npz", orientation=list("PLS"), A=np.zeros((3, 3, 3)))
    with pytest.raises(DatasetError, match="no image"):
        make(source)
    (source / "m.npz").write_bytes(b"PK")
    with pytest.raises(DatasetError, match="m.npz cannot be read"):
        make(source)
