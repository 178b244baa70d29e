"""strength.py: the ends are the start and the trained network bit for bit, what lies between is a straight line."""

from __future__ import annotations

import pytest
import tiny
import torch
from torch import nn

from nnunet_dante import DanteError
from nnunet_dante.adapters.strength import interpolate


def moved(state, amount=1.0):
    """Another network of the same kind; aliases stay aliases, counters count on."""
    shifted = {}
    for key, tensor in state.items():
        other = shifted.setdefault(id(tensor), tensor + amount if tensor.is_floating_point() else tensor + 7)
        shifted[key] = other
    return {key: shifted[key] for key in state}


@pytest.fixture(params=["plain", "residual", "batch norm"])
def states(request):
    torch.manual_seed(0)
    if request.param == "batch norm":
        network = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    else:
        network = (tiny.plain_unet if request.param == "plain" else tiny.residual_unet)()
    start = network.state_dict()
    return start, moved(start)


@pytest.mark.parametrize("strength", [0, 1])
def test_the_ends_are_bit_for_bit(states, strength):
    start, trained = states
    between = interpolate(start, trained, strength)
    assert list(between) == list(trained)
    assert all(torch.equal(between[key], (start, trained)[strength][key]) for key in trained)


@pytest.mark.parametrize("strength", [0.2, 0.5, 0.9, 1.5])
def test_between_lies_a_straight_line_and_counters_are_the_trained_ones(states, strength):
    start, trained = states
    for key, tensor in interpolate(start, trained, strength).items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, start[key] + strength, rtol=0, atol=1e-5)
        else:
            assert torch.equal(tensor, trained[key])


def test_keys_of_one_tensor_still_share_it(states):
    between = interpolate(*states, 0.3)
    pointers = {key: tensor.data_ptr() for key, tensor in between.items() if tensor.numel()}
    expected = {key: tensor.data_ptr() for key, tensor in states[1].items() if tensor.numel()}
    assert len(set(pointers.values())) == len(set(expected.values()))


@pytest.mark.parametrize("strength", [-0.1, float("nan"), float("inf")])
def test_a_strength_out_of_range_is_refused_with_its_value(states, strength):
    with pytest.raises(DanteError, match=f"strength is {strength}"):
        interpolate(*states, strength)


def test_other_networks_are_refused_by_name(states):
    start, trained = states
    name = next(iter(trained))
    with pytest.raises(DanteError, match="different networks"):
        interpolate(start, {k: v for k, v in trained.items() if k != name}, 0.5)
    with pytest.raises(DanteError, match=name.replace(".", r"\.")):
        interpolate(start, {**trained, name: trained[name][:1]}, 0.5)
