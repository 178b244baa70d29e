"""Whatever is wrong with a folder is named before anything is written, with what to do; nothing is left behind."""

from __future__ import annotations

import json
import os
from itertools import count
from pathlib import Path

import numpy as np
import pytest
import SimpleITK
from click.testing import CliRunner
from image_folders import array, case, only, tree, volume, write
from PIL import Image

from nnunet_dante.cli import main
from nnunet_dante.datasets.dataset import open_target
from nnunet_dante.datasets.gather import examine, gather
from nnunet_dante.datasets.gather import write as writing
from nnunet_dante.datasets.gather.labels import parse_labels, read_legend
from nnunet_dante.errors import ConfigurationError, DatasetError, StorageError


@pytest.fixture
def source(tmp_path, nnunet_paths):
    folder = tmp_path / "source"
    for n in range(2):
        image, mask = case(n)
        write(image, folder / "images" / f"P{n}.nii.gz")
        write(mask, folder / "labels" / f"P{n}.nii.gz")
    return folder


def run(source, **options):
    said = []
    options = {"labels": ["liver=1,spleen=2"]} | options
    before = tree(source)
    try:
        return gather.gather(source, 123, "Mine", say=said.append, **options), "\n".join(said)
    finally:
        assert tree(source) == before


def nothing_written(source):
    return not list((source.parent / "nnUNet_raw").iterdir())


def refused(source, message, **options):
    with pytest.raises(DatasetError, match=message) as error:
        run(source, **options)
    assert nothing_written(source)
    return str(error.value)


def replace_mask(source, mask):
    return write(mask, source / "labels" / "P1.nii.gz")


def test_a_mask_on_another_grid_needs_leave_to_be_resampled(source):
    _, mask = case(1)
    coarse = SimpleITK.Resample(mask, (7, 12, 9), SimpleITK.Transform(), SimpleITK.sitkNearestNeighbor, (0, 0, 0), (2, 1, 1))
    replace_mask(source, coarse)
    text = refused(source, r"P1: labels/P1.nii.gz lies on another grid than its image \(7 x 12 x 9 voxels, the image has "
                           r"14 x 12 x 9\). --resample-masks")
    assert text.endswith("--without P1")
    _, said = run(source, resample_masks=True)
    assert "Warning: P1: labels/P1.nii.gz was brought to the image's grid" in said
    new = open_target(123).cases["P1"]
    assert array(new.mask).shape == array(new.images[0]).shape
    assert abs(int((array(new.mask) > 0).sum()) - 96) < 40


def test_a_mask_elsewhere_in_space(source):
    replace_mask(source, case(1, origin=(500, 0, 0))[1])
    refused(source, "does not overlap its image in space.*CopyInformation", resample_masks=True)


def test_a_mask_whose_foreground_lies_outside_the_image(source):
    _, mask = case(1, origin=(-10, 0, 0))
    replace_mask(source, mask)
    refused(source, "all it marks lies outside the image", resample_masks=True)


def test_values_that_no_label_names(source):
    replace_mask(source, case(1, values=(1, 7))[1])
    refused(source, r"P1: labels/P1.nii.gz holds 7, which no label names. Add NAME=7 to --labels, or background=7")
    run(source, labels=["liver=1,spleen=2,background=7"])
    assert set(np.unique(array(open_target(123).cases["P1"].mask))) == {0, 1}


def test_values_are_numbered_anew_and_the_ignore_label_is_last(source):
    for n in range(2):
        write(case(n, values=(3, 9))[1], source / "labels" / f"P{n}.nii.gz")
    made, said = run(source, labels=["ignore=3,liver=9"])
    assert made.dataset_json["labels"] == {"background": 0, "liver": 1, "ignore": 2}
    assert sorted(np.unique(array(open_target(123).cases["P0"].mask))) == [0, 1, 2]


def test_floats(source):
    _, mask = case(1)
    replace_mask(source, SimpleITK.Cast(mask, SimpleITK.sitkFloat32))
    run(source, dry_run=True)
    replace_mask(source, 0.4 * SimpleITK.Cast(mask, SimpleITK.sitkFloat32))
    refused(source, r"holds values that are no whole numbers \(0.4, 0.8\)")


def test_no_foreground_is_a_warning_for_one_case_and_the_end_for_all(source):
    replace_mask(source, case(1, values=())[1])
    assert "Warning: P1: its mask has no foreground" in run(source, dry_run=True)[1]
    write(case(0, values=())[1], source / "labels" / "P0.nii.gz")
    refused(source, "No mask has any foreground")


def test_the_same_image_twice_stays_with_one_patient(source):
    for n in range(2):
        write(case(0)[0], source / "images" / f"P{n}.nii.gz")
    made, said = run(source)
    assert "Warning: P1: its image is the same as that of P0" in said
    assert (made.folder / "groups.csv").read_text() == "case,group\nP0,P0\nP1,P0\n"


def test_left_and_right_of_one_patient_stay_together(tmp_path, source):
    for n, side in enumerate(("left", "right")):
        image, mask = case(n + 5)
        write(image, source / "images" / f"A_{side}.nii.gz")
        write(mask, source / "labels" / f"A_{side}.nii.gz")
    made, said = run(source)
    assert "1 patients have several cases: A (A_left, A_right)" in said
    assert "A_left,A\nA_right,A\n" in (made.folder / "groups.csv").read_text()


def test_groups_of_the_user(tmp_path, source):
    file = tmp_path / "g.csv"
    file.write_text("case,patient\nP0,Ann\nP1,Ann\n".replace("case,patient\n", ""))
    made, _ = run(source, groups=file)
    assert (made.folder / "groups.csv").read_text() == "case,group\nP0,Ann\nP1,Ann\n"
    file.write_text("P9,Ann\n")
    with pytest.raises(DatasetError, match="--groups names P9, which is no case. The cases are P0, P1"):
        run(source, groups=file)


def test_damaged_and_cut_files(source):
    path = source / "images" / "P1.nii.gz"
    path.write_bytes(path.read_bytes()[:-200])
    refused(source, r"P1: P1.nii.gz was cut off")
    (source / "labels" / "P1.nii.gz").write_bytes(b"no image")
    write(case(1)[0], path)
    refused(source, r"P1: labels/P1.nii.gz cannot be read \(RuntimeError")
    made, _ = run(source, without=["P1"])
    assert [f.case.name for f in made.facts] == ["P0"]


def test_nan_and_constant_images(source):
    image, _ = case(1, dtype=np.float32)
    write(image * 0, source / "images" / "P1.nii.gz")
    assert "P1: images/P1.nii.gz has the same value everywhere" in run(source, dry_run=True)[1]
    voxels = SimpleITK.GetArrayFromImage(image)
    voxels[3, 3, 3] = np.nan
    (source / "images" / "P1.nii.gz").unlink()
    write(volume(voxels.T), source / "images" / "P1.mha")  # SimpleITK, and so nnU-Net, reads NaN in NIfTI as 0
    refused(source, "NaN or infinite voxels")


def test_channels_that_not_every_case_has(source):
    for n in range(2):
        image, mask = case(n + 7)
        write(image, source / f"B{n}" / f"B{n}_t1.nii.gz")
        write(mask, source / f"B{n}" / f"B{n}_seg.nii.gz")
        for m in range(n + 1):
            write(image, source / f"C{n}{m}" / f"C{n}{m}_t1.nii.gz")
            write(image, source / f"C{n}{m}" / f"C{n}{m}_t2.nii.gz")
            write(mask, source / f"C{n}{m}" / f"C{n}{m}_seg.nii.gz")
    refused(source, "its channels are one image, but most cases have t1, t2")


def test_channels_on_two_grids(source):
    image, mask = case(1)
    write(image, source / "X" / "X_t1.nii.gz")
    write(case(2, spacing=(2, 1, 1))[0], source / "X" / "X_t2.nii.gz")
    write(mask, source / "X" / "X_seg.nii.gz")
    refused(source, "X: X/X_t2.nii.gz lies on another grid than the first channel", without=["P0,P1"])


def test_a_mask_by_name_with_several_values_and_overlaps(tmp_path, nnunet_paths):
    source = tmp_path / "s"
    image, mask = case()
    write(image, source / "P" / "ct.nii.gz")
    write(mask, source / "P" / "seg" / "liver.nii.gz")
    write(only(mask, 2), source / "P" / "seg" / "spleen.nii.gz")
    refused(source, "liver.nii.gz holds several values", labels=[])
    write(SimpleITK.Cast(mask > 0, SimpleITK.sitkUInt8), source / "P" / "seg" / "liver.nii.gz")
    _, said = run(source, labels=["liver,spleen"])
    assert "labels overlap: spleen takes 48 voxels of others" in said
    assert int((array(open_target(123).cases["P"].mask) == 2).sum()) == 48


def test_numbers_without_names_are_never_guessed(source):
    refused(source, "no file says what the numbers mean. Name them: --labels NAME=1,NAME=2", labels=[])


def test_no_masks_no_images_no_folder(tmp_path, nnunet_paths):
    source = tmp_path / "s"
    source.mkdir()
    refused(source, "holds no image that can be read")
    write(case()[0], source / "a.nii.gz")
    refused(source, "1 images, but no mask.*can only be segmented: nnunet-dante predict")
    with pytest.raises(DatasetError, match="is no folder"):
        gather.gather(tmp_path / "none", 1, "A")


def test_masks_without_image_are_named(source):
    write(case()[1], source / "labels" / "Z9.nii.gz")
    assert "Note: 1 masks belong to no image by their names: labels/Z9.nii.gz" in run(source)[1]


def test_a_pattern_says_which_files_are_masks(tmp_path, nnunet_paths):
    source = tmp_path / "s"
    image, mask = case()
    write(image, source / "P1" / "first.nii.gz")
    write(mask, source / "P1" / "second.nii.gz")
    made, said = run(source, masks=["*/second*"])
    assert "told by --masks */second*" in said and made.facts[0].volumes == {"liver": 48, "spleen": 48}


def test_a_colour_mask(tmp_path, nnunet_paths):
    pixels = np.random.default_rng(0).integers(0, 255, (9, 8, 3), np.uint8)
    (tmp_path / "s").mkdir()
    for name in ("a", "a_mask"):
        Image.fromarray(pixels).save(tmp_path / "s" / f"{name}.png")
    refused(tmp_path / "s", "a_mask.png is a colour image; a mask needs one whole number")


def test_files_that_change_while_they_are_read(source, monkeypatch):
    real, times = examine.picture, count(1)  # cases are read at the same time, so that each call must change the file

    def slow(*arguments):
        os.utime(source / "images" / "P1.nii.gz", (time := next(times), time))
        return real(*arguments)
    monkeypatch.setattr(examine, "picture", slow)
    with pytest.raises(DatasetError, match="P1: its files changed while they were read"):
        gather.gather(source, 123, "Mine", labels=["liver=1,spleen=2"], say=lambda _: None)


def test_a_drive_that_fails_once(source, monkeypatch):
    from nnunet_dante.datasets.gather import found
    real, failed = found.read_volume, set()

    def flaky(path):
        if path not in failed:
            failed.add(path)
            raise RuntimeError("stale file handle")
        return real(path)
    monkeypatch.setattr(found, "read_volume", flaky)
    assert len(run(source)[0].facts) == 2


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_stop_while_writing_leaves_nothing(source, monkeypatch, error):
    def stop(*_, **__):
        raise error
    monkeypatch.setattr(writing, "page", stop)
    with pytest.raises((StorageError, KeyboardInterrupt)):
        run(source)
    assert nothing_written(source)


@pytest.mark.parametrize("kind", ["short", "almost nothing", "refused"])
def test_a_disk_that_fills_up_while_a_volume_is_written(source, monkeypatch, kind):
    from nnunet_dante.datasets.gather import volumes
    real = volumes.SimpleITK.WriteImage

    def full(image, path, **options):
        if kind == "refused":
            raise RuntimeError("ITK ERROR: cannot write")
        real(image, path, **options)
        with Path(path).open("rb+") as stream:
            stream.truncate(60 if kind == "almost nothing" else Path(path).stat().st_size - 100)
    write(case(0)[0], source / "images" / "P0.mhd")
    (source / "images" / "P0.nii.gz").unlink()
    monkeypatch.setattr(volumes.SimpleITK, "WriteImage", full)
    with pytest.raises(StorageError, match="P0_0000.nii.gz cannot be written"):
        run(source)
    assert nothing_written(source)


def test_what_is_there_stays(source):
    run(source)
    before = tree(gather._target(123, "Mine", None))
    with pytest.raises(DatasetError, match="is there already"):
        run(source)
    with pytest.raises(ConfigurationError, match="number 123 is taken by Dataset123_Mine"):
        gather.gather(source, 123, "Other")
    assert tree(gather._target(123, "Mine", None)) == before


def test_copies_share_nothing_with_the_source(source):
    made, _ = run(source, copy=True)
    assert (made.folder / "imagesTr" / "P0_0000.nii.gz").stat().st_ino != (source / "images" / "P0.nii.gz").stat().st_ino


@pytest.mark.parametrize(("name", "text"), [
    ("a.csv", "Value,Label\n1,left lung\n2,right lung\n"), ("b.csv", "name;value\nleft lung;1\nright lung;2\n"),
    ("c.json", json.dumps({"background": 0, "left lung": 1, "right lung": 2})),
    ("d.json", json.dumps({"labels": {"1": "left lung", "2": "right lung"}})),
    ("e.txt", '# ITK-SnAP\n    0     0    0    0        0  0  0    "Clear Label"\n'
              '    1   255    0    0        1  1  1    "left lung"\n    2   0  255    0        1  1  1    "right lung"\n')])
def test_tables_of_labels(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    assert read_legend(tmp_path / name) == {1: "left lung", 2: "right lung"}
    assert parse_labels([str(tmp_path / name)]) == [("left lung", 1), ("right lung", 2)]


@pytest.mark.parametrize("text", ["liver=", "=1", "liver=one", "liver=-1"])
def test_labels_of_another_form(text):
    with pytest.raises(DatasetError, match="write NAME=VALUE"):
        parse_labels([text])


def test_the_command(source):
    result = CliRunner().invoke(main, ["dataset", str(source), "-d", "123", "-n", "Mine", "--labels", "liver=1", "spleen=2",
                                       "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "Labels, from --labels: liver = 1, spleen = 2." in result.output
    assert nothing_written(source)
    result = CliRunner().invoke(main, ["dataset", str(source), "other", "-d", "123", "-n", "Mine"])
    assert result.exit_code == 2 and "(other): it is neither the SOURCE nor a label" in result.output


def test_a_link_that_leads_back_ends(tmp_path):
    from nnunet_dante.datasets.gather.found import files_below
    write(volume(np.zeros((3, 3, 3), np.uint8)), tmp_path / "s" / "a.nii.gz")
    (tmp_path / "s" / "again").symlink_to(tmp_path / "s")
    assert [f.relative for f in files_below(tmp_path / "s")] == ["a.nii.gz"]
