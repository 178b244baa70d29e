"""Using a network for a moment in another mode, and restoring its mode afterwards."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor, nn


def full_resolution(outputs: Tensor | Sequence[Tensor]) -> Tensor:
    """Return a network's logits at full resolution; with deep supervision they are the first of several outputs."""
    return outputs if isinstance(outputs, Tensor) else outputs[0]


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Run norms and dropout as in prediction; afterwards restore the mode of every module, frozen norms included."""
    training = {module: module.training for module in network.modules()}
    network.eval()
    try:
        yield
    finally:
        for module, mode in training.items():
            module.training = mode


@contextmanager
def all_requiring_gradients(network: nn.Module) -> Iterator[None]:
    """Let every parameter require a gradient; afterwards restore each one's setting."""
    required = {p: p.requires_grad for p in network.parameters()}
    network.requires_grad_(True)
    try:
        yield
    finally:
        for parameter, requires_grad in required.items():
            parameter.requires_grad_(requires_grad)
