"""Gradient checkpointing changes neither a loss, nor a gradient, nor a statistic; it only keeps less."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from tiny import planned
from torch import nn

from nnunet_dante.methods import AdaptFormer, ConvAdapter, FineTune, GradualUnfreezing, LoRA, SpatialAdapter
from nnunet_dante.methods.groups import stages
from nnunet_dante.peft.recompute import _SecondTime, recompute
from nnunet_dante.training.trainers import TRAINERS

METHODS = [LoRA(rank=1, dropout=0.5),
           *(trainer.method.with_overrides({"rank": 1}) for trainer in TRAINERS.values())]


def pair(build, method, epoch: int = 0) -> tuple[nn.Module, nn.Module]:
    """Return a network that a method has adapted, and a copy of it that recomputes."""
    network = build()
    planned(method, network).set_stage(epoch)
    other = copy.deepcopy(network)
    recompute(stages(other))
    return network, other


def step(network: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor | None]]:
    """Return the loss and all gradients of one step; the random numbers are the same in each."""
    torch.manual_seed(1)
    network.zero_grad()
    y = network(x)
    loss = sum((out.float() - 0.5).square().mean() for out in (y if isinstance(y, list | tuple) else [y]))
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in network.named_parameters()}


def assert_same(network: nn.Module, other: nn.Module, x: torch.Tensor) -> None:
    (loss, gradients), random = step(network, x), torch.get_rng_state()
    found_loss, found = step(other, x)
    assert torch.equal(loss, found_loss) and torch.equal(random, torch.get_rng_state())
    assert found.keys() == gradients.keys() and any(g is not None for g in gradients.values())
    for name, gradient in gradients.items():
        assert (gradient is None) == (found[name] is None), name
        assert gradient is None or torch.equal(gradient, found[name]), name
    for (name, buffer), after in zip(network.named_buffers(), other.buffers(), strict=True):
        assert torch.equal(buffer, after), name


@pytest.mark.parametrize("build", [tiny.plain_unet, tiny.residual_unet, tiny.primus])
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_loss_and_gradients_are_the_same_bit_for_bit(method, build):
    if build is tiny.primus and isinstance(method, ConvAdapter | SpatialAdapter):
        pytest.skip("has no place in this transformer")
    assert_same(*pair(build, method), torch.rand(2, 1, 16, 16, 16))


@pytest.mark.parametrize("epoch", [0, 2, 5, 8, 19])
def test_every_stage_of_gradual_unfreezing_is_the_same(epoch):
    assert_same(*pair(tiny.plain_unet, GradualUnfreezing(epochs=20), epoch), torch.rand(1, 1, 16, 16, 16))


def test_a_stage_that_opens_later_recomputes_as_well():
    network, other = tiny.plain_unet(), None
    plan = planned(GradualUnfreezing(epochs=20), network)
    plan.set_stage(0)
    recompute(stages(network))
    step(network, torch.rand(1, 1, 16, 16, 16))
    plan.set_stage(19)
    network.zero_grad()
    other = copy.deepcopy(network)
    for part in stages(other):
        del part.forward  # torch's own again
    assert_same(other, network, torch.rand(1, 1, 16, 16, 16))


def test_mixed_precision_is_the_same():
    with torch.autocast("cpu", torch.bfloat16):
        assert_same(*pair(tiny.plain_unet, LoRA(rank=1)), torch.rand(1, 1, 16, 16, 16))


def small_network(norm: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), norm, nn.Dropout(0.5), nn.LeakyReLU(inplace=True)),
                         nn.Sequential(nn.Conv2d(4, 2, 3, padding=1), nn.Dropout2d(0.5)))


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), nn.BatchNorm2d(4, momentum=None),
                                  nn.InstanceNorm2d(4, track_running_stats=True)], ids=str)
@pytest.mark.parametrize("training", [True, False])
def test_running_statistics_count_a_batch_once_and_dropout_draws_once(norm, training):
    network = copy.deepcopy(small_network(norm)).train(training)
    other = copy.deepcopy(network)
    recompute(other)
    for _ in range(3):
        assert_same(network, other, torch.rand(2, 1, 8, 8))
    assert int(network[0][1].num_batches_tracked) == (3 if training and isinstance(norm, nn.BatchNorm2d) else
                                                      int(other[0][1].num_batches_tracked))


def test_a_second_backward_pass_of_one_forward_pass_gives_the_same_gradients():
    network = small_network(nn.BatchNorm2d(4))
    recompute(network)
    loss, weights = network(torch.rand(2, 1, 8, 8)).square().mean(), list(network.parameters())
    first = torch.autograd.grad(loss, weights, retain_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(loss, weights)))
    assert int(network[0][1].num_batches_tracked) == 1


def test_a_copy_computes_with_its_own_weights_and_the_state_dict_is_as_before():
    network = tiny.plain_unet()
    recompute(stages(network))
    other = copy.deepcopy(network)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    x = torch.rand(1, 1, 16, 16, 16)
    assert all(not y.any() for y in other(x)) and all(y.any() for y in network(x))
    assert list(network.state_dict()) == list(tiny.plain_unet().state_dict())


def kept_bytes(network: nn.Module, x: torch.Tensor) -> int:
    """Return the size of what the forward pass keeps for the backward pass, each storage once, without the weights."""
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        held = network(x)
    assert held
    return sum(kept.values())


@pytest.mark.parametrize("build", [tiny.plain_unet, tiny.residual_unet])
def test_fewer_features_are_kept(build):
    network, other = pair(build, FineTune())
    x = torch.rand(1, 1, 32, 32, 32)
    assert kept_bytes(other, x) < 0.75 * kept_bytes(network, x)


@pytest.mark.parametrize("build", [tiny.plain_unet, tiny.residual_unet])
@pytest.mark.parametrize("method", [FineTune(), LoRA(rank=1), AdaptFormer()], ids=str)
def test_compiled_it_is_one_graph_with_nearly_the_same_gradients(method, build):
    network, other = pair(build, method)
    torch._dynamo.reset()
    compiled, x = torch.compile(other, backend="aot_eager", fullgraph=True), torch.rand(1, 1, 16, 16, 16)
    (loss, gradients), (found_loss, _) = step(network, x), step(compiled, x)
    torch.testing.assert_close(found_loss, loss)
    for (name, parameter), gradient in zip(other.named_parameters(), gradients.values(), strict=True):
        if gradient is not None:
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_compiled_running_statistics_count_a_batch_once():
    network = small_network(nn.BatchNorm2d(4))
    other = copy.deepcopy(network)
    recompute(other)
    torch._dynamo.reset()
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    x = torch.rand(2, 1, 8, 8)
    step(network, x)
    step(compiled, x)
    assert int(other[0][1].num_batches_tracked) == 1
    torch.testing.assert_close(other[0][1].running_var, network[0][1].running_var)


def test_on_mps_the_second_time_draws_the_random_numbers_of_the_first(monkeypatch):
    """Torch restores those of CPU and CUDA. No Apple GPU has run this: the generator is a fake."""
    state = [torch.tensor(1)]
    monkeypatch.setattr("nnunet_dante.peft.recompute._on_mps", lambda part: True)
    monkeypatch.setattr(torch.mps, "get_rng_state", lambda: state[0])
    monkeypatch.setattr(torch.mps, "set_rng_state", lambda new: state.__setitem__(0, new))
    again = _SecondTime(small_network(nn.BatchNorm2d(4)))
    state[0] = torch.tensor(2)
    with again:
        assert state[0] == 1
    assert state[0] == 2
