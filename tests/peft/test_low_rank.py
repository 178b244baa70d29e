"""LoRA's and DoRA's arithmetic."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnunet_dante.errors import ConfigurationError
from nnunet_dante.peft.low_rank import DecomposedLowRank, LowRankDelta, capped_rank


@pytest.mark.parametrize("shape", [(6, 4), (6, 4, 3), (6, 4, 3, 1), (6, 4, 3, 3, 2)])
def test_channel_delta_is_the_formula_at_every_kernel_offset(shape):
    delta = LowRankDelta(shape, rank=2, alpha=6.0)
    torch.nn.init.normal_(delta.lora_B)
    flat = delta.delta().reshape(shape[0], shape[1], -1)
    for k in range(flat.shape[-1]):
        assert torch.allclose(flat[:, :, k], 3.0 * delta.lora_A[k] @ delta.lora_B[k], atol=1e-6)


def test_flat_delta_has_rank_r_as_a_matrix():
    delta = LowRankDelta((8, 6, 3, 3, 3), rank=2, alpha=2.0, factorisation="flat")
    torch.nn.init.normal_(delta.lora_B)
    matrix = delta.delta().reshape(8, -1)
    assert torch.linalg.matrix_rank(matrix) == 2
    assert torch.equal(matrix, delta.lora_A @ delta.lora_B)


@pytest.mark.parametrize("factorisation", ["channel", "flat"])
def test_it_starts_as_zero_and_reset_makes_it_zero_without_random_numbers(factorisation):
    delta = LowRankDelta((8, 8, 3, 3), rank=2, factorisation=factorisation)
    assert not delta.delta().any()
    torch.nn.init.normal_(delta.lora_B)
    state = torch.get_rng_state()
    delta.reset()
    assert not delta.delta().any() and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("shape", [(32, 1, 3, 3, 3), (32, 16, 3, 3, 3), (4, 4, 1, 1), (320, 320, 3, 3, 3), (7, 5)])
@pytest.mark.parametrize("factorisation", ["channel", "flat"])
def test_capped_rank_is_the_largest_that_is_cheaper_than_the_layer(shape, factorisation):
    size, kernel = torch.Size(shape).numel(), torch.Size(shape[2:]).numel()
    one = kernel * (shape[0] + shape[1]) if factorisation == "channel" else shape[0] + shape[1] * kernel
    rank = capped_rank(shape, 1000, factorisation=factorisation)
    assert rank * one < size <= (rank + 1) * one
    assert capped_rank(shape, 1, factorisation=factorisation) == min(rank, 1)


def test_a_stem_costs_more_as_factors_than_in_full_at_any_rank():
    assert capped_rank((32, 1, 3, 3, 3), 1) == 0
    with pytest.raises(ConfigurationError, match="train it in full"):
        LowRankDelta((32, 1, 3, 3, 3), rank=1)


def test_a_capped_rank_keeps_the_wanted_scale():
    assert LowRankDelta((8, 4, 3), rank=100, alpha=50.0).scale == 0.5


@pytest.mark.parametrize(("options", "named"), [({"rank": 0}, "rank is 0"), ({"factorisation": "tucker"}, "'tucker'")])
def test_bad_options_are_named(options, named):
    with pytest.raises(ConfigurationError, match=named):
        LowRankDelta((8, 8, 3), **options)


def test_delta_is_float32_under_autocast():
    delta = LowRankDelta((8, 8, 3), rank=2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert delta.delta().dtype == torch.float32
        assert (delta.lora_A[0] @ delta.lora_B[0]).dtype == torch.bfloat16  # what autocast would have made of it


@pytest.mark.parametrize("factorisation", ["channel", "flat"])
def test_dropout_leaves_out_whole_rank_one_parts_in_training_alone(factorisation):
    torch.manual_seed(0)
    delta = LowRankDelta((8, 8, 3), rank=2, factorisation=factorisation, dropout=0.5)
    torch.nn.init.normal_(delta.lora_B)
    weight, seen = torch.zeros(8, 8, 3), set()
    whole = delta.eval()(weight)
    parts = []
    for r in range(2):
        one = LowRankDelta((8, 8, 3), rank=2, factorisation=factorisation)
        one.load_state_dict(delta.state_dict())
        with torch.no_grad():
            one.lora_A[..., 1 - r] = 0
        parts.append(one(weight))
    delta.train()
    for _ in range(50):
        drawn = delta(weight)
        kept = [m for m in [(0, 0), (0, 1), (1, 0), (1, 1)]
                if torch.allclose(drawn, 2 * (m[0] * parts[0] + m[1] * parts[1]), atol=1e-5)]
        assert len(kept) == 1
        seen |= set(kept)
        assert torch.equal(delta.merged(weight), whole) and delta.training
    assert len(seen) == 4
    assert torch.equal(delta.eval()(weight), whole) and torch.allclose(whole, parts[0] + parts[1], atol=1e-6)


def test_the_stabilised_scale_is_part_of_the_settings():
    delta = LowRankDelta((32, 32, 3), rank=9, alpha=6.0, rank_stabilised=True)
    assert delta.scale == 2.0
    assert LowRankDelta((32, 32, 3), **delta.settings()).scale == 2.0
    assert LowRankDelta((32, 32, 3), rank=9, alpha=6.0).scale == pytest.approx(6 / 9)


@pytest.mark.parametrize("dropout", [-0.1, 1.0])
def test_a_dropout_that_is_no_probability_is_refused(dropout):
    with pytest.raises(ConfigurationError, match="dropout"):
        LowRankDelta((8, 8, 3), rank=1, dropout=dropout)


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
