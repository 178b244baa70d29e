"""plots.py: pictures of the right shape and colours, and the user's matplotlib left as it was."""

from __future__ import annotations

import subprocess
import sys

import nibabel
import numpy as np
import pytest

from nnunet_dante.compare.plots import label_values, overlays, upright, viewing_plane
from nnunet_dante.compare.sources import CaseFiles


def colours_of(file) -> set[str]:
    from matplotlib.image import imread

    pixels = (imread(file)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    return {f"#{r:02X}{g:02X}{b:02X}" for r, g, b in np.unique(pixels, axis=0)}


def test_only_labels_that_a_mask_holds_are_painted_and_outlined(tmp_path):
    image = np.random.default_rng(0).normal(size=(20, 16, 4))
    mask = np.zeros(image.shape, int)
    mask[5:15, 4:12, 1:3] = 2
    overlays(image, {"truth": mask, "empty": np.zeros_like(mask)}, tmp_path / "o.png", slices=[0, 2],
             labels={"background": 0, "absent": 1, "organ": 2}, spacing_mm=(1, 2, 3), captions={"empty": "Dice 0"})
    from matplotlib.image import imread

    outline = (imread(tmp_path / "o.png")[..., :3] * 255).round().astype(int)
    outline = (outline == [0x00, 0x72, 0xB2]).all(-1)  # COLOURS[1]
    rows, columns = np.nonzero(outline[: int(0.9 * len(outline))])  # without the legend
    assert rows.min() > 0.5 * len(outline) - 5  # slice 0 has no label, slice 2 is the second row
    third = outline.shape[1] / 3
    assert third < columns.min() and columns.max() < 2 * third  # the column "truth" alone


def test_an_outline_lies_where_its_label_is(tmp_path):
    image = np.zeros((20, 20, 1))
    image[0] = 1
    mask = np.zeros(image.shape, int)
    mask[12:18, 2:6, 0] = 1  # right, top
    overlays(image, {"m": mask}, tmp_path / "o.png", labels={"background": 0, "organ": 1}, slices=[0],
             spacing_mm=(1, 1, 1))
    from matplotlib.image import imread

    picture = (imread(tmp_path / "o.png")[..., :3] * 255).round().astype(int)
    rows, columns = np.nonzero((picture == [0xE6, 0x9F, 0x00]).all(-1)[: int(0.8 * len(picture))])
    assert columns.mean() > 0.75 * picture.shape[1] and rows.mean() < 0.45 * len(picture)


def test_drawing_leaves_the_backend_alone_and_importing_draws_in_nothing(tmp_path):
    code = ("import os, sys; os.environ.pop('MPLBACKEND', None)\n"
            "import nnunet_dante.compare.plots as plots\n"
            "assert 'matplotlib' not in sys.modules\n"
            "import matplotlib; matplotlib.use('svg')\n"
            "import numpy as np\n"
            f"plots.overlays(np.zeros((4, 4, 1)), {{}}, r'{tmp_path / 'x.png'}', labels={{'a': 1}}, slices=[0], "
            "spacing_mm=(1, 1, 1))\n"
            "assert matplotlib.get_backend() == 'svg' and 'matplotlib.pyplot' not in sys.modules\n")
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("codes", "spacing_mm", "plane"), [
    ("RAS", (1, 1, 3), "LPS"), ("RAS", (3, 1, 1), "PIL"), ("RAS", (1, 3, 1), "LIP"), ("RAS", (1, 1, 1), "LPS"),
    ("ASL", (1, 1, 4), "PIL"), ("RAS", (1, 1, 1.2), "LPS")])
def test_slices_are_shown_in_the_plane_in_which_they_were_taken(tmp_path, codes, spacing_mm, plane):
    axes = {"R": (1, 0, 0), "A": (0, 1, 0), "S": (0, 0, 1), "L": (-1, 0, 0)}
    affine = np.eye(4)
    affine[:3, :3] = np.transpose([np.multiply(axes[code], mm) for code, mm in zip(codes, spacing_mm)])
    nibabel.Nifti1Image(np.zeros((4, 5, 6), np.uint8), affine).to_filename(tmp_path / "v.nii")
    assert viewing_plane(tmp_path / "v.nii") == plane
    assert upright(tmp_path / "v.nii", plane)[1][2] == pytest.approx(max(spacing_mm) if plane != "LPS" else spacing_mm[2])


def test_regions_are_painted_by_the_value_that_nnunet_writes_and_labels_may_be_text():
    regions = {"labels": {"background": 0, "whole": [1, 2], "core": [2], "ignore": 3}, "regions_class_order": [1, 2]}
    assert label_values(CaseFiles(dataset="d", content=regions)) == {"whole": 1, "core": 2}
    assert label_values(CaseFiles(dataset="d", content={"labels": {"background": "0", "a": "1"}})) == {"a": 1}
    assert label_values(CaseFiles(dataset="d", content={"labels": {"background": 0, "a": [1]}})) == {"a": 1}


def test_the_order_of_regions_says_nothing_where_no_label_is_a_region():
    content = {"labels": {"background": 0, "a": 2, "b": 1}, "regions_class_order": [1, 2]}
    assert label_values(CaseFiles(dataset="d", content=content)) == {"a": 2, "b": 1}


def test_cubic_voxels_are_seen_along_the_shortest_extent_of_what_is_labelled(tmp_path):
    for axis, plane in enumerate(("PIL", "LIP", "LPS")):
        mask = np.zeros((9, 9, 9), np.uint8)
        mask[tuple(slice(4, 5) if n == axis else slice(1, 8) for n in range(3))] = 1
        nibabel.Nifti1Image(mask, np.eye(4)).to_filename(tmp_path / "m.nii")
        assert viewing_plane(tmp_path / "m.nii") == plane
