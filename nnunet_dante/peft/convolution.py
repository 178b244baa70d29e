"""Convolutions of whose kernel the centre alone is trained: a backward that makes no other gradient of the kernel.

torch makes the gradient of the whole kernel, 27 offsets in 3D, of which `PointwiseDelta` uses one; on a CPU that is a
third of a training step. Forward is the stock convolution, bit for bit.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def shorten_backward(layer: Any) -> None:
    """Let a convolution whose weight has a `PointwiseDelta` make the gradient of that alone, and of input and bias.

    The gradient is that of a 1x1 convolution with the layer's stride and groups; that takes zero padding of
    dilation * (kernel - 1) / 2, nnU-Net's, and layers with another are left as they are. Where the original weight
    requires a gradient, or none is made at all, the stock convolution runs.
    """
    stock = layer._conv_forward.__func__
    centred = layer.padding_mode == "zeros" and not isinstance(layer.padding, str) and all(
        p == d * (k // 2) for p, d, k in zip(layer.padding, layer.dilation, layer.kernel_size))

    def convolve(layer: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        update = layer.parametrizations.weight
        if update.original.requires_grad or not torch.is_grad_enabled():
            return stock(layer, x, weight, bias)
        if torch.is_autocast_enabled(x.device.type):  # as torch's own convolution does
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        return _CentreTrained.apply(x, weight.detach(), bias, update[0].pointwise, layer.stride, layer.padding,
                                    layer.dilation, layer.groups)

    if centred:
        type(layer)._conv_forward = convolve  # parametrize made this class for this layer and its copies alone


class _CentreTrained(torch.autograd.Function):
    """The convolution of x (batch, in, *space) with weight (out, in / groups, *kernel), which has centre in it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, centre: Tensor, *options: Any) -> Tensor:
        stride, padding, dilation, groups = options
        ctx.options = options
        ctx.save_for_backward(x, weight, centre)
        return torch.convolution(x, weight, bias, stride, padding, dilation, False, (0,) * len(stride), groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, centre = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        ones, zeros = (1,) * len(stride), (0,) * len(stride)
        of_x = of_bias = of_centre = None
        if ctx.needs_input_grad[0]:
            of_x = torch.ops.aten.convolution_backward(gradient, x, weight, None, stride, padding, dilation, False,
                                                       zeros, groups, [True, False, False])[0]
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum([0, *range(2, gradient.ndim)])
        if ctx.needs_input_grad[3]:
            kernel = centre.to(x.dtype).reshape(*centre.shape, *ones)
            of_centre = torch.ops.aten.convolution_backward(gradient, x, kernel, None, stride, zeros, ones, False,
                                                            zeros, groups, [False, True, False])[1]
            of_centre = of_centre.reshape(centre.shape).to(centre.dtype)
        return of_x, None, of_bias, of_centre, None, None, None, None
