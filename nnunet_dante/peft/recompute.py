"""Gradient checkpointing: parts of a network keep only what they read, and compute it all again in the backward pass.

This is exact. The second computation draws the same random numbers as the first, and it leaves the statistics of batch
norms alone, which would otherwise count every batch twice. Source: Chen 2016, arXiv 1604.06174.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def recompute(parts: Iterable[nn.Module]) -> None:
    """Let each of `parts` keep its input alone for the backward pass, which then runs the part a second time.

    Nothing changes where no gradient is computed. Where `torch.compile` traces the network, the compiler plans the
    second computation.

    Args:
        parts: modules of a network that run one after the other; none may contain another. They are changed in place.
    """
    for part in parts:
        part.forward = _Recomputed(part)  # type: ignore[method-assign, assignment]


class _Recomputed:
    """What runs when `part` is called."""

    def __init__(self, part: nn.Module):
        self.part = part

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        forward = partial(type(self.part).forward, self.part, **options)
        if not torch.is_grad_enabled():
            return forward(*inputs)
        if torch.compiler.is_compiling():
            return checkpoint(forward, *inputs, use_reentrant=False)
        return checkpoint(forward, *inputs, use_reentrant=False, context_fn=self._contexts)

    def _contexts(self) -> tuple[AbstractContextManager, AbstractContextManager]:
        """Return the contexts of the first and of the second computation."""
        return nullcontext(), _SecondTime(self.part)


class _SecondTime(AbstractContextManager):
    """Let `part` compute with copies of its buffers, so that they are as before afterwards.

    On Apple's MPS, the random numbers are those of the moment when this object was made; elsewhere torch sees to it.
    """

    def __init__(self, part: nn.Module):
        self.part = part
        self.random = torch.mps.get_rng_state() if _on_mps(part) else None

    def __enter__(self) -> None:
        self.own = [(m, dict(m._buffers)) for m in self.part.modules()]
        for module, buffers in self.own:
            module._buffers.update({name: b if b is None else b.clone() for name, b in buffers.items()})
        if self.random is not None:
            self.after = torch.mps.get_rng_state()
            torch.mps.set_rng_state(self.random)

    def __exit__(self, *_: object) -> None:
        for module, buffers in self.own:
            module._buffers.update(buffers)
        if self.random is not None:
            torch.mps.set_rng_state(self.after)


def _on_mps(part: nn.Module) -> bool:
    first: Tensor | None = next(part.parameters(), None)
    return first is not None and first.device.type == "mps"
