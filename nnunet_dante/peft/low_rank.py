"""Low-rank updates of weights, LoRA and DoRA: the arithmetic, for any layer that has a `weight`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ConfigurationError
from .update import WeightUpdate

FACTORISATIONS = ("channel", "flat")


def capped_rank(shape: Sequence[int], rank: int, *, factorisation: str = "channel") -> int:
    """Return the largest rank up to `rank` whose factors have fewer parameters than the weight; 0 if none has.

    Args:
        shape: of the weight, (out, in, *kernel); that of a transposed convolution, (in, out, *kernel), is taken as it
            is.
        rank: wanted rank r, at least 1.
        factorisation: "channel" needs K * r * (out + in) parameters, "flat" r * (out + in * K), with K kernel offsets.

    Raises:
        ConfigurationError: rank or factorisation is not allowed.
    """
    if factorisation not in FACTORISATIONS:
        raise ConfigurationError(f"factorisation is {factorisation!r}; choose one of {', '.join(FACTORISATIONS)}.")
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigurationError(f"rank is {rank!r}; give a whole number of at least 1.")
    rows, columns, kernel = shape[0], shape[1], math.prod(shape[2:])
    cost = kernel * (rows + columns) if factorisation == "channel" else rows + columns * kernel
    return min(rank, (rows * columns * kernel - 1) // cost)


class LowRankDelta(WeightUpdate):
    """W -> W + (alpha / rank) A B.

    "channel" (Dante, arXiv 2605.03602): for each of the K kernel offsets k, delta[:, :, k] = (alpha / rank) A_k B_k,
    with lora_A: (K, out, r) and lora_B: (K, r, in). "flat" (LoRA as for linear layers, Hu 2021, arXiv 2106.09685):
    delta, as a matrix (out, in * K), = (alpha / rank) A B, with lora_A: (out, r) and lora_B: (r, in * K). A starts as
    Kaiming uniform (a = sqrt 5) and B as zero, so the delta starts as zero.

    Args:
        shape: of the weight, (out, in, *kernel).
        rank: wanted rank; r is smaller where `capped_rank` says so, but the factor alpha / rank uses the wanted one.
        alpha: strength of the update.
        factorisation: "channel" or "flat".
        rank_stabilised: use alpha / sqrt(rank) instead (rsLoRA, Kalajdzievski 2023, arXiv 2312.03732).
        dropout: probability with which each of the r rank-one parts of the delta is left out in training mode. The
            others grow by 1 / (1 - dropout), so the mean is the whole delta, which eval mode and files use. It acts on
            the weight: all voxels of a batch share one draw.
        device: of the factors, which are always float32.

    Raises:
        ConfigurationError: the factors would have as many parameters as the weight (see `capped_rank`), or dropout is
            not in [0, 1).
    """

    KIND = "lora"
    FACTORS: ClassVar[tuple[str, ...]] = ("lora_A", "lora_B")

    def __init__(self, shape: Sequence[int], *, rank: int = 8, alpha: float = 16.0, factorisation: str = "channel",
                 rank_stabilised: bool = False, dropout: float = 0.0, device: torch.device | None = None):
        super().__init__()
        self.rank = capped_rank(shape, rank, factorisation=factorisation)
        if self.rank == 0:
            raise ConfigurationError(f"a weight of shape {tuple(shape)} has no more parameters than its factors would "
                                     f"have; train it in full.")
        if not 0 <= dropout < 1:
            raise ConfigurationError(f"dropout is {dropout!r}; give a probability from 0 to below 1.")
        self.shape, self.factorisation, self.dropout = tuple(shape), factorisation, dropout
        self.wanted_rank, self.alpha, self.rank_stabilised = rank, alpha, rank_stabilised
        self.scale = alpha / (math.sqrt(rank) if rank_stabilised else rank)
        rows, columns, kernel = shape[0], shape[1], math.prod(shape[2:])
        a: tuple[int, ...]
        b: tuple[int, ...]
        if factorisation == "channel":
            a, b = (kernel, rows, self.rank), (kernel, self.rank, columns)
        else:
            a, b = (rows, self.rank), (self.rank, columns * kernel)
        self.lora_A = nn.Parameter(torch.empty(a, device=device))
        self.lora_B = nn.Parameter(torch.zeros(b, device=device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def settings(self) -> dict[str, Any]:
        """Return rank, alpha, factorisation and scaling. Dropout is not among them: the finished weight has none."""
        return {"rank": self.wanted_rank, "alpha": self.alpha, "factorisation": self.factorisation,
                "rank_stabilised": self.rank_stabilised}

    def delta(self) -> Tensor:
        """Return the update, (out, in, *kernel), in float32 even under autocast; with dropout in training mode."""
        b: Tensor = self.lora_B
        if self.training and self.dropout:
            b = functional.dropout(b.new_ones(self.rank, 1), self.dropout) * b  # whole rows of B, at all offsets alike
        with torch.autocast(self.lora_A.device.type, enabled=False):
            product = self.scale * (self.lora_A @ b)  # (K, out, in) or (out, in * K)
        if self.factorisation == "channel":
            product = product.permute(1, 2, 0)  # (out, in, K)
        return product.reshape(self.shape)

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with the update, in the weight's dtype."""
        return weight + self.delta().to(weight.dtype)

    def reset(self) -> None:
        """Make the update zero; draws no random numbers."""
        with torch.no_grad():
            self.lora_B.zero_()


class DecomposedLowRank(LowRankDelta):
    """W -> m ||W|| V / ||V|| with V = W + delta of `LowRankDelta` (DoRA, Liu 2024, arXiv 2402.09353).

    Each output channel has a norm of its own, over all inputs and kernel offsets that it reads. The magnitude m, of
    shape (out,), starts as ones. It is relative to the norm of the base weight, where the paper trains the product
    m ||W||: so a step means the same in every layer, and training starts from the base bit for bit. Backward treats
    ||V|| as a constant, as the paper does (section 4.3). An output channel whose weights are all zero stays zero.

    Args:
        shape, options: as in `LowRankDelta`.
        groups: of the layer.
        transposed: whether the layer is a transposed convolution, whose weight is (in, out / groups, *kernel).
    """

    KIND = "dora"
    FACTORS = ("lora_A", "lora_B", "magnitude")

    def __init__(self, shape: Sequence[int], *, groups: int = 1, transposed: bool = False, **options: Any):
        super().__init__(shape, **options)
        self.groups, self.transposed = groups, transposed
        outputs = groups * shape[1] if transposed else shape[0]
        self.magnitude = nn.Parameter(torch.ones(outputs, device=self.lora_A.device))

    def settings(self) -> dict[str, Any]:
        """Return the options of the low-rank update, and groups and transposed."""
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
        """Return the norm of each output channel's weights, (out,), in float32 and above zero."""
        grouped = self._grouped(weight).float()
        norms = torch.linalg.vector_norm(grouped, dim=[d for d in range(grouped.ndim) if d not in (0, 2)])
        return norms.flatten().clamp_min(torch.finfo(norms.dtype).tiny)

    def _by_output(self, weight: Tensor, gain: Tensor) -> Tensor:
        grouped = self._grouped(weight)
        shape = (grouped.shape[0], 1, grouped.shape[2], *[1] * (grouped.ndim - 3))
        return (grouped * gain.reshape(shape)).reshape(weight.shape)

    def _grouped(self, weight: Tensor) -> Tensor:
        """Return a view in which axes 0 and 2 together count the output channels."""
        if self.transposed:
            return weight.unflatten(0, (self.groups, -1))  # (groups, in / groups, out / groups, *kernel)
        return weight[:, None, None]  # (out, 1, 1, in / groups, *kernel)
