"""The value is the inner loss's, the gradient that of the whole objective; also with a loss scale."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from nnunet_dante.peft.extended_loss import ExtendedLoss


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
