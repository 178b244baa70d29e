"""L2-SP and EWC: the written-out gradient is that of the formula, on full weights and on merged ones."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import nn

from nnunet_dante.errors import ConfigurationError
from nnunet_dante.methods.groups import low_rank_targets
from nnunet_dante.peft.inject import adapted, inject, merge
from nnunet_dante.peft.penalty import StartPenalty, effective, trained_weights


def moved(network: nn.Module, by: float = 0.05) -> nn.Module:
    torch.manual_seed(1)
    with torch.no_grad():
        for p in network.parameters():
            if p.requires_grad:
                p.add_(by * torch.randn_like(p))
    return network


def penalised(network: nn.Module, *, l2_sp=0.0, ewc=0.0) -> StartPenalty:
    weights = trained_weights(network, [p for p in network.parameters() if p.requires_grad])
    start = {n: w.detach().clone() for n, w in weights.items() if isinstance(w, torch.Tensor)}
    torch.manual_seed(2)
    fisher = {n: torch.rand_like(effective(w)) for n, w in weights.items()}
    return StartPenalty(weights, start=start, l2_sp=l2_sp, ewc=ewc, fisher=fisher)


def networks():
    full, low_rank = tiny.plain_unet(2), tiny.plain_unet(2)
    inject(low_rank, low_rank_targets(low_rank), rank=2)
    return {"full": full, "low rank": low_rank}


@pytest.mark.parametrize("options", [{"l2_sp": 0.3}, {"ewc": 0.7}, {"l2_sp": 0.3, "ewc": 0.7}])
@pytest.mark.parametrize("kind", ["full", "low rank"])
def test_value_and_gradient_are_those_of_the_formula(kind, options):
    network = networks()[kind]
    penalty = penalised(network, **options)
    assert penalty.value() == 0
    start = copy.deepcopy(network)
    if kind == "low rank":
        merge(start)
    moved(network)
    before = dict(start.named_parameters())
    formula = sum(((options.get("l2_sp", 0) + options.get("ewc", 0) * penalty.fisher.get(n, torch.zeros(())))
                   * (effective(w) - before[n].detach()).square()).sum() / 2 for n, w in penalty.weights.items())
    assert penalty.value() == pytest.approx(formula.item(), rel=1e-4) and penalty.value() > 0
    trained = [p for p in network.parameters() if p.requires_grad]
    expected = dict(zip(trained, torch.autograd.grad(formula, trained)))
    found = dict(penalty.gradients())
    assert found.keys() == expected.keys()
    for p, gradient in found.items():
        torch.testing.assert_close(gradient, expected[p], rtol=1e-3, atol=1e-6)


def test_the_gradient_is_the_slope_of_the_value():
    network = networks()["low rank"].double()
    penalty = penalised(network, l2_sp=0.5)
    moved(network)
    with torch.no_grad():
        for p, gradient in penalty.gradients()[::5]:
            direction, step = torch.randn_like(p), 1e-5
            p.add_(step * direction)
            up = penalty.value()
            p.sub_(2 * step * direction)
            down = penalty.value()
            p.add_(step * direction)
            assert (up - down) / (2 * step) == pytest.approx((gradient * direction).sum().item(), rel=1e-4, abs=1e-8)


def test_low_rank_counts_the_merged_weight_once_and_no_factor():
    network = networks()["low rank"]
    names = trained_weights(network, [p for p in network.parameters() if p.requires_grad])
    assert set(adapted(network)) < set(names) and not any("lora" in n or "original" in n for n in names)
    stock = dict(tiny.plain_unet(2).named_parameters())
    assert set(names) == set(stock)


def test_descent_returns_to_the_start():
    network = networks()["full"]
    start = copy.deepcopy(network.state_dict())
    penalty = penalised(network, l2_sp=1.0)
    moved(network)
    with torch.no_grad():
        for p, gradient in penalty.gradients():
            p.sub_(gradient)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(network.state_dict().values(), start.values()))


def test_what_is_frozen_at_present_gets_no_gradient():
    network = networks()["full"]
    penalty = penalised(network, l2_sp=1.0)
    moved(network)
    network.encoder.requires_grad_(False)
    ids = {id(p) for p in network.encoder.parameters()}
    found = {id(p) for p, _ in penalty.gradients()}
    assert found and not ids & found


def test_dropout_of_factors_is_no_distance_and_draws_nothing():
    from nnunet_dante.peft.inject import attach
    from nnunet_dante.peft.low_rank import LowRankDelta

    network = tiny.plain_unet(2)
    targets = low_rank_targets(network)[2:5]
    attach(network, {m: LowRankDelta(m.weight.shape, rank=2, dropout=0.5) for m in targets})
    penalty = penalised(moved(network), l2_sp=1.0)
    network.train()
    state = torch.get_rng_state()
    first, second = penalty.gradients(), penalty.gradients()
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, second))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(m.parametrizations.training for m in adapted(network).values())


def test_state_makes_the_same_penalty_again():
    network = networks()["full"]
    penalty = penalised(network, l2_sp=0.1, ewc=0.2)
    state = penalty.state()
    moved(network)
    again = StartPenalty(penalty.weights, l2_sp=0.1, ewc=0.2, **state)
    assert again.value() == penalty.value() > 0
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(penalty.gradients(), again.gradients()))


def test_values_of_another_network_are_refused():
    penalty = penalised(networks()["full"], l2_sp=1.0)
    with pytest.raises(ConfigurationError, match=r"start values of .* are missing"):
        StartPenalty(penalty.weights, start={}, l2_sp=1.0)
    wrong = penalty.start | {next(iter(penalty.start)): torch.zeros(1)}
    with pytest.raises(ConfigurationError, match=r"are \(1,\), the weight has shape"):
        StartPenalty(penalty.weights, start=wrong, l2_sp=1.0)
    with pytest.raises(ConfigurationError, match="Fisher information of"):
        StartPenalty(penalty.weights, start=penalty.start, ewc=1.0)
