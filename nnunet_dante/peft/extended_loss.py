"""A loss whose backward adds gradients of further terms."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

Gradients = Iterable[tuple[nn.Parameter, Tensor]]


class ExtendedLoss(nn.Module):
    """nnU-Net's loss, to whose gradient those of `terms` are added; its value stays what it was.

    So loss scaling, clipping and the average over DDP's processes see the gradient of the whole objective, while
    logged losses stay comparable with other trainings and with the validation. Without gradients (validation) the
    terms are not asked.

    Args:
        loss: called with output and target, returns a scalar.
        terms: each returns (parameter, gradient of the term with respect to it).
    """

    def __init__(self, loss: nn.Module, terms: Iterable[Callable[[], Gradients]]):
        super().__init__()
        self.loss = loss
        self.terms = tuple(terms)

    def forward(self, output: Any, target: Any) -> Tensor:
        """Return the loss of the inner one."""
        loss = self.loss(output, target)
        if not torch.is_grad_enabled():
            return loss
        with torch.autocast(loss.device.type, enabled=False):
            for term in self.terms:
                parameters, gradients = zip(*pairs) if (pairs := list(term())) else ((), ())
                if parameters:
                    loss = _AddGradients.apply(loss, gradients, *parameters)
        return loss


class _AddGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor, ...], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """`upstream` is the loss scale under AMP."""
        return upstream, None, *(upstream.to(g.dtype) * g for g in ctx.gradients)
