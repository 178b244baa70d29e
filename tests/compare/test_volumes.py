"""volumes.py: cases inside a report, small enough for a page, and the report without what shows them."""

from __future__ import annotations

import base64
import json
import re
import subprocess

import folds
import nibabel
import numpy as np
import pytest
import SimpleITK

from nnunet_dante.compare import volumes
from nnunet_dante.compare.report import compare
from nnunet_dante.compare.volumes import case_volumes, niivue
from nnunet_dante.errors import ResultError


def test_the_module_is_whole_and_exports_what_the_page_uses(tmp_path):
    pytest.importorskip("ipyniivue")
    text = niivue().decode()
    exported = text.rpartition("export{")[2]
    assert "Niivue" in exported and "SLICE_TYPE" in exported and "loadVolumes" in text and "setColormapLabel" in text
    assert not [line for line in text.splitlines() if line.startswith("import ")], "it needs no other file"
    if subprocess.run(["which", "node"], capture_output=True).returncode == 0:
        (tmp_path / "niivue.mjs").write_text(text)
        subprocess.run(["node", "--check", tmp_path / "niivue.mjs"], check=True)


@pytest.fixture
def case(tmp_path):
    """An image with a mask of 4 x 4 x 4 voxels in it."""
    image = np.random.default_rng(0).normal(size=(30, 40, 20)).astype(np.float32)
    mask = np.zeros(image.shape, np.uint8)
    mask[10:14, 20:24, 8:12] = 2
    for name, voxels in (("i", image), ("m", mask)):
        nibabel.Nifti1Image(voxels, np.diag([1.0, 2.0, 3.0, 1.0])).to_filename(tmp_path / f"{name}.nii.gz")
    return tmp_path / "i.nii.gz", tmp_path / "m.nii.gz"


def content(volume, folder):
    (folder / "shown.nii.gz").write_bytes(base64.b64decode(volume["url"].partition("base64,")[2]))
    return SimpleITK.ReadImage(str(folder / "shown.nii.gz"))


def show(case):
    image, mask = case
    return case_volumes(image, {"truth": mask}, labels={"organ": 2}, title="t")


def test_a_small_case_is_shown_as_a_whole(case, tmp_path):
    block = show(case)
    image, mask = (content(volume, tmp_path) for volume in block.volumes)
    assert [volume["name"] for volume in block.volumes] == ["image", "mask truth"] and "too large" not in block.note
    np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(mask), SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(case[1]))))
    grey = SimpleITK.GetArrayFromImage(image)
    assert (grey.min(), grey.max()) == (0, 255) and image.GetSpacing() == pytest.approx((1, 2, 3))


@pytest.mark.parametrize(("most", "said", "size"), [(1000, "cut to", (6, 6, 6)), (40, "thinned out: every 3 x 2 x 1", (2, 3, 6))])
def test_a_large_case_is_cut_and_thinned_out_where_it_was_and_the_page_says_so(case, tmp_path, monkeypatch, most, said, size):
    monkeypatch.setattr(volumes, "_MOST_VOXELS", most)
    block = show(case)
    image, mask = (content(volume, tmp_path) for volume in block.volumes)
    assert said in block.note and mask.GetSize() == image.GetSize() == size and np.prod(size) <= most
    whole = SimpleITK.ReadImage(str(case[1]))
    first = tuple(int(n) for n in np.argwhere(SimpleITK.GetArrayFromImage(mask).T)[0])
    assert whole[whole.TransformPhysicalPointToIndex(mask.TransformIndexToPhysicalPoint(first))] == 2


def test_a_picture_of_two_dimensions_is_a_volume_of_one_slice(tmp_path):
    for name, voxels in (("i", np.arange(48).reshape(6, 8)), ("m", np.eye(6, 8))):
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(voxels.astype(np.uint8)), str(tmp_path / f"{name}.png"))
    block = show((tmp_path / "i.png", tmp_path / "m.png"))
    assert content(block.volumes[1], tmp_path).GetSize() == (8, 6, 1)


def test_a_mask_on_another_grid_is_refused(case, tmp_path):
    nibabel.Nifti1Image(np.zeros((3, 3, 3), np.uint8), np.eye(4)).to_filename(tmp_path / "m.nii.gz")
    with pytest.raises(ResultError, match="truth has .3, 3, 3. voxels"):
        show(case)


@pytest.fixture
def trained(nnunet_paths, tmp_path):
    folds.write_dataset(tmp_path)
    return tmp_path, [folds.write_fold(tmp_path, f"nnUNetTrainer{name}", fold=fold, shifts=shifts)
                      for name, shifts in (("LoRA", (0, 1)), ("FromScratch", (2, 4))) for fold in (0, 1)]


def test_the_worst_and_the_median_case_are_in_the_report(trained):
    pytest.importorskip("ipyniivue")
    root, paths = trained
    compare(paths, root / "report")
    page = (root / "report" / "report.html").read_text()
    shown = [json.loads(text) for text in re.findall(r'<script type="application/json">(.*)</script>', page)]
    assert [s["label"].split(" case")[0] for s in shown] == ["Worst", "Median"]
    assert [volume["name"] for volume in shown[0]["volumes"]] == ["image", "mask truth", "mask FromScratch", "mask LoRA"]
    assert (root / "report" / "report_files" / "niivue.js").stat().st_size > 1_000_000
    assert "data:application" not in (root / "report" / "report.md").read_text()


def test_without_the_package_the_report_is_whole_and_says_what_to_install(trained, monkeypatch):
    root, paths = trained
    niivue.cache_clear()
    monkeypatch.setattr(volumes, "find_spec", lambda name: None)
    text = compare(paths, root / "report").read_text()
    page = (root / "report" / "report.html").read_text()
    assert text.count('pip install "nnunet-dante[ui]"') == 1 and "application/json" not in page
    assert "dataset901_tiny_worst_case.png" in text and not (root / "report" / "report_files").exists()
