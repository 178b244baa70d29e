"""Whether weights are numbers."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

_SHOWN = 5


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """Return the names of tensors that hold NaN or infinite numbers; waits for the device once."""
    named = [(name, tensor) for name, tensor in tensors if tensor.is_floating_point() and tensor.numel()]
    if not named:
        return []
    # Smallest and largest number: NaN passes through both, and on a CPU that takes a tenth of isfinite's time.
    extremes = torch.stack([torch.stack(torch.aminmax(tensor.detach())) for _, tensor in named])
    return [name for (name, _), finite in zip(named, extremes.isfinite().all(1).tolist()) if not finite]


def not_finite_weights(network: nn.Module) -> list[str]:
    """Return the names of parameters and buffers that hold NaN or infinite numbers, each tensor once."""
    return not_finite([*network.named_parameters(), *network.named_buffers()])


def described(names: list[str]) -> str:
    """Return how many tensors are not finite, and the first of them."""
    more = ", ..." if len(names) > _SHOWN else ""
    return f"{len(names)} tensors hold NaN or infinite numbers: {', '.join(names[:_SHOWN])}{more}"
