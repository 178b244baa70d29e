"""DoRA: a low-rank update of a weight's direction, and a magnitude an output channel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .low_rank import LowRankDelta


class DecomposedLowRank(LowRankDelta):
    """W -> m ||W|| V / ||V|| with V = W + delta of `LowRankDelta` (DoRA, Liu 2024, arXiv 2402.09353).

    The norm runs over everything that one output channel reads: inputs and kernel offsets. magnitude m: (out,), ones
    at first: it is relative to the base's own norm, where the paper trains the product m ||W||; so a step means the
    same in every layer, and the start is the base bit for bit. ||V|| counts as a constant in backward, as in the paper
    (its section 4.3). An output channel whose weights are all zero stays so.

    Args:
        shape, options: as `LowRankDelta`.
        groups: of the layer. transposed: the layer is a transposed convolution, whose weight is (in, out / groups,
            *kernel).
    """

    KIND = "dora"
    FACTORS = ("lora_A", "lora_B", "magnitude")

    def __init__(self, shape: Sequence[int], *, groups: int = 1, transposed: bool = False, **options: Any):
        super().__init__(shape, **options)
        self.groups, self.transposed = groups, transposed
        outputs = groups * shape[1] if transposed else shape[0]
        self.magnitude = nn.Parameter(torch.ones(outputs, device=self.lora_A.device))

    def settings(self) -> dict[str, Any]:
        """Return those of the low-rank update, groups and transposed."""
        return super().settings() | {"groups": self.groups, "transposed": self.transposed}

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with new direction and magnitude, in the weight's dtype."""
        with torch.autocast(weight.device.type, enabled=False):
            direction = super().forward(weight)
            gain = self.magnitude * (self._norms(weight) / self._norms(direction).detach())
            return self._by_output(direction, gain.to(weight.dtype))

    def reset(self) -> None:
        """Make delta zero and magnitude one; draws no random numbers."""
        super().reset()
        with torch.no_grad():
            self.magnitude.fill_(1)

    def _norms(self, weight: Tensor) -> Tensor:
        """Return the norm of every output channel's weights, (out,), in float32 and never zero."""
        grouped = self._grouped(weight).float()
        norms = torch.linalg.vector_norm(grouped, dim=[d for d in range(grouped.ndim) if d not in (0, 2)])
        return norms.flatten().clamp_min(torch.finfo(norms.dtype).tiny)

    def _by_output(self, weight: Tensor, gain: Tensor) -> Tensor:
        grouped = self._grouped(weight)
        shape = (grouped.shape[0], 1, grouped.shape[2], *[1] * (grouped.ndim - 3))
        return (grouped * gain.reshape(shape)).reshape(weight.shape)

    def _grouped(self, weight: Tensor) -> Tensor:
        """Return a view in which axes 0 and 2 together number the output channels."""
        if self.transposed:
            return weight.unflatten(0, (self.groups, -1))
        return weight[:, None, None]
