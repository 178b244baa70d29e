"""What holds for every mergeable update, whatever its kind, shape and settings; and the update of a kernel's centre."""

from __future__ import annotations

import copy
import json

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from nnunet_dante.errors import ConfigurationError
from nnunet_dante.peft.inject import attach, merge, remove
from nnunet_dante.peft.low_rank import FACTORISATIONS, DecomposedLowRank, LowRankDelta, capped_rank
from nnunet_dante.peft.update import PointwiseDelta, has_centre


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


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3, (1, 3, 5)])
@pytest.mark.parametrize(("groups", "dilation", "mode"), [(1, 1, "zeros"), (2, 1, "reflect"), (1, 2, "zeros")])
def test_it_is_a_parallel_1x1_convolution(dim, stride, kernel, groups, dilation, mode):
    sizes = kernel[:dim] if isinstance(kernel, tuple) else (kernel,) * dim
    conv = getattr(nn, f"Conv{dim}d")(4, 6, sizes, stride=stride, padding=[k // 2 * dilation for k in sizes],
                                      groups=groups, dilation=dilation, padding_mode=mode)
    x = torch.rand(2, 4, *[11] * dim)
    before = conv(x)
    update = PointwiseDelta(conv.weight.shape)
    attach(conv_in := nn.Sequential(conv), {conv: update})
    assert torch.equal(conv_in(x), before)
    nn.init.normal_(update.pointwise)
    parallel = getattr(functional, f"conv{dim}d")(x, update.pointwise.reshape(6, 4 // groups, *[1] * dim),
                                                  stride=stride, groups=groups)
    assert torch.allclose(conv_in(x), before + parallel, atol=1e-5)


def test_even_kernels_and_linear_layers_have_no_centre():
    assert has_centre((8, 4, 3, 1)) and not has_centre((8, 4, 3, 2)) and not has_centre((8, 4))
    with pytest.raises(ConfigurationError, match="all odd"):
        PointwiseDelta((8, 4, 2, 2))
