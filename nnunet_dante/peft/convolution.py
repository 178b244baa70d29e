"""Convolutions that compute no gradient and keep no input that is not used. Forward is torch's, bit for bit.

torch computes the gradient of the whole input or none of it, and the same holds for the kernel. More than is used:
- where a decoder stage reads features of a frozen encoder: half of the input's gradient is not used;
- where only the centre of a kernel is trained: 26 of 27 offsets of the kernel's gradient are not used;
- where only the bias is trained: on a CPU, torch computes the kernel's gradient as well;
- where the kernel is frozen: torch keeps the input for the backward pass, which does not need it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.utils import parametrize

from .update import PointwiseDelta

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def spare_gradients(network: nn.Module) -> None:
    """Let every convolution of `network`, adapted or not, compute and keep only what the training uses.

    Each forward pass looks anew at what requires a gradient, so layers may be frozen and opened from step to step.
    Where `torch.compile` traces the network, and where nothing can be saved, torch's own convolution runs.

    Args:
        network: changed in place. A stage of a U-Net's decoder must read its own, upsampled features first and those
            of the encoder behind them, as nnU-Net's do; other networks are served without this saving.
    """
    decoder: Any = getattr(network, "decoder", None)
    own = {id(next(m for m in stage.modules() if isinstance(m, CONVS))): up.out_channels
           for up, stage in zip(getattr(decoder, "transpconvs", ()), getattr(decoder, "stages", ()))}
    for layer in network.modules():
        if isinstance(layer, CONVS) and layer.padding_mode == "zeros" and not isinstance(layer.padding, str):
            layer._conv_forward = _Sparing(layer, own.get(id(layer)))  # type: ignore[method-assign, assignment]


class _Sparing:
    """The function that `layer` calls with x (batch, in, *space), its weight (out, in / groups, *kernel) and bias.

    own_channels: number of the first channels of x that come from the decoder itself; None in other layers.
    """

    def __init__(self, layer: Any, own_channels: int | None):
        self.layer = layer
        self.own_channels = own_channels if layer.groups == 1 else None
        self.centred = all(p == d * (k // 2) for p, d, k in zip(layer.padding, layer.dilation, layer.kernel_size))

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        layer = self.layer
        unbatched = x.ndim < weight.ndim  # (in, *space), which torch takes as well
        if unbatched or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return type(layer)._conv_forward(layer, x, weight, bias)
        centre = self._centre()
        weight = weight if centre is None else weight.detach()
        own = self.own_channels if self.own_channels is not None and _ends_without_gradient(x) else None
        others = any(t is not None and t.requires_grad for t in (x, bias, centre))
        if own is None and (weight.requires_grad or not others):
            return type(layer)._conv_forward(layer, x, weight, bias)
        if torch.is_autocast_enabled(x.device.type):  # as torch's own convolution does
            dtype = torch.get_autocast_dtype(x.device.type)
            x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        return _Convolution.apply(x, weight, bias, centre, own, layer.stride, layer.padding, layer.dilation,
                                  layer.groups)

    def _centre(self) -> Tensor | None:
        """Return the update of the kernel's centre, (out, in / groups), if nothing else of the kernel is trained.

        Its gradient is then that of a 1x1 convolution with the layer's stride. This needs a padding that keeps the
        kernel centred on its voxel, as nnU-Net's does; without it the answer is None.
        """
        if not self.centred or not parametrize.is_parametrized(self.layer, "weight"):
            return None
        update = self.layer.parametrizations.weight
        alone = isinstance(update[0], PointwiseDelta) and not update.original.requires_grad
        return update[0].pointwise if alone else None


def _ends_without_gradient(x: Tensor) -> bool:
    """Return whether x is a concatenation of two tensors of which only the first requires a gradient."""
    if x.grad_fn is None:
        return False
    wanted = [node is not None for node, _ in x.grad_fn.next_functions]
    return x.grad_fn.name() == "CatBackward0" and wanted == [True, False]


class _Convolution(torch.autograd.Function):
    """The convolution of x with a weight that contains `centre`, (out, in / groups), already.

    Backward computes the gradient of x for its first `own` channels only, or for all of them if `own` is None.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, centre: Tensor | None, own: int | None,
                *options: Any) -> Tensor:
        stride, padding, dilation, groups = options
        ctx.options, ctx.own = options, own
        of_kernel = ctx.needs_input_grad[1] or ctx.needs_input_grad[3]
        ctx.save_for_backward(x if of_kernel else x.new_zeros(()).expand_as(x), weight, centre)
        return torch.convolution(x, weight, bias, stride, padding, dilation, False, (0,) * len(stride), groups)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, centre = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.options
        zeros, ones = (0,) * len(stride), (1,) * len(stride)
        of_x = of_weight = of_bias = of_centre = None

        def gradients(x: Tensor, weight: Tensor, padding: Any, dilation: Any, *wanted: bool) -> tuple[Tensor, ...]:
            return torch.ops.aten.convolution_backward(gradient, x, weight, None, stride, padding, dilation, False,
                                                       zeros, groups, [*wanted, False])

        if ctx.needs_input_grad[0]:
            part = slice(0, ctx.own)
            # (batch, own channels, *space): the rest of x needs no gradient, so zeros stand for it
            of_x = gradients(x[:, part], weight[:, part] if ctx.own else weight, padding, dilation, True, False)[0]
            if ctx.own:
                of_x = torch.cat([of_x, of_x.new_zeros(()).expand_as(x[:, ctx.own:])], 1)
        if ctx.needs_input_grad[1]:
            of_weight = gradients(x, weight, padding, dilation, False, True)[1]
        if ctx.needs_input_grad[2]:
            of_bias = gradient.sum([0, *range(2, gradient.ndim)])  # (batch, out, *space) -> (out,)
        if ctx.needs_input_grad[3]:
            kernel = centre.to(x.dtype).reshape(*centre.shape, *ones)  # (out, in / groups, 1, ..., 1)
            of_centre = gradients(x, kernel, zeros, ones, False, True)[1].reshape(centre.shape).to(centre.dtype)
        return of_x, of_weight, of_bias, of_centre, *(None,) * 5
