"""Penalties on how far the trained weights move: L2-SP (Li 2018) and EWC (Kirkpatrick 2017)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigurationError
from ..types import ReadOnlyStateDict, StateDict
from .inject import adapted, original
from .modes import evaluating

Weight = nn.Parameter | nn.Module
"""Where a weight is read: the parameter itself, or the adapted module whose `weight` it is."""


def trained_weights(network: nn.Module, parameters: Iterable[nn.Parameter]) -> dict[str, Weight]:
    """Return canonical weight name -> where it is read, of every weight that training `parameters` changes.

    Low-rank factors are not among them: what they change is the merged weight, and so it counts.
    """
    trained = {id(p) for p in parameters}
    found: dict[str, Weight] = {}
    inside: set[int] = set()
    module: Any
    for name, module in adapted(network).items():
        own = {id(p) for p in module.parametrizations.parameters()}
        inside |= own
        if own & trained:
            found[name] = module
    return found | {name: p for name, p in network.named_parameters() if id(p) in trained - inside}


def effective(weight: Any) -> Tensor:
    """Return the weight that prediction uses, with its gradient; dropout of factors is no distance from the start."""
    if isinstance(weight, nn.Parameter):
        return weight
    with evaluating(weight.parametrizations):
        return weight.weight


class StartPenalty:
    """1/2 sum_i (l2_sp + ewc F_i) (w_i - w0_i)^2 over all weights that are trained.

    L2-SP (arXiv 1802.01483) has F = 0, EWC (arXiv 1612.00796) l2_sp = 0. For adapted modules w is the merged weight
    and w0 the frozen original. The gradient is written out, so a step costs a few passes over the weights.

    Args:
        weights: as `trained_weights` returns them.
        start: w0 of the weights that are parameters; rows that are new there are 0, which makes theirs plain L2.
        fisher: F of all weights, needed where ewc is above 0.

    Raises:
        ConfigurationError: start or fisher lack a weight, or have another shape.
    """

    def __init__(self, weights: Mapping[str, Weight], *, start: ReadOnlyStateDict, l2_sp: float = 0.0, ewc: float = 0.0,
                 fisher: ReadOnlyStateDict | None = None):
        self.weights = dict(weights)
        self.start: StateDict = {}
        self.fisher: StateDict = {}
        self.factors: dict[str, float | Tensor] = {}
        for name, weight in self.weights.items():
            device = effective(weight).device
            if isinstance(weight, nn.Parameter):
                self.start[name] = _fitting(start, name, weight, "start values").to(device)
            if ewc:
                self.fisher[name] = _fitting(fisher or {}, name, effective(weight), "Fisher information").to(device)
            self.factors[name] = l2_sp + ewc * self.fisher[name] if ewc else l2_sp

    def state(self) -> dict[str, StateDict]:
        """Return what an exact resume needs, on the CPU: the arguments start and fisher."""
        return {"start": {k: v.cpu() for k, v in self.start.items()},
                "fisher": {k: v.cpu() for k, v in self.fisher.items()}}

    @torch.no_grad()
    def value(self) -> float:
        """Return the penalty; waits for the device."""
        terms = [(self.factors[n] * self._difference(n).square()).sum() / 2 for n in self.weights]
        return float(torch.stack(terms).sum())

    @torch.no_grad()
    def gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return the gradient with respect to every parameter that requires one at present."""
        found: list[tuple[nn.Parameter, Tensor]] = []
        merged, pulls, factors = [], [], []
        weight: Any
        for name, weight in self.weights.items():
            if isinstance(weight, nn.Parameter):
                if weight.requires_grad:
                    found.append((weight, self.factors[name] * self._difference(name)))
            elif inner := [p for p in weight.parametrizations.parameters() if p.requires_grad]:
                factors += inner
                with torch.enable_grad():
                    merged.append(effective(weight))
                pulls.append(self.factors[name] * (merged[-1].detach() - original(weight)))
        if merged:
            found += zip(factors, torch.autograd.grad(merged, factors, pulls))
        return found

    def _difference(self, name: str) -> Tensor:
        weight = self.weights[name]
        return effective(weight) - (self.start[name] if isinstance(weight, nn.Parameter) else original(weight))


def _fitting(values: ReadOnlyStateDict, name: str, weight: Tensor, what: str) -> Tensor:
    if name not in values or values[name].shape != weight.shape:
        found = tuple(values[name].shape) if name in values else "missing"
        raise ConfigurationError(f"the {what} of {name} are {found}, the weight has shape {tuple(weight.shape)}; they "
                                 f"belong to another network. Train anew.")
    return values[name]
