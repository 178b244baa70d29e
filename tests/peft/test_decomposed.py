from __future__ import annotations

import pytest
import torch
from torch import nn

from nnunet_dante.peft.decomposed import DecomposedLowRank

LAYERS = [nn.Conv3d(4, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.ConvTranspose3d(8, 4, 2, 2),
          nn.ConvTranspose2d(8, 8, 2, 2, groups=2), nn.Linear(6, 5)]


def update_of(layer: nn.Module) -> DecomposedLowRank:
    return DecomposedLowRank(layer.weight.shape, rank=1, groups=getattr(layer, "groups", 1),
                             transposed=isinstance(layer, (nn.ConvTranspose2d, nn.ConvTranspose3d)))


def outputs(layer: nn.Module) -> int:
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels


def channel_norms(layer: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """The norm of what each output channel reads, measured by its response to single ones at every input."""
    if isinstance(layer, nn.Linear):
        return weight.norm(dim=1)
    dim, size = weight.ndim - 2, max(weight.shape[2:])
    convolve = getattr(nn.functional, f"conv{'_transpose' if layer.transposed else ''}{dim}d")
    energy = 0
    for channel in range(layer.in_channels):
        x = torch.zeros(1, layer.in_channels, *[2 * size - 1] * dim)
        x[(0, channel, *[size - 1] * dim)] = 1
        y = convolve(x, weight, stride=1, groups=layer.groups)
        energy = energy + y.square().sum(dim=[0, *range(2, y.ndim)])
    return energy.sqrt()


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_it_starts_as_the_base_bit_for_bit_and_reset_leads_back(layer):
    update = update_of(layer)
    assert torch.equal(update(layer.weight), layer.weight)
    for factor in update.factors().values():
        nn.init.normal_(factor)
    assert not torch.equal(update(layer.weight), layer.weight)
    update.reset()
    assert torch.equal(update(layer.weight), layer.weight)


@pytest.mark.parametrize("layer", LAYERS, ids=str)
def test_the_magnitude_alone_sets_the_norm_of_each_output_channel(layer):
    """Whatever A and B do to the direction; mind where transposed convolutions and groups keep their outputs."""
    update = update_of(layer)
    for factor in update.factors().values():
        nn.init.normal_(factor)
    weight = layer.weight.detach()
    assert update.magnitude.shape == (outputs(layer),)
    wanted = update.magnitude.detach().abs() * channel_norms(layer, weight)
    assert torch.allclose(channel_norms(layer, update(weight).detach()), wanted, rtol=1e-4)


def test_the_norm_is_a_constant_in_backward():
    layer = nn.Conv2d(4, 8, 3)
    update = update_of(layer)
    nn.init.normal_(update.lora_B)
    weight = layer.weight.detach()
    constant = (update.magnitude * update._norms(weight) / update._norms(weight + update.delta())).detach()
    target = torch.rand_like(weight)
    (update(weight) * target).sum().backward()
    found = update.lora_B.grad.clone()
    update.lora_B.grad = None
    ((weight + update.delta()) * constant[:, None, None, None] * target).sum().backward()
    assert torch.allclose(found, update.lora_B.grad, rtol=1e-4)


def test_a_channel_of_zeros_gives_no_nan():
    update = DecomposedLowRank((8, 8, 3), rank=2)
    weight = torch.rand(8, 8, 3)
    weight[2] = 0
    assert torch.equal(update(weight), weight)
    nn.init.normal_(update.lora_B)
    merged = update(weight)
    merged.sum().backward()
    assert torch.isfinite(merged).all() and all(torch.isfinite(f.grad).all() for f in update.factors().values())
