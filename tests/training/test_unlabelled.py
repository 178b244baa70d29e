"""Images without masks as the network sees them, and organ sizes in mm^3, for any spacing and axis order."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import tiny
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

from nnunet_dante.errors import ConfigurationError, TransferError
from nnunet_dante.training.unlabelled import organ_sizes_mm3, unlabelled_volumes, voxel_mm3


@pytest.mark.parametrize(("configuration", "spacing", "volume"), [("3d_fullres", (2.0, 1.5, 1.0), 3.0),
                                                                  ("2d", (2.0, 1.5, 1.0), 4.0 * 1.5)])
@pytest.mark.parametrize("transpose", [(0, 1, 2), (2, 0, 1)])
def test_a_voxel_has_the_plans_spacing_and_2d_the_images_own_between_slices(configuration, spacing, volume, transpose):
    plans = PlansManager(tiny.plans("Dataset901_T", spacing_mm=spacing, transpose=transpose))
    own = np.empty(3)
    own[list(transpose)] = (4.0, 0.7, 0.7)  # what lies first for the network has 4 mm
    assert voxel_mm3({"spacing": list(own)}, plans, plans.get_configuration(configuration)) == pytest.approx(volume)


def test_images_are_preprocessed_as_for_prediction_and_sizes_do_not_depend_on_their_spacing(tmp_path):
    """The same box in images of 1 mm and of 2 mm: equal in mm^3 once both have the plans' spacing."""
    plans = PlansManager(tiny.plans("Dataset901_T"))
    configuration = plans.get_configuration("3d_fullres")
    shapes = {"fine": ((20, 24, 18), 1.0), "coarse": ((10, 12, 9), 2.0)}
    for i, (shape, mm) in enumerate(shapes.values()):
        tiny.write_raw_dataset(tmp_path, dataset_id=901 + i, shape=shape, spacing_mm=(mm,) * 3, n_cases=2, values=(1,))
    content = tiny.dataset_json()
    sizes = []
    for i in range(2):
        volumes = unlabelled_volumes(tmp_path / f"Dataset{901 + i}_Tiny/imagesTr", plans=plans,
                                     configuration=configuration, dataset_json=content)
        assert [v.name for v in volumes] == ["case_000", "case_001"]
        assert all(v.data.shape == (1, 18, 24, 20) and v.voxel_mm3 == 1 for v in volumes)
        assert all(abs(float(v.data.mean())) < 0.1 for v in volumes)  # z-scored before it is resampled
        sizes.append(volumes[0].data.numel() * volumes[0].voxel_mm3)
    assert sizes[0] == sizes[1] == 20 * 24 * 18


def test_several_channels_belong_to_one_image_and_a_missing_one_is_named(tmp_path):
    plans = PlansManager(tiny.plans("Dataset901_T", channels=2))
    content = tiny.dataset_json(channel_names={"0": "T1", "1": "T2"})
    name = tiny.write_raw_dataset(tmp_path, channel_names=content["channel_names"], n_cases=2)
    folder = tmp_path / name / "imagesTr"
    options = {"plans": plans, "configuration": plans.get_configuration("3d_fullres"), "dataset_json": content}
    assert [v.data.shape[0] for v in unlabelled_volumes(folder, **options)] == [2, 2]
    with pytest.raises(ConfigurationError, match="image case_000 in .* has 2 channels, the data set 1"):
        unlabelled_volumes(folder, plans=plans, configuration=options["configuration"], dataset_json=tiny.dataset_json())


def test_an_image_that_cannot_be_read_is_named(tmp_path):
    plans = PlansManager(tiny.plans("Dataset901_T"))
    folder = tmp_path / tiny.write_raw_dataset(tmp_path, n_cases=2) / "imagesTr"
    (folder / "case_001_0000.nii.gz").write_bytes(b"no image")
    with pytest.raises(TransferError, match="imagesTr: image case_001 cannot be read"):
        unlabelled_volumes(folder, plans=plans, configuration=plans.get_configuration("3d_fullres"),
                           dataset_json=tiny.dataset_json())


@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_without_images_is_named(tmp_path, exists):
    folder = tmp_path / "imagesTs"
    if exists:
        folder.mkdir()
        (folder / "notes.txt").write_text("CASE_0000")
    plans = PlansManager(tiny.plans("Dataset901_T"))
    with pytest.raises(ConfigurationError, match="imagesTs holds no CASE_0000.nii.gz; put them there, name another"):
        unlabelled_volumes(folder, plans=plans, configuration=plans.get_configuration("3d_fullres"),
                           dataset_json=tiny.dataset_json())


def test_sizes_of_labels_and_regions_are_counted_from_the_masks():
    mask = np.zeros((1, 4, 4, 4), np.int8)
    mask[0, 0], mask[0, 1, 0], mask[0, 3, 3, 3] = -1, 1, 2  # -1: outside of the body, as nnU-Net writes it
    properties = {"spacing": [9.0, 9.0, 9.0]}
    dataset = SimpleNamespace(identifiers=["a", "b"],
                              load_case=lambda case: (None, mask if case == "a" else 0 * mask, None, properties))
    plans = PlansManager(tiny.plans("Dataset901_T", spacing_mm=(2.0, 1.0, 1.0)))
    found = organ_sizes_mm3(dataset, [1, 2, (1, 2), 3], plans=plans, configuration=plans.get_configuration("3d_fullres"))
    assert found.tolist() == [[8, 2, 10, 0], [0, 0, 0, 0]]
