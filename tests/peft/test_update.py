"""What holds for every mergeable update, whatever its kind, shape and settings."""

from __future__ import annotations

import copy
import json

import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from nnunet_dante.peft.decomposed import DecomposedLowRank
from nnunet_dante.peft.inject import attach, merge, remove
from nnunet_dante.peft.low_rank import FACTORISATIONS, LowRankDelta, capped_rank
from nnunet_dante.peft.pointwise import PointwiseDelta, has_centre


@st.composite
def layers(draw):
    """A convolution of 1 to 3 dimensions, transposed or not, in groups or not, or a linear layer."""
    torch.manual_seed(draw(st.integers(0, 99)))
    dim, groups = draw(st.integers(0, 3)), draw(st.sampled_from([1, 2]))
    channels = [groups * draw(st.integers(1, 6)) for _ in range(2)]
    if dim == 0:
        return nn.Linear(*channels)
    kernel = draw(st.lists(st.sampled_from([1, 2, 3]), min_size=dim, max_size=dim))
    transposed = draw(st.sampled_from(["", "Transpose"]))
    return getattr(nn, f"Conv{transposed}{dim}d")(*channels, tuple(kernel), groups=groups)


@st.composite
def updates(draw):
    """A layer and an update of its weight."""
    layer = draw(layers())
    shape, kind = layer.weight.shape, draw(st.sampled_from([LowRankDelta, DecomposedLowRank, PointwiseDelta]))
    if kind is PointwiseDelta:
        assume(has_centre(shape))
        return layer, PointwiseDelta(shape)
    options = {"rank": draw(st.integers(1, 8)), "alpha": draw(st.floats(0.1, 32)), "factorisation": draw(st.sampled_from(FACTORISATIONS)),
               "rank_stabilised": draw(st.booleans())}
    assume(capped_rank(shape, options["rank"], factorisation=options["factorisation"]))
    if kind is DecomposedLowRank:
        options |= {"groups": getattr(layer, "groups", 1), "transposed": getattr(layer, "transposed", False)}
    return layer, kind(shape, **options)


def randomised(update):
    for factor in update.factors().values():
        nn.init.normal_(factor)
    return update


@given(updates())
def test_it_starts_and_starts_again_as_a_no_op_bit_for_bit(made):
    layer, update = made
    assert torch.equal(update.merged(layer.weight), layer.weight)
    randomised(update).reset()
    assert torch.equal(update.merged(layer.weight), layer.weight)


@given(updates())
def test_kind_settings_and_factors_are_all_there_is_to_it(made):
    """What an adapter file holds makes the same weight again, bit for bit."""
    layer, update = made
    randomised(update)
    settings = json.loads(json.dumps(update.settings()))
    again = type(update)(layer.weight.shape, **settings)
    again.load_state_dict(update.factors())
    assert torch.equal(again.merged(layer.weight), update.merged(layer.weight))
    assert set(update.factors()) == set(update.FACTORS) == set(dict(update.named_parameters()))


@given(updates())
def test_merging_keeps_the_function_and_removing_brings_the_base_back(made):
    layer, update = made
    network = nn.Sequential(layer)
    base = copy.deepcopy(network.state_dict())
    attach(network, {layer: randomised(update)})
    inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
    x = torch.randn(2, inputs, *[4] * (layer.weight.ndim - 2))
    removed, merged = copy.deepcopy(network), copy.deepcopy(network)
    remove(removed)
    merge(merged)
    assert all(torch.equal(removed.state_dict()[key], base[key]) for key in base)
    assert list(merged.state_dict()) == list(base) == list(network.state_dict())
    assert all(torch.equal(merged.state_dict()[key], network.state_dict()[key]) for key in base)
    assert torch.equal(merged(x), network.eval()(x))


@given(layers(), st.integers(1, 8), st.floats(0.1, 32), st.sampled_from(FACTORISATIONS))
def test_a_low_rank_update_is_linear_in_each_factor_and_cheaper_than_the_weight(layer, rank, alpha, factorisation):
    shape = layer.weight.shape
    if not capped_rank(shape, rank, factorisation=factorisation):
        return
    one, two, both = (randomised(LowRankDelta(shape, rank=rank, alpha=alpha, factorisation=factorisation)) for _ in range(3))
    assert sum(f.numel() for f in one.factors().values()) < layer.weight.numel()
    for shared, added in (("lora_A", "lora_B"), ("lora_B", "lora_A")):
        with torch.no_grad():
            getattr(two, shared).copy_(getattr(one, shared))
            getattr(both, shared).copy_(getattr(one, shared))
            getattr(both, added).copy_(getattr(one, added) + getattr(two, added))
        assert torch.allclose(both.delta(), one.delta() + two.delta(), rtol=1e-4, atol=1e-3 * alpha)
