"""images.py: a file that was cut off is found, and no whole one is called cut."""

from __future__ import annotations

import gzip
import struct

import nibabel
import numpy as np
import pytest

from nnunet_dante.datasets.images import is_cut


@pytest.fixture
def path(tmp_path):
    voxels = np.random.default_rng(0).integers(0, 99, (20, 21, 22)).astype(np.int16)
    nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), tmp_path / "a.nii.gz")
    return tmp_path / "a.nii.gz"


@pytest.mark.parametrize("share", [0.999, 0.9, 0.5, 0.1])
def test_a_shortened_file_is_cut(path, share):
    content = path.read_bytes()
    path.write_bytes(content[:int(share * len(content))])
    assert is_cut(path)


def test_whole_files_are_not_however_they_were_compressed(path):
    assert not is_cut(path)
    content = gzip.decompress(path.read_bytes())
    path.write_bytes(gzip.compress(content[:1000]) + gzip.compress(content[1000:]))  # in parts, as parallel tools do
    assert not is_cut(path)
    path.write_bytes(gzip.compress(content + b"more"))
    assert not is_cut(path)


def test_sizes_that_no_content_can_have_are_cut_whatever_the_end_of_the_file_says(path, tmp_path):
    """A header of 32 TB: a reader would make room for it."""
    content = bytearray(gzip.decompress(path.read_bytes()))
    struct.pack_into("<4h", content, 40, 3, 32767, 32767, 32767)
    packed = gzip.compress(content)[:-4] + struct.pack("<I", (352 + 2 * 32767**3) % 2**32)
    for name, data in (("a.nii.gz", packed), ("a.nii", content)):
        (tmp_path / name).write_bytes(data)
        assert is_cut(tmp_path / name)


def test_images_that_are_not_compressed_are_checked_by_their_size(path, tmp_path):
    content = gzip.decompress(path.read_bytes())
    (tmp_path / "a.nii").write_bytes(content)
    assert not is_cut(tmp_path / "a.nii")
    (tmp_path / "a.nii").write_bytes(content[:-1])
    assert is_cut(tmp_path / "a.nii")


def test_other_files_are_left_to_their_readers(tmp_path):
    for name in ("a.nii.gz", "a.mha"):
        (tmp_path / name).write_bytes(b"nothing")
        assert not is_cut(tmp_path / name)
