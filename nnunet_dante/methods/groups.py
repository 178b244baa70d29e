"""A network's parameters in groups, ordered from the head to the input. Each parameter is in exactly one group."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import ConfigurationError

_CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True)
class Group:
    """Parameters that are opened and frozen together: pairs (name, parameter), each under its first name."""

    name: str
    parameters: tuple[tuple[str, nn.Parameter], ...]

    @property
    def size(self) -> int:
        """The number of parameters in the group."""
        return sum(p.numel() for _, p in self.parameters)


def parameter_groups(network: nn.Module) -> tuple[Group, ...]:
    """Return the groups from output to input. Low-rank factors of a weight are in the group of its module.

    U-Nets: head, decoder.0 (full resolution) to decoder.n, bottleneck, encoder.n to encoder.0 (with the stem).
    Primus: head, decoder, block.n to block.0, stem (patch embedding, tokens, positions).

    Parameters are told apart by identity, not by name: nnU-Net registers a convolution under up to four names.

    Raises:
        ConfigurationError: the network is neither, or has parameters outside these parts.
    """
    names = {id(p): name for name, p in network.named_parameters()}
    groups: list[Group] = []
    taken: set[int] = set()
    for group, modules in _parts(network):
        own = {id(p): p for m in modules for p in (m.parameters() if isinstance(m, nn.Module) else [m])
               if id(p) not in taken}
        taken |= own.keys()
        if own:
            groups.append(Group(group, tuple((names[i], p) for i, p in own.items())))
    if left := [name for i, name in names.items() if i not in taken]:
        raise ConfigurationError(f"{type(network).__name__} has parameters outside head, decoder and encoder: "
                                 f"{', '.join(left[:3])}; it is not known when to train them, so this network "
                                 f"cannot be fine-tuned.")
    return tuple(groups)


def head_modules(network: Any) -> tuple[nn.Module, ...]:
    """Return the layers that produce the segmentation maps, one per resolution."""
    if _is_unet(network):
        return tuple(network.decoder.seg_layers)
    if _is_primus(network):
        return (_layers(network.up_projection)[-1],)
    raise _unknown(network)


def stem_modules(network: Any) -> tuple[nn.Module, ...]:
    """Return the layers that read the image: the first one, and that of an AdaptFormer module beside it, if any."""
    if _is_unet(network):
        first = _layers(network.encoder)[0]
        block = next(module for module in network.modules() if first in module.children())
        return (first, *_layers(block.adaptformer)[:1]) if hasattr(block, "adaptformer") else (first,)
    if _is_primus(network):
        return (_layers(network.down_projection)[0],)
    raise _unknown(network)


def blocks(network: Any) -> tuple[nn.Module, ...]:
    """Return the network's blocks: convolutions with norm and activation, residual blocks, or transformer MLPs.

    Transposed convolutions are not blocks: they are linear, and the block behind them reads their output.
    """
    if _is_primus(network):
        return tuple(block.mlp for block in network.eva.blocks)
    if not _is_unet(network):
        raise _unknown(network)
    return tuple({id(block): block for module in network.modules() for part in ("convs", "blocks")
                  for block in getattr(module, part, ())}.values())


def stages(network: Any) -> tuple[nn.Module, ...]:
    """Return the parts that hold nearly all of a network's features: a U-Net's stages, a transformer's blocks."""
    if _is_primus(network):
        return tuple(network.eva.blocks)
    if not _is_unet(network):
        raise _unknown(network)
    stem = getattr(network.encoder, "stem", None)  # residual encoders have one
    return (*([stem] if stem is not None else []), *network.encoder.stages, *network.decoder.stages)


def features_of_head(network: Any) -> nn.Module:
    """Return the module whose output the full-resolution head reads.

    Raises:
        ConfigurationError: the network is a Primus whose head reads the transformer directly.
    """
    if _is_unet(network):
        return network.decoder.stages[-1]
    if not _is_primus(network):
        raise _unknown(network)
    before = [m for m in network.up_projection.modules() if not list(m.children())]
    if len(before) < 2:
        raise ConfigurationError(f"this {type(network).__name__} has no layer between its transformer and its head; "
                                 f"use nnUNetTrainerAdaptFormer.")
    return before[-2]  # not the Sequential around it, which would run a module added to it as one more layer


def low_rank_targets(network: nn.Module) -> tuple[nn.Module, ...]:
    """Return every convolution, transposed convolution and linear layer once, except head and stem."""
    full = {id(module) for module in (*head_modules(network), *stem_modules(network))}
    return tuple(module for module in _layers(network) if id(module) not in full)


def _layers(network: nn.Module) -> list[nn.Module]:
    return [m for m in network.modules() if isinstance(m, (*_CONVS, *_TRANSPOSED, nn.Linear))]


def _parts(network: nn.Module) -> Iterator[tuple[str, list]]:
    if _is_unet(network):
        return _unet_parts(network)
    if _is_primus(network):
        return _primus_parts(network)
    raise _unknown(network)


def _is_unet(network: nn.Module) -> bool:
    decoder = getattr(network, "decoder", None)
    return hasattr(getattr(network, "encoder", None), "stages") and all(
        hasattr(decoder, part) for part in ("stages", "transpconvs", "seg_layers"))


def _is_primus(network: nn.Module) -> bool:
    return hasattr(getattr(network, "eva", None), "blocks") and all(
        hasattr(network, part) for part in ("down_projection", "up_projection"))


def _unet_parts(network: Any) -> Iterator[tuple[str, list]]:
    encoder, decoder = network.encoder, network.decoder
    yield "head", list(decoder.seg_layers)
    levels = list(zip(decoder.stages, decoder.transpconvs))[::-1]  # registered deepest first
    for level, modules in enumerate(levels):
        yield f"decoder.{level}", list(modules)
    stages = list(encoder.stages)
    yield "bottleneck", [stages[-1]]
    for level in reversed(range(len(stages) - 1)):
        yield f"encoder.{level}", [stages[level]] if level else [encoder]  # the last one includes the stem


def _primus_parts(network: Any) -> Iterator[tuple[str, list]]:
    yield "head", list(head_modules(network))
    yield "decoder", [network.up_projection]
    blocks = list(network.eva.blocks)
    for level in reversed(range(len(blocks))):
        yield f"block.{level}", [blocks[level]]
    yield "stem", [network]


def _unknown(network: nn.Module) -> ConfigurationError:
    return ConfigurationError(
        f"the parts of a {type(network).__name__} are not known. Supported are U-Nets with encoder.stages, "
        f"decoder.stages, .transpconvs and .seg_layers (PlainConvUNet, ResidualEncoderUNet), and Primus.")
