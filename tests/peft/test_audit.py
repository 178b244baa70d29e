import copy
import random

import pytest
import tiny
import torch
from torch import nn

from nnunet_dante.errors import GradientAuditError
from nnunet_dante.methods import AdaptFormer, HeadOnly, LoRA
from nnunet_dante.methods.groups import low_rank_targets
from nnunet_dante.peft.audit import audit_gradients, audit_on_small_patch, smallest_patch
from nnunet_dante.peft.inject import inject

X = torch.rand(1, 1, 16, 16, 16)


def test_it_passes_and_counts_on_an_adapted_network():
    network = tiny.plain_unet()
    inject(network, low_rank_targets(network), rank=2)
    report = audit_gradients(network, X)
    assert report.trainable == sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert report.total == sum(p.numel() for p in network.parameters())
    assert f"{report.trainable:,} of {report.total:,}" in str(report)


def test_it_finds_an_adapter_on_an_alias_that_forward_does_not_use():
    """What wrappers that replace modules by name do to nnU-Net: `.conv` is one name, forward uses another."""
    network = tiny.plain_unet()
    block = network.encoder.stages[1][0].convs[0]
    block.conv = nn.Sequential(copy.deepcopy(block.conv))
    with pytest.raises(GradientAuditError, match=r"encoder.stages.1.0.convs.0.conv.0.weight"):
        audit_gradients(network, X)


def test_it_finds_heads_that_are_not_computed():
    with pytest.raises(GradientAuditError, match=r"decoder.seg_layers.0.weight"):
        audit_gradients(tiny.plain_unet(deep_supervision=False), X)


def test_it_finds_infinite_weights():
    network = tiny.plain_unet()
    with torch.no_grad():
        network.decoder.seg_layers[-1].weight.fill_(float("inf"))
    with pytest.raises(GradientAuditError, match="not finite"):
        audit_gradients(network, X)


def sizes_seen(network: nn.Module) -> list[tuple[int, ...]]:
    """What will be run through the network, batch and channels included."""
    seen = []
    network.register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape)))
    return seen


@pytest.mark.parametrize("method", [LoRA(rank=1), LoRA(rank=1, encoder=False), HeadOnly(), AdaptFormer()], ids=repr)
@pytest.mark.parametrize(("build", "patch", "small"), [
    (tiny.plain_unet, (64, 64, 64), (8, 4, 4)), (tiny.residual_unet, (64, 64, 64), (8, 4, 4)),
    (lambda: tiny.plain_unet(2), (256, 128), (8, 4)), (lambda: tiny.plain_unet(3, strides=[1, [1, 2, 2], [1, 2, 2]]),
                                                       (16, 64, 64), (2, 4, 4))])
def test_a_small_patch_gives_the_verdict_of_the_whole_one(method, build, patch, small):
    network = build()
    method.adapt(network)
    method.plan(network).restrict(network)
    seen = sizes_seen(network)
    report = audit_on_small_patch(network, 1, patch)
    assert seen == [(1, 1, *small)]
    assert report == audit_gradients(network, torch.rand(1, 1, *(min(n, 32) for n in patch)))


def test_a_small_patch_finds_what_the_whole_one_finds():
    network = tiny.plain_unet()
    block = network.encoder.stages[1][0].convs[0]
    block.conv = nn.Sequential(copy.deepcopy(block.conv))
    with pytest.raises(GradientAuditError, match=r"encoder.stages.1.0.convs.0.conv.0.weight"):
        audit_on_small_patch(network, 1, (16, 16, 16))


def test_networks_that_take_one_size_only_are_audited_with_it():
    network = tiny.primus()
    seen = sizes_seen(network)
    audit_on_small_patch(network, 1, (16, 16, 16))
    assert seen == [(1, 1, 16, 16, 16)]
    network = tiny.plain_unet(2)
    network.register_forward_pre_hook(lambda _, inputs: inputs[0].reshape(1, 1, 16, 16))
    seen = sizes_seen(network)
    audit_on_small_patch(network, 1, (16, 16))
    assert seen[-1] == (1, 1, 16, 16)


def test_a_patch_that_is_small_already_is_taken_as_it_is():
    assert smallest_patch(tiny.plain_unet(2), (4, 8)) == (4, 8) and smallest_patch(tiny.plain_unet(2), (4, 4)) == (4, 4)


def test_nothing_to_train_is_an_error():
    network = tiny.plain_unet().requires_grad_(False)
    with pytest.raises(GradientAuditError, match="nothing"):
        audit_gradients(network, X)


def test_it_leaves_everything_as_it_was():
    network = tiny.plain_unet()
    network.encoder.eval()
    before = copy.deepcopy(network.state_dict())
    modes = [m.training for m in network.modules()]
    states = torch.get_rng_state(), random.getstate()
    audit_gradients(network, X)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), network.state_dict().values()))
    assert [m.training for m in network.modules()] == modes
    assert all(p.grad is None for p in network.parameters())
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
