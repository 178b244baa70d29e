import pytest
import torch

from nnunet_dante.training.lr import WarmupPolyLR, learning_rate


def test_without_warmup_it_is_nnunets_schedule():
    from nnunetv2.training.lr_scheduler.polylr import PolyLRScheduler

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    stock = PolyLRScheduler(optimizer, 0.01, 20)
    for epoch in range(20):
        stock.step(epoch)
        assert learning_rate(epoch, initial_lr=0.01, epochs=20) == pytest.approx(optimizer.param_groups[0]["lr"])


def test_warmup_rises_to_the_initial_rate_then_falls():
    rates = [learning_rate(e, initial_lr=1.0, epochs=50, warmup_epochs=5) for e in range(50)]
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])
    assert all(later < earlier for earlier, later in zip(rates[5:], rates[6:]))
    assert rates[-1] > 0


def test_every_group_keeps_its_factor():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr_scale": s} for s in (1.0, 0.1)]
    optimizer = torch.optim.AdamW(groups, lr=1e-3)
    schedule = WarmupPolyLR(optimizer, initial_lr=1e-3, epochs=100, warmup_epochs=5)
    for epoch in (0, 4, 50, 99):
        schedule.step(epoch)
        head, stem = (g["lr"] for g in optimizer.param_groups)
        assert stem == pytest.approx(0.1 * head) and head > 0


def test_short_trainings_get_a_short_warmup():
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1e-3)
    assert WarmupPolyLR(optimizer, initial_lr=1e-3, epochs=8, warmup_epochs=5).warmup_epochs == 0
    assert WarmupPolyLR(optimizer, initial_lr=1e-3, epochs=20, warmup_epochs=5).warmup_epochs == 2
