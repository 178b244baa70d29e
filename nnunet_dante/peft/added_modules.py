"""Small nonlinear modules added to a network's blocks. They start as a no-op and cannot be merged into weights.

An added module is a child of its block, and a forward hook of the block runs it. The block object is changed, not one
of its names: so every alias of the block has the module, and all stock keys stay as they were. The hook finds the
module through the block that calls it, so a copy of the network runs its own modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError, InjectionError

_CHILDREN = ("adaptformer", "spatial_adapter")
_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _NoOpWithoutWeights(nn.Module):
    """Base class: `up` starts as zero, and becomes zero again when a state dict without this module is loaded."""

    up: Any

    def __init__(self):
        super().__init__()
        self.register_load_state_dict_pre_hook(_reset_if_absent)

    def reset(self) -> None:
        """Make the module a no-op; draws no random numbers."""
        with torch.no_grad():
            for parameter in self.up.parameters():
                parameter.zero_()


def _reset_if_absent(module: Any, state: dict[str, Any], prefix: str, *_: Any) -> None:
    own = {f"{prefix}{name}": parameter for name, parameter in module.named_parameters()}
    if not own.keys() & state.keys():
        module.reset()
        state.update({key: parameter.detach() for key, parameter in own.items()})


class ParallelBottleneck(_NoOpWithoutWeights):
    """scale * up(ReLU(down(pool(x)))): the AdaptFormer module (Chen 2022, arXiv 2205.13535; scale and width of FSEFT).

    x: (batch, inputs, *space) -> (batch, outputs, *space / stride), or (..., inputs) -> (..., outputs) in a
    transformer. `down` (inputs -> width) and `up` (width -> outputs) are 1x1 convolutions or linear layers. Where the
    block has a stride, `pool` averages over the voxels of each step, as nnU-Net's residual skips do; a 1x1 convolution
    with a stride of 2 would ignore seven of eight voxels (He 2019, arXiv 1812.01187). `down` starts as Kaiming uniform
    (a = sqrt 5), biases and `up` as zero.

    Args:
        dimension: number of spatial axes, 1 to 3; 0 for the tokens of a transformer.
        inputs, outputs: number of channels of the block's input and output.
        stride: of the block, one number per spatial axis.
        width: number of channels between `down` and `up`.
        scale: factor of the result.
    """

    def __init__(self, dimension: int, inputs: int, outputs: int, *, stride: Iterable[int] = (), width: int = 16,
                 scale: float = 0.1):
        super().__init__()
        step = tuple(stride)
        kernel = (1,) * bool(dimension)
        layer: Any = getattr(nn, f"Conv{dimension}d") if dimension else nn.Linear
        self.scale = scale
        self.pool: nn.Module = nn.Identity()
        if any(n != 1 for n in step):
            self.pool = getattr(nn, f"AvgPool{dimension}d")(step, step)
        self.down = layer(inputs, width, *kernel)
        self.up = layer(width, outputs, *kernel)
        nn.init.zeros_(self.down.bias)
        self.reset()

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the block's output."""
        return self.up(torch.relu_(self.down(self.pool(x)))).mul_(self.scale)


class ResidualConvolutions(_NoOpWithoutWeights):
    """up(ReLU(down(x))), the Spatial Adapter of FSEFT (Silva-Rodriguez 2025).

    x: (batch, channels, *space) -> the same shape. `down` and `up` are convolutions without bias with kernel size 3 on
    each of the `dimension` spatial axes. `up` starts as zero.
    """

    def __init__(self, dimension: int, channels: int):
        super().__init__()
        conv = getattr(nn, f"Conv{dimension}d")
        self.down = conv(channels, channels, 3, padding=1, bias=False)
        self.up = conv(channels, channels, 3, padding=1, bias=False)
        self.reset()

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the features."""
        return self.up(torch.relu_(self.down(x)))


def add_beside(network: nn.Module, blocks: Iterable[nn.Module], *, width: int = 16, scale: float = 0.1) -> None:
    """Add to each of `blocks` a `ParallelBottleneck` from its input to its output, as its child "adaptformer".

    The modules start with the same numbers in every training, so that trainings of one base can be averaged.

    Args:
        network: changed in place.
        blocks: convolution blocks with input_channels, output_channels and stride, or the MLPs of a transformer.
        width, scale: of each bottleneck.

    Raises:
        ConfigurationError: width or scale is not above 0.
        InjectionError: the network has added modules already.
    """
    if not (width > 0 and scale > 0):
        raise ConfigurationError(f"width={width!r}, scale={scale!r}: both must be above 0.")
    _refuse_twice(network)
    with _fixed_draws():
        for block in blocks:
            _attach(network, block, "adaptformer", _beside(block, width, scale), _add_parallel)


def add_behind(network: nn.Module, block: nn.Module, *, dimension: int, channels: int) -> None:
    """Add `ResidualConvolutions` to the output of `block`, as its child "spatial_adapter".

    They start with the same numbers in every training.

    Args:
        network: changed in place.
        block: module of the network.
        dimension: number of spatial axes.
        channels: of the block's output.

    Raises:
        InjectionError: the network has added modules already.
    """
    _refuse_twice(network)
    with _fixed_draws():
        _attach(network, block, "spatial_adapter", ResidualConvolutions(dimension, channels), _add_residual)


def added_modules(network: nn.Module) -> dict[str, nn.Module]:
    """Return name -> added module, each once, under the first name of its block."""
    return {name: module for name, module in network.named_modules() if isinstance(module, _NoOpWithoutWeights)}


def is_added(key: str) -> bool:
    """Return whether a state-dict key belongs to an added module. For files, where there is no network to ask."""
    return any(part in _CHILDREN for part in key.split("."))


def _refuse_twice(network: nn.Module) -> None:
    if found := list(added_modules(network)):
        raise InjectionError(f"this {type(network).__name__} has {found[0]} already; build a new network.")


def _beside(block: Any, width: int, scale: float) -> ParallelBottleneck:
    if not hasattr(block, "output_channels"):
        features = _first(block, (nn.Linear,)).in_features
        return ParallelBottleneck(0, features, features, width=width, scale=scale)
    return ParallelBottleneck(_first(block, _CONVS).weight.ndim - 2, block.input_channels, block.output_channels,
                              stride=block.stride, width=width, scale=scale)


def _first(block: nn.Module, kinds: tuple[type, ...]) -> Any:
    return next(module for module in block.modules() if isinstance(module, kinds))


def _attach(network: nn.Module, block: nn.Module, name: str, module: nn.Module, hook: Any) -> None:
    block.add_module(name, module.to(next(network.parameters()).device))
    block.register_forward_hook(hook)


def _add_parallel(block: Any, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + block.adaptformer(inputs[0])


def _add_residual(block: Any, _: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + block.spatial_adapter(output)


@contextmanager
def _fixed_draws() -> Iterator[None]:
    """Draw the same random numbers in every `with` block, and leave the random state outside unchanged."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        yield
