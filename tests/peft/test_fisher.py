"""The Fisher information of a network whose Fisher information is known in closed form, and what it leaves alone."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import nn

from nnunet_dante.errors import ConfigurationError
from nnunet_dante.methods.groups import low_rank_targets
from nnunet_dante.peft.fisher import diagonal_fisher
from nnunet_dante.peft.inject import adapted, inject
from nnunet_dante.peft.penalty import trained_weights


def fisher(network, images, **options):
    weights = trained_weights(network, network.parameters())
    return diagonal_fisher(network, weights, images, **{"rows": [0, 1, 2], "sigmoid": False} | options)


def test_logistic_regression_has_its_closed_form():
    """For p = sigmoid(w x + b): F_w = mean of p (1 - p) x^2 over voxels, F_b = mean of p (1 - p)."""
    network = nn.Conv2d(1, 1, 1)
    with torch.no_grad():
        network.weight.fill_(0.8)
        network.bias.fill_(-0.5)
    torch.manual_seed(0)
    images = [3 * torch.rand(4, 1, 32, 32) for _ in range(100)]
    x = torch.cat(images)
    p = torch.sigmoid(0.8 * x - 0.5)
    expected = (p * (1 - p) * x.square()).mean() / (p * (1 - p)).mean()
    found = fisher(network, images, rows=[0], sigmoid=True)
    assert (found["weight"] / found["bias"]).item() == pytest.approx(expected.item(), rel=0.15)  # 400 draws
    assert (found["weight"] + found["bias"]).item() / 2 == pytest.approx(1)


def test_softmax_of_two_labels_is_the_logistic_regression_of_their_difference():
    torch.manual_seed(0)
    network = nn.Conv2d(1, 2, 1)
    images = [torch.rand(4, 1, 16, 16) for _ in range(20)]
    found = fisher(network, images, rows=[0, 1])
    torch.testing.assert_close(found["weight"][0], found["weight"][1])
    torch.testing.assert_close(found["bias"][0], found["bias"][1])


def test_rows_that_do_not_count_have_no_information_and_the_mean_is_one():
    torch.manual_seed(0)
    network = tiny.plain_unet(2, classes=4)
    found = fisher(network, [torch.rand(2, 1, 16, 16)], rows=[0, 2])
    head = found["decoder.seg_layers.1.weight"]
    assert torch.all(head[[1, 3]] == 0) and torch.all(head[[0, 2]].sum((1, 2, 3)) > 0)
    assert torch.all(found["decoder.seg_layers.0.weight"] == 0)  # a head of deep supervision predicts nothing
    values = torch.cat([v.flatten() for v in found.values()])
    assert values.mean().item() == pytest.approx(1, rel=1e-5) and torch.all(values >= 0)
    assert found.keys() == dict(network.named_parameters()).keys()


def test_images_of_a_batch_count_one_by_one():
    """The square of a batch's mean gradient would be another thing."""
    torch.manual_seed(0)
    network, images = nn.Conv2d(1, 2, 1), torch.rand(6, 1, 8, 8)
    torch.manual_seed(3)
    together = fisher(network, [images], rows=[0, 1])
    torch.manual_seed(3)
    apart = fisher(network, images.split(1), rows=[0, 1])
    assert all(torch.equal(together[k], apart[k]) for k in together)


def test_of_an_adapted_network_it_is_that_of_the_merged_weight():
    plain, low_rank = tiny.plain_unet(2), tiny.plain_unet(2)
    low_rank.load_state_dict(plain.state_dict())
    inject(low_rank, low_rank_targets(low_rank), rank=2)
    images = [torch.rand(2, 1, 16, 16)]
    torch.manual_seed(3)
    expected = fisher(plain, images)
    torch.manual_seed(3)
    found = fisher(low_rank, images)
    assert adapted(low_rank).keys() < found.keys() == expected.keys()
    for name in found:
        torch.testing.assert_close(found[name], expected[name])


def test_it_leaves_the_network_as_it_was():
    network = tiny.plain_unet(2)
    network.encoder.requires_grad_(False).eval()
    before = copy.deepcopy(network.state_dict())
    modes, required = [m.training for m in network.modules()], [p.requires_grad for p in network.parameters()]
    fisher(network, [torch.rand(1, 1, 16, 16)])
    assert all(torch.equal(a, b) for a, b in zip(before.values(), network.state_dict().values()))
    assert [m.training for m in network.modules()] == modes
    assert [p.requires_grad for p in network.parameters()] == required
    assert all(p.grad is None for p in network.parameters())


def test_nothing_to_protect_is_said():
    network = tiny.plain_unet(2)
    for rows, sigmoid in (([0], False), ([], False), ([], True)):
        with pytest.raises(ConfigurationError, match="donor knows none of these labels; use l2_sp"):
            fisher(network, [torch.rand(1, 1, 16, 16)], rows=rows, sigmoid=sigmoid)
    with pytest.raises(ConfigurationError, match="is 0 for every weight"):
        fisher(network, [])
