"""Two other ways to run low-rank adaptation, for comparison: they change the layer's output, not its weight.

Both are hooks on the layers, because nnU-Net's networks register each layer under several names. Stem, heads, norms and
biases are trained in full, as with LoRA here.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from nnunet_dante.methods.groups import low_rank_targets
from nnunet_dante.peft.low_rank import LowRankDelta

RANK, SCALE = 8, 2.0


def add_second_convolutions(network: nn.Module) -> None:
    """y = conv(x; W) + conv(x; delta): what Dante's layer does (arXiv 2605.03602, dante-trainer 1.0.3b3)."""
    for layer in _frozen_targets(network):
        layer.reference = LowRankDelta(layer.weight.shape, rank=RANK)
        layer.register_forward_hook(lambda layer, x, y: y + _run(layer, x[0], layer.reference.delta()))


def add_branches(network: nn.Module) -> None:
    """y = conv(x; W) + scale * conv1x1(conv(x; B); A): what Hugging Face PEFT's layers do (flat factorisation)."""
    for layer in _frozen_targets(network):
        layer.reference = _Branch(layer)
        layer.register_forward_hook(lambda layer, x, y: y + layer.reference(layer, x[0]))


class _Branch(nn.Module):
    def __init__(self, layer: Any):
        super().__init__()
        shape, d = list(layer.weight.shape), layer.weight.ndim - 2
        shape[int(_transposed(layer))] = RANK
        self.down = nn.Parameter(torch.randn(shape) * 0.01)
        self.up = getattr(nn, f"Conv{d}d")(RANK, layer.out_channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, layer: Any, x: Tensor) -> Tensor:
        return SCALE * self.up(_run(layer, x, self.down))


def _frozen_targets(network: nn.Module) -> list[Any]:
    layers: list[Any] = list(low_rank_targets(network))
    for layer in layers:
        layer.weight.requires_grad_(False)
    return layers


def _transposed(layer: Any) -> bool:
    return "Transpose" in type(layer).__name__


def _run(layer: Any, x: Tensor, weight: Tensor) -> Tensor:
    """Return the layer's convolution with another weight and no bias."""
    d = weight.ndim - 2
    if _transposed(layer):
        return getattr(functional, f"conv_transpose{d}d")(x, weight, None, layer.stride, layer.padding,
                                                          layer.output_padding, layer.groups, layer.dilation)
    return getattr(functional, f"conv{d}d")(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
