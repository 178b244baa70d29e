"""The gradient audit: proof, before the first step, that everything that should be trained can be."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..errors import GradientAuditError


@dataclass(frozen=True)
class AuditReport:
    """Numbers of parameters: trainable and in all, and of trainable tensors, all of which received a gradient."""

    trainable: int
    total: int
    tensors: int

    def __str__(self) -> str:
        return (f"Gradient audit passed: {self.tensors} trainable tensors receive a gradient; "
                f"{self.trainable:,} of {self.total:,} parameters are trained ({self.trainable / self.total:.1%}).")


def audit_gradients(network: nn.Module, x: Tensor) -> AuditReport:
    """Run `x` forward, and the mean squares of all outputs backward; demand a gradient for every trainable tensor.

    x: (batch, channels, *patch) on the network's device. A zero gradient passes (a factor whose partner is zero has
    one), a missing or non-finite one does not. Weights, gradients, mode and random state are left as they were.

    Raises:
        GradientAuditError: a trainable tensor is not part of the computation, or its gradient is not finite.
    """
    trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if not trainable:
        raise GradientAuditError(f"nothing in this {type(network).__name__} is trainable; choose a method that trains "
                                 f"something.")
    devices = [x.device] if x.device.type == "cuda" else []
    training = {module: module.training for module in network.modules()}
    with torch.random.fork_rng(devices=devices), torch.enable_grad():
        network.eval()
        try:
            loss = sum(y.float().square().mean() for y in _outputs(network(x)))
            gradients = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)  # type: ignore[arg-type]
        finally:
            for module, mode in training.items():
                module.training = mode
    dead = [name for name, g in zip(trainable, gradients) if g is None]
    if dead:
        raise GradientAuditError(
            f"{len(dead)} of {len(trainable)} trainable tensors receive no gradient: {', '.join(dead[:5])}"
            f"{', ...' if len(dead) > 5 else ''}. They would stay as they are without any sign. Forward does not use "
            f"them: adapt or unfreeze the modules that it does use.")
    if bad := [name for name, g in zip(trainable, gradients) if not torch.isfinite(g).all()]:
        raise GradientAuditError(f"the gradients of {', '.join(bad[:5])} are not finite at the start; the weights may "
                                 f"hold NaN or infinite numbers.")
    return AuditReport(trainable=sum(p.numel() for p in trainable.values()),
                       total=sum(p.numel() for p in network.parameters()), tensors=len(trainable))


def _outputs(y: object) -> Iterator[Tensor]:
    if isinstance(y, Tensor):
        yield y
    elif isinstance(y, list | tuple):
        for part in y:
            yield from _outputs(part)
