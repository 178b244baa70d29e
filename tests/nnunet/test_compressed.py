"""compressed.py: a file that was cut off is found, and no whole one is called cut."""

from __future__ import annotations

import gzip

import nibabel
import numpy as np
import pytest

from nnunet_dante.nnunet.compressed import is_cut


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


def test_other_files_are_left_to_their_readers(tmp_path):
    for name in ("a.nii.gz", "a.mha"):
        (tmp_path / name).write_bytes(b"nothing")
        assert not is_cut(tmp_path / name)
