"""The size prior: its formula and sign, and that tiles give the gradient of the whole volume."""

from __future__ import annotations

from math import ceil, prod
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_dante.errors import ConfigurationError, TransferError
from nnunet_dante.training.size_prior import (
    SizePrior,
    Volume,
    organ_sizes_mm3,
    penalty,
    tiles,
    unlabelled_volumes,
    voxel_mm3,
)


def softmax(logits):
    return logits.softmax(1)


def volume(shape=(17, 9, 23), *, name="a", voxel_mm3=1.5):
    return Volume(name=name, data=torch.rand(1, *shape, generator=torch.Generator().manual_seed(0)), voxel_mm3=voxel_mm3)


def prior(sizes, *, patch=(8, 8, 8), **options):
    return SizePrior(**{"volumes": [volume()], "sizes_mm3": sizes, "weight": 0.1, "margin": 0.3, "patch": patch,
                        "batch": 4, "probabilities": softmax} | options)


def voxelwise(outputs=3, *, dim=3):
    torch.manual_seed(0)
    return (nn.Conv3d if dim == 3 else nn.Conv2d)(1, outputs, 1)


@pytest.mark.parametrize(("ratio", "value"), [
    (1.0, 0.0), (0.71, 0.0), (1.42, 0.0), (0.5, 0.2), (2.0, 0.2), (0.0, 0.7), (10.0, 0.6), (4.0, 0.45)])
def test_the_formula(ratio, value):
    """max(0, |e| - m) with e = (p* - p) / max(p, p*), for p* = 1."""
    expected = max(0.0, abs(1 - ratio) / max(ratio, 1) - 0.3)
    assert penalty(ratio, 0.3)[0] == pytest.approx(expected) == pytest.approx(value)


@pytest.mark.parametrize("ratio", [0.01, 0.4, 0.69, 0.75, 1.3, 1.5, 3.0, 20.0])
def test_the_slope_is_that_of_the_formula_with_its_scale_held(ratio):
    def formula(p):
        return max(0.0, abs(1 - p) / max(ratio, 1) - 0.3)

    slope = (formula(ratio + 1e-6) - formula(ratio - 1e-6)) / 2e-6
    assert penalty(ratio, 0.3)[1] == pytest.approx(slope, rel=1e-4, abs=1e-6)


def test_the_relative_pull_on_a_prediction_too_large_does_not_fade():
    assert [ratio * penalty(ratio, 0.3)[1] for ratio in (2.0, 20.0, 2000.0)] == pytest.approx([1, 1, 1])


def whole(network, sizes, image, *, probabilities=softmax, weight=0.1, margin=0.3):
    """The formula on the whole volume at once, by autograd."""
    p = probabilities(network(image.data[None])).sum((0, 2, 3, 4)) * image.voxel_mm3
    terms = [torch.relu((target - p[i]).abs() / max(p[i].item(), target) - margin) for i, target in sizes.items()]
    return weight * torch.stack(terms).mean(), [p[i].item() / target for i, target in sizes.items()]


@pytest.mark.parametrize("probabilities", [softmax, torch.sigmoid], ids=["labels", "regions"])
@pytest.mark.parametrize(("batch", "shape"), [(1, (17, 9, 23)), (5, (17, 9, 23)), (4, (8, 8, 8)), (2, (5, 7, 11))])
def test_tiles_give_size_and_gradient_of_the_whole_volume(batch, shape, probabilities):
    network, image = voxelwise(), volume(shape)
    voxels = image.data.numel() * image.voxel_mm3
    sizes = {1: voxels * 0.9, 2: voxels * 0.01}
    loss, ratios = whole(network, sizes, image, probabilities=probabilities)
    expected = dict(zip(network.parameters(), torch.autograd.grad(loss, list(network.parameters()))))
    found_ratios, gradient = prior(sizes, batch=batch, probabilities=probabilities).measure(network, image)
    assert found_ratios == pytest.approx(ratios, rel=1e-5) and ratios[0] < 0.7 and ratios[1] > 1.43
    assert {p for p, _ in gradient} == set(expected)
    for p, g in gradient:
        torch.testing.assert_close(g, expected[p], rtol=1e-4, atol=1e-8)


def test_slices_of_a_2d_network_are_its_tiles():
    network, image = voxelwise(dim=2), volume((5, 9, 11))
    sizes = {1: image.data.numel() * image.voxel_mm3 * 0.9}
    p = softmax(network(image.data.movedim(1, 0)))[:, 1].sum() * image.voxel_mm3
    loss = 0.1 * (1 - p / sizes[1] - 0.3)
    ratios, gradient = prior(sizes, patch=(8, 8)).measure(network, image)
    assert ratios == pytest.approx([float(p) / sizes[1]], rel=1e-5)
    for (_, g), e in zip(gradient, torch.autograd.grad(loss, list(network.parameters()))):
        torch.testing.assert_close(g, e, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(("share", "grows"), [(0.9, True), (0.01, False)])
def test_a_prediction_too_small_grows_and_one_too_large_shrinks(share, grows):
    network, image = tiny.plain_unet(), volume((20, 16, 16))
    terms = prior({1: image.data.numel() * image.voxel_mm3 * share}, patch=(16, 16, 16))
    (before,), gradient = terms.measure(network, image)
    with torch.no_grad():
        for p, g in gradient:
            p.sub_(0.5 * g)
    (after,), _ = terms.measure(network, image)
    assert (before < 0.7) == grows and (before > 1.43) == (not grows)
    assert (after > before) == grows and after != before


def test_within_the_margin_nothing_pulls():
    network, image = voxelwise(), volume()
    size = softmax(network(image.data[None]))[:, 1].sum().item() * image.voxel_mm3
    for ratio, pulls in ((0.71, False), (1.42, False), (0.69, True), (1.44, True)):
        assert bool(prior({1: size / ratio}).measure(network, image)[1]) == pulls


def test_several_organs_share_the_weight():
    network, image = voxelwise(), volume()
    size = image.data.numel() * image.voxel_mm3
    one = prior({1: size}).measure(network, image)[1]
    same_twice = prior({1: size, 2: softmax(network(image.data[None]))[:, 2].sum().item() * image.voxel_mm3})
    for (_, a), (_, b) in zip(one, same_twice.measure(network, image)[1]):
        torch.testing.assert_close(b, a / 2)


def test_frozen_weights_and_modes_are_left_alone():
    network, image = tiny.plain_unet(), volume((16, 16, 16))
    network.encoder.requires_grad_(False).eval()
    modes = [m.training for m in network.modules()]
    _, gradient = prior({1: 1e9}, patch=(16, 16, 16)).measure(network, image)
    assert {p for p, _ in gradient} == {p for p in network.parameters() if p.requires_grad}
    assert [m.training for m in network.modules()] == modes
    assert all(p.grad is None for p in network.parameters())


def test_the_loss_scale_is_divided_out_and_lowered_where_it_overflows():
    network, image = voxelwise(), volume()
    terms = prior({1: 1e9})
    expected = terms.measure(network, image)[1]
    for scale in (2.0**16, 1e38):
        for (_, a), (_, b) in zip(terms.measure(network, image, loss_scale=scale)[1], expected):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-9)


def test_every_volume_has_its_turn_and_epochs_differ():
    volumes = [volume(name=str(i)) for i in range(5)]
    terms = prior({1: 1.0}, volumes=volumes)
    orders = {epoch: [terms.choose(epoch, visit).name for visit in range(5)] for epoch in range(4)}
    assert all(sorted(order) == ["0", "1", "2", "3", "4"] for order in orders.values())
    assert len({tuple(order) for order in orders.values()}) > 1
    assert terms.choose(2, 5) is terms.choose(2, 0)
    assert terms.steps(volume((17, 9, 23))) == 5 and terms.steps(volume((8, 8, 8))) == 1  # 18 tiles, batches of 4


@pytest.mark.parametrize(("shape", "patch"), [
    ((8, 8, 8), (8, 8, 8)), ((16, 8, 24), (8, 8, 8)), ((17, 9, 23), (8, 8, 8)), ((5, 7, 3), (8, 8, 8)),
    ((5, 20, 9), (8, 6, 9)), ((4, 10, 11), (1, 8, 8)), ((1, 1, 1), (4, 4, 4))])
def test_every_voxel_is_counted_once_and_by_no_more_windows_than_needed(shape, patch):
    volume = torch.arange(1, prod(shape) + 1, dtype=torch.float64).reshape(1, *shape)
    found = tiles(shape, patch)
    windows = [tile.cut(volume, patch) for tile in found]
    assert all(w.shape == (1, *patch) for w in windows)
    counted = torch.cat([w[(slice(None), *tile.own)].flatten() for w, tile in zip(windows, found)])
    assert torch.equal(counted.sort().values, volume.flatten())
    assert len(found) == prod(ceil(n / p) for n, p in zip(shape, patch))


def test_a_small_volume_lies_in_the_middle_between_zeros():
    (tile,) = tiles((2, 4), (6, 4))
    window = tile.cut(torch.ones(3, 2, 4), (6, 4))
    assert torch.equal(window.sum((0, 2)), torch.tensor([0.0, 0, 12, 12, 0, 0]))


def test_a_large_volume_is_never_padded():
    volume = torch.ones(1, 17, 9, 23)
    assert all(tile.cut(volume, (8, 8, 8)).min() == 1 for tile in tiles((17, 9, 23), (8, 8, 8)))


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
