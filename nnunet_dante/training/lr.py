"""The learning rate as a pure function of the epoch, with one factor per parameter group."""

from __future__ import annotations

from torch.optim import Optimizer


def learning_rate(epoch: int, *, initial_lr: float, epochs: int, warmup_epochs: int = 0) -> float:
    """Return the learning rate at `epoch`: linear warm-up, then nnU-Net's decay (1 - t) ** 0.9.

    t rises from 0 after the warm-up to 1 at `epochs`. The first epoch has the rate initial_lr / warmup_epochs, not 0.
    """
    if epoch < warmup_epochs:
        return initial_lr * (epoch + 1) / warmup_epochs
    return initial_lr * (1 - (epoch - warmup_epochs) / (epochs - warmup_epochs)) ** 0.9


class WarmupPolyLR:
    """Set the learning rate of every parameter group to `learning_rate(epoch)` times the group's "lr_scale".

    nnU-Net's own PolyLRScheduler sets one rate for all groups. A group without "lr_scale" has the factor 1. The rate
    depends only on the epoch, so it needs no state when a training is continued.
    """

    def __init__(self, optimizer: Optimizer, *, initial_lr: float, epochs: int, warmup_epochs: int = 0):
        self.optimizer = optimizer
        self.initial_lr = initial_lr
        self.epochs = epochs
        self.warmup_epochs = min(warmup_epochs, epochs // 10)
        self.step(0)

    def step(self, epoch: int) -> None:
        """Set the learning rates of `epoch`."""
        lr = learning_rate(epoch, initial_lr=self.initial_lr, epochs=self.epochs, warmup_epochs=self.warmup_epochs)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
