"""Small nonlinear modules added to a network's blocks; they start as a no-op, and no weight can take them up.

An added module is a child of its block and runs in a forward hook. Both go by the block's identity, so every alias of
the block has it, and every stock key stays what it was. The hooks are plain functions that reach the child through the
block they are called with: copies of the network use their own.
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
    """Base: `up` is zero at first, and again whenever a state dict without this module is loaded."""

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
    transformer. `down` (inputs -> width) and `up` (width -> outputs) are 1x1 convolutions or linear layers. A stride
    is taken by the mean over its voxels, as in nnU-Net's residual skips: a strided 1x1 convolution would not look at
    seven of eight voxels (He 2019, arXiv 1812.01187). `down` starts as Kaiming uniform (a = sqrt 5), biases and `up`
    as zero.

    Args:
        dimension: of the space, 1 to 3; 0 for a transformer's tokens.
        stride: of the block, one number a spatial axis.
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
    """up(ReLU(down(x))) of two 3^d convolutions without bias: FSEFT's Spatial Adapter (Silva-Rodriguez 2025).

    x: (batch, channels, *space), and so is the result. `up` starts as zero.
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
    """Give each of `blocks` a `ParallelBottleneck` from its input to its output, as its child "adaptformer".

    Blocks are convolution blocks with input_channels, output_channels and stride, or the MLPs of a transformer. The
    modules start with the same numbers in every training, so that trainings of one base can be averaged.

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
    """Give `block` residual convolutions of its output, of `channels` channels, as its child "spatial_adapter".

    They start with the same numbers in every training.

    Raises:
        InjectionError: the network has added modules already.
    """
    _refuse_twice(network)
    with _fixed_draws():
        _attach(network, block, "spatial_adapter", ResidualConvolutions(dimension, channels), _add_residual)


def added_modules(network: nn.Module) -> dict[str, nn.Module]:
    """Return name -> added module, each once, by the name under which its block was registered first."""
    return {name: module for name, module in network.named_modules() if isinstance(module, _NoOpWithoutWeights)}


def is_added(key: str) -> bool:
    """Whether a state-dict key is that of an added module; for files, whose modules are not at hand."""
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
    """Draw the same numbers every time within, and leave the random state outside as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        yield
