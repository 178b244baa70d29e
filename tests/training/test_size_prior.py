"""The size prior: its formula and sign, and that tiles give the gradient of the whole volume."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from nnunet_dante.training.size_prior import SizePrior, Volume, penalty


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
