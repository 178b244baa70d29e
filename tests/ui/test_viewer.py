"""The viewer: every volume reaches it as NIfTI."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

pytest.importorskip("nicegui")
import SimpleITK
from nicegui.testing.user_simulation import user_simulation

from nnunet_dante.compare.volumes import niivue
from nnunet_dante.ui import viewer
from nnunet_dante.ui.roots import Roots
from nnunet_dante.ui.viewer import add_viewer


def test_volumes_are_sent_as_they_are_or_as_nifti(tmp_path):
    voxels = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    for name in ("a.nii.gz", "b.nrrd", "c.mha"):
        SimpleITK.WriteImage(SimpleITK.GetImageFromArray(voxels), str(tmp_path / name))
    SimpleITK.WriteImage(SimpleITK.GetImageFromArray(voxels[0].astype(np.uint8)), str(tmp_path / "d.png"))
    (tmp_path / "e.nrrd").write_text("damaged")

    async def go():
        async with user_simulation(root=lambda: None) as user:
            add_viewer(Roots.given([tmp_path]))
            get = user.http_client.get
            answer = await get(f"/volume{tmp_path}/a.nii.gz")
            assert answer.content == (tmp_path / "a.nii.gz").read_bytes() and answer.headers["cache-control"] == "no-cache"
            for name, wanted in (("b.nrrd", voxels), ("c.mha", voxels), ("d.png", voxels[:1])):
                (tmp_path / "got.nii").write_bytes((await get(f"/volume{tmp_path}/{name}")).content)
                np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(tmp_path / "got.nii"))), wanted)
            assert (await get(f"/volume{tmp_path}/e.nrrd")).status_code == 422
            assert (await get("/niivue.js")).content == niivue()

    asyncio.run(go())


def test_a_browser_without_a_graphics_card_gets_fewer_voxels_of_a_large_volume(tmp_path, monkeypatch):
    monkeypatch.setattr(viewer, "_MOST_DRAWN", 100)
    voxels = np.arange(6 * 7 * 8, dtype=np.int16).reshape(6, 7, 8)  # (z, y, x)
    image = SimpleITK.GetImageFromArray(voxels)
    image.SetSpacing((0.5, 0.5, 3.0))
    for name in ("large.nii.gz", "large.nrrd"):
        SimpleITK.WriteImage(image, str(tmp_path / name))
    SimpleITK.WriteImage(image[:3, :3, :3], str(tmp_path / "small.nii.gz"))
    (tmp_path / "damaged.nii.gz").write_bytes(b"no volume")

    async def go():
        async with user_simulation(root=lambda: None) as user:
            add_viewer(Roots.given([tmp_path]))
            get = user.http_client.get
            for name in ("large.nii.gz", "large.nrrd"):
                answer = await get(f"/volume{tmp_path}/{name}?slow=1")
                assert answer.headers["x-reduced"] == "4 x 4 x 6 of 8 x 7 x 6"
                (tmp_path / "got.nii").write_bytes(answer.content)
                got = SimpleITK.ReadImage(str(tmp_path / "got.nii"))
                np.testing.assert_array_equal(SimpleITK.GetArrayFromImage(got), voxels[:, ::2, ::2])
                assert got.GetSpacing() == (1.0, 1.0, 3.0) and got.GetOrigin() == image.GetOrigin()
                assert "x-reduced" not in (await get(f"/volume{tmp_path}/{name}")).headers
            assert (await get(f"/volume{tmp_path}/small.nii.gz?slow=1")).content == (tmp_path / "small.nii.gz").read_bytes()
            assert (await get(f"/volume{tmp_path}/damaged.nii.gz?slow=1")).status_code == 422

    asyncio.run(go())
