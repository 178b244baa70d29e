"""Adding mergeable updates to a network's weights in place, and removing them again.

The module objects themselves are changed, through `torch.nn.utils.parametrize`. nnU-Net's networks register each
convolution under up to four names; replacing modules by name would change names that the forward pass never uses.

`state_dict()` keeps the stock keys. On saving, a key carries the merged weight. On loading, a stock weight becomes the
frozen original, and the factors become a no-op.

    names = inject(network, low_rank_targets(network), rank=8)   # train what still requires a gradient, then
    torch.save(network.state_dict(), "stock.pth")                # loads into a network that was never adapted
    merge(network)                                               # or remove(network), for the weights of before
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from ..errors import InjectionError
from ..types import ReadOnlyStateDict, StateDict
from .low_rank import LowRankDelta, capped_rank
from .update import WeightUpdate

_PARAMETRIZATIONS = "parametrizations.weight."
_ORIGINAL = f"{_PARAMETRIZATIONS}original"


def inject(network: nn.Module, modules: Iterable[nn.Module], *, rank: int = 8, alpha: float = 16.0,
           factorisation: str = "channel") -> tuple[str, ...]:
    """Add low-rank factors to the weights of `modules`, freeze the originals, and return the adapted weights' names.

    A module whose factors would have as many parameters as its weight is not changed. Nothing else is frozen.

    Args:
        network: changed in place.
        modules: layers of the network with a weight of at least two dimensions.
        rank: of the factors, at least 1.
        alpha: strength of the update, which is scaled by alpha / rank.
        factorisation: "channel" or "flat", see `LowRankDelta`.

    Raises:
        ConfigurationError: rank or factorisation is not allowed.
        InjectionError: as `attach`.
    """
    layers: Iterable[Any] = checked_layers(network, modules)
    return attach(network, {layer: LowRankDelta(layer.weight.shape, rank=rank, alpha=alpha,
                                                factorisation=factorisation, device=layer.weight.device)
                            for layer in layers
                            if capped_rank(layer.weight.shape, rank, factorisation=factorisation)})


def attach(network: nn.Module, updates: Mapping[nn.Module, WeightUpdate]) -> tuple[str, ...]:
    """Add an update to the weight of each module, freeze the originals, and return the adapted weights' names.

    Args:
        network: changed in place.
        updates: layer of the network -> update of its weight.

    Raises:
        InjectionError: the network is adapted already, or a module is not part of it, or has no weight of at least two
            dimensions.
    """
    for module in checked_layers(network, updates):
        parametrize.register_parametrization(module, "weight", updates[module])
        original(module).requires_grad_(False)
    network._update_hooks = (  # type: ignore[assignment]
        network.register_state_dict_post_hook(_to_stock), network.register_load_state_dict_pre_hook(_from_stock))
    return tuple(adapted(network))


def checked_layers(network: nn.Module, modules: Iterable[nn.Module]) -> tuple[nn.Module, ...]:
    """Return `modules` after checking that all are layers of the network, and that it has no updates yet.

    Raises:
        InjectionError: as `attach`.
    """
    if adapted(network):
        raise InjectionError(f"this {type(network).__name__} is adapted already; call merge or remove first.")
    inside, modules = {id(module) for module in network.modules()}, tuple(modules)
    for module in modules:
        weight = getattr(module, "weight", None)
        if id(module) not in inside or not isinstance(weight, nn.Parameter) or weight.ndim < 2:
            raise InjectionError(f"{module} is not a layer of this {type(network).__name__} with a weight of at least "
                                 f"two dimensions; choose from methods.groups.low_rank_targets(network).")
    return modules


def adapted(network: nn.Module) -> dict[str, nn.Module]:
    """Return weight name -> module of all adapted weights. The name is that under which a module was registered first.
    """
    return {f"{name}.weight".lstrip("."): module for name, module in network.named_modules() if _is_adapted(module)}


def merge(network: nn.Module) -> None:
    """Write the updates into the weights. Stock modules remain, and the network computes what it computed before."""
    _unparametrise(network, keep_update=True)


def remove(network: nn.Module) -> None:
    """Drop the updates. Stock modules remain, with the base weights bit for bit."""
    _unparametrise(network, keep_update=False)


def factors(network: nn.Module) -> StateDict:
    """Return "WEIGHT NAME.FACTOR", such as "stem.weight.lora_A" -> factor, for every adapted weight."""
    return {name: factor.detach() for name, factor in _factors(network).items()}


def settings(network: nn.Module) -> dict[str, dict[str, Any]]:
    """Return weight name -> {"kind": ..., and the options that its update was made with}, ready for JSON."""
    return {name: {"kind": update(module).KIND, **update(module).settings()}
            for name, module in adapted(network).items()}


def load_split(network: nn.Module, *, base: ReadOnlyStateDict, factors: ReadOnlyStateDict) -> None:
    """Set originals and factors to exactly these values.

    Args:
        network: adapted by the same method and options as the network that the values come from.
        base: name of an adapted weight -> its frozen original.
        factors: as `factors` returns them.

    Raises:
        InjectionError: keys or shapes differ from the network's; nothing was changed.
    """
    targets = {name: original(module) for name, module in adapted(network).items()} | _factors(network)
    given = {**base, **factors}
    if wrong := sorted(targets.keys() ^ given.keys()) or [
            k for k in targets if targets[k].shape != given[k].shape]:
        raise InjectionError(f"base and factors do not belong to this network: {len(wrong)} tensors differ in name or "
                             f"shape, first {wrong[0]!r}. Adapt it as the network was that they come from.")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(given[name])


def original(module: Any) -> nn.Parameter:
    """Return the frozen original of an adapted module's weight."""
    return module.parametrizations["weight"].original


def update(module: Any) -> WeightUpdate:
    """Return the update of an adapted module's weight."""
    return module.parametrizations["weight"][0]


def _is_adapted(module: nn.Module) -> bool:
    return parametrize.is_parametrized(module, "weight") and isinstance(update(module), WeightUpdate)


def _factors(network: nn.Module) -> dict[str, nn.Parameter]:
    return {f"{name}.{factor}": parameter for name, module in adapted(network).items()
            for factor, parameter in update(module).factors().items()}


def _merged(module: nn.Module) -> torch.Tensor:
    return update(module).merged(original(module))


def _by_prefix(network: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """Return key prefix -> adapted module, for every name of each module."""
    return {f"{prefix}{name}." if name else prefix: module  # without a name: the network itself is the layer
            for name, module in network.named_modules(remove_duplicate=False) if _is_adapted(module)}


def _owner(key: str, modules: dict[str, nn.Module]) -> str | None:
    """Return the prefix of the adapted module whose bias, original or factor has this key."""
    owner = key.removesuffix("bias") if key.endswith("bias") else key.partition(_PARAMETRIZATIONS)[0]
    return owner if owner in modules else None


def _to_stock(network: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """Put the merged weight under its stock key, in the stock order (before the bias); all names share one tensor."""
    modules = _by_prefix(network, prefix)
    merged = {id(module): _merged(module) for module in set(modules.values())}
    items = list(state.items())
    state.clear()
    for key, value in items:
        owner = _owner(key, modules)
        if owner is not None:
            state.setdefault(f"{owner}weight", merged[id(modules[owner])])
        if owner is None or key.endswith("bias"):
            state[key] = value


def _from_stock(network: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load a stock weight into the frozen original, and make the factors a no-op."""
    for owner, module in _by_prefix(network, prefix).items():
        if (key := f"{owner}weight") in state:
            state[f"{owner}{_ORIGINAL}"] = state.pop(key)
            update(module).reset()
            for name, factor in update(module).factors().items():
                state[f"{owner}{_PARAMETRIZATIONS}0.{name}"] = factor.detach()


def _unparametrise(network: nn.Module, *, keep_update: bool) -> None:
    modules = adapted(network)
    if not modules:
        raise InjectionError(f"the weights of this {type(network).__name__} have no updates to merge or remove; "
                             f"call inject first.")
    module: Any
    for module in modules.values():
        weight = nn.Parameter(_merged(module)) if keep_update else original(module)
        weight.requires_grad_(True)
        # Not parametrize.remove_parametrizations: it deletes the property from a class that deep copies share.
        module.__class__ = parametrize.type_before_parametrizations(module)
        del module.parametrizations
        bias = module._parameters.pop("bias", None)
        module.register_parameter("weight", weight)
        module.register_parameter("bias", bias)  # stock order: the weight before the bias
    for handle in network._update_hooks:  # type: ignore[union-attr]
        handle.remove()
    del network._update_hooks
