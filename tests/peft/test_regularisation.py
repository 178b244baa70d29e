"""L2-SP, EWC, the Fisher information in closed form, and the loss that carries their gradients."""

from __future__ import annotations

import copy

import pytest
import tiny
import torch
from torch import nn

from nnunet_dante.errors import ConfigurationError
from nnunet_dante.methods.groups import low_rank_targets
from nnunet_dante.peft.inject import adapted, inject, merge
from nnunet_dante.peft.regularisation import ExtendedLoss, StartPenalty, diagonal_fisher, effective, trained_weights


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


def parts():
    torch.manual_seed(0)
    network = nn.Linear(3, 2)
    pulls = [(p, torch.randn_like(p)) for p in network.parameters()]
    x, y = torch.rand(5, 3), torch.rand(5, 2)
    return network, pulls, x, y


def gradients(network, loss):
    return torch.autograd.grad(loss, list(network.parameters()))


@pytest.mark.parametrize("terms", [1, 2])
def test_value_is_kept_and_gradients_are_added(terms):
    network, pulls, x, y = parts()
    plain = nn.MSELoss()(network(x), y)
    extended = ExtendedLoss(nn.MSELoss(), [lambda: pulls] * terms)(network(x), y)
    assert torch.equal(plain, extended)
    for before, after, (_, pull) in zip(gradients(network, plain), gradients(network, extended), pulls):
        torch.testing.assert_close(after, before + terms * pull)


def test_a_term_without_gradients_changes_nothing_bit_for_bit():
    network, _, x, y = parts()
    plain = gradients(network, nn.MSELoss()(network(x), y))
    extended = gradients(network, ExtendedLoss(nn.MSELoss(), [list])(network(x), y))
    assert all(torch.equal(a, b) for a, b in zip(plain, extended))


def test_loss_scaling_and_unscaling_leave_the_same_gradients():
    network, pulls, x, y = parts()
    optimizer, scaler = torch.optim.SGD(network.parameters(), lr=1.0), torch.amp.GradScaler("cpu", init_scale=2.0**16)
    expected = gradients(network, ExtendedLoss(nn.MSELoss(), [lambda: pulls])(network(x), y))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = network(x)
        loss = ExtendedLoss(nn.MSELoss(), [lambda: pulls])(output, y)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    for p, gradient in zip(network.parameters(), expected):
        torch.testing.assert_close(p.grad, gradient, rtol=0.05, atol=0.02)


def test_autocast_is_off_while_terms_are_asked():
    network, pulls, x, y = parts()
    seen = []

    def term():
        seen.append((torch.is_autocast_enabled("cpu"), (pulls[0][1] @ pulls[0][1].T).dtype))
        return pulls

    with torch.autocast("cpu", dtype=torch.bfloat16):
        ExtendedLoss(nn.MSELoss(), [term])(network(x), y)
    assert seen == [(False, torch.float32)]


def test_validation_does_not_ask_the_terms():
    network, _, x, y = parts()

    def term():
        raise AssertionError

    with torch.no_grad():
        assert ExtendedLoss(nn.MSELoss(), [term])(network(x), y).isfinite()
