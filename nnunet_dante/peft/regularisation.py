"""Keeping trained weights near their start: L2-SP (Li 2018), EWC (Kirkpatrick 2017), and the loss that applies them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from ..errors import ConfigurationError
from ..types import ReadOnlyStateDict, StateDict
from .inject import adapted, original
from .modes import all_requiring_gradients, evaluating, full_resolution

Weight = nn.Parameter | nn.Module
"""Where to read a weight: the parameter itself, or the adapted module whose `weight` it is."""


def trained_weights(network: nn.Module, parameters: Iterable[nn.Parameter]) -> dict[str, Weight]:
    """Return weight name -> where to read it, for every weight that changes when `parameters` are trained.

    Low-rank factors are not listed. They change a merged weight, and that is listed.
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
    """Return the weight that prediction uses, with its gradient; dropout of factors is switched off."""
    if isinstance(weight, nn.Parameter):
        return weight
    with evaluating(weight.parametrizations):
        return weight.weight


class StartPenalty:
    """The penalty 1/2 sum_i (l2_sp + ewc F_i) (w_i - w0_i)^2, over all trained weights w with start values w0.

    With ewc = 0 this is L2-SP (Li 2018, arXiv 1802.01483), with l2_sp = 0 it is EWC (Kirkpatrick 2017, arXiv
    1612.00796). In adapted modules w is the merged weight and w0 the frozen original. The gradient is computed by its
    formula, so a step costs a few passes over the weights.

    Args:
        weights: as `trained_weights` returns them.
        start: w0 of the weights that are parameters. Rows of new labels must be 0 here: their penalty is plain L2.
        l2_sp, ewc: strengths.
        fisher: F of all weights, as `diagonal_fisher` returns it; needed if ewc is above 0.

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
        """Return the arguments start and fisher, on the CPU: an exact resume needs them."""
        return {"start": {k: v.cpu() for k, v in self.start.items()},
                "fisher": {k: v.cpu() for k, v in self.fisher.items()}}

    @torch.no_grad()
    def value(self) -> float:
        """Return the penalty as a number; this waits for the GPU."""
        terms = [(self.factors[n] * self._difference(n).square()).sum() / 2 for n in self.weights]
        return float(torch.stack(terms).sum())

    @torch.no_grad()
    def gradients(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Return (parameter, gradient of the penalty), for every parameter that requires a gradient now."""
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


def diagonal_fisher(network: nn.Module, weights: Mapping[str, Weight], images: Iterable[Tensor], *,
                    rows: Sequence[int], sigmoid: bool) -> StateDict:
    """Return name -> Fisher information F, in each weight's shape: the mean of (d log p(y|x) / d w_i)^2, scaled.

    The labels y are drawn from the network's own prediction, voxel by voxel (Kirkpatrick 2017, arXiv 1612.00796): no
    mask is needed, and F tells what the network computes now, not what it should learn. The scale of the formula
    depends on the number of voxels. Here F has mean 1, so a penalty with c F is on average as strong as one with c.

    Args:
        network: its mode and gradients are left as they were.
        weights: as `trained_weights` returns them.
        images: batches (batch, channels, *patch) on the network's device; the mean is over single images.
        rows: output channels whose prediction counts.
        sigmoid: whether the outputs are independent regions, not labels that exclude each other.

    Raises:
        ConfigurationError: there is no image, or the prediction depends on none of the weights.
    """
    if len(rows) < 2 - sigmoid:
        raise ConfigurationError("ewc protects what the start weights know, but the donor knows none of these labels; "
                                 "use l2_sp, or labels with the donor's names.")
    totals: dict[str, Tensor] = {}
    with evaluating(network), all_requiring_gradients(network):
        for image in (x[i:i + 1] for x in images for i in range(len(x))):
            with parametrize.cached():  # forward must use the very tensor that the gradient is asked of
                tensors = {name: effective(weight) for name, weight in weights.items()}
                loss = _negative_log_likelihood(network, image, list(rows), sigmoid=sigmoid)
                gradients = torch.autograd.grad(loss, list(tensors.values()), allow_unused=True)
            for (name, tensor), gradient in zip(tensors.items(), gradients):
                square = torch.zeros_like(tensor) if gradient is None else gradient.square()
                totals[name] = totals[name] + square if name in totals else square
    mean = sum(t.sum() for t in totals.values()) / max(1, sum(t.numel() for t in totals.values()))
    if not mean > 0:
        raise ConfigurationError("the Fisher information is 0 for every weight, or there was no image to estimate it "
                                 "from: the start network's prediction does not change with the trained weights. Use "
                                 "l2_sp instead of ewc.")
    return {name: (total / mean).detach() for name, total in totals.items()}


def _negative_log_likelihood(network: nn.Module, image: Tensor, rows: list[int], *, sigmoid: bool) -> Tensor:
    """Return -log p(y|x) of labels y drawn from the prediction, over the root of the number of voxels.

    Squares of the sum over all voxels could leave the range of float32.
    """
    logits = full_resolution(network(image)).float()[:, rows]  # (1, rows, *patch)
    with torch.no_grad():
        if sigmoid:
            labels = torch.bernoulli(logits.sigmoid())
        else:  # Gumbel's trick draws the labels of all voxels at once: (1, *patch)
            labels = (logits - torch.empty_like(logits).exponential_().log()).argmax(1)
    if sigmoid:
        total = functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    else:
        total = functional.cross_entropy(logits, labels, reduction="sum")
    return total / logits[0, 0].numel() ** 0.5


Gradients = Iterable[tuple[nn.Parameter, Tensor]]


class ExtendedLoss(nn.Module):
    """nnU-Net's loss with its own value, whose backward pass adds the gradients of further terms.

    So loss scaling, gradient clipping and the average over the processes of DDP apply to the whole objective, and
    logged losses stay comparable with other trainings and with the validation. The terms are not computed where no
    gradient is, as in the validation.

    Args:
        loss: called with output and target; returns a scalar.
        terms: functions that return pairs (parameter, gradient of the term with respect to it).
    """

    def __init__(self, loss: nn.Module, terms: Iterable[Callable[[], Gradients]]):
        super().__init__()
        self.loss = loss
        self.terms = tuple(terms)

    def forward(self, output: Any, target: Any) -> Tensor:
        """Return the value of nnU-Net's loss."""
        loss = self.loss(output, target)
        if not torch.is_grad_enabled():
            return loss
        with torch.autocast(loss.device.type, enabled=False):
            for term in self.terms:
                parameters, gradients = zip(*pairs) if (pairs := list(term())) else ((), ())
                if parameters:
                    loss = _AddGradients.apply(loss, gradients, *parameters)
        return loss


class _AddGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, loss: Tensor, gradients: tuple[Tensor, ...], *_: Tensor) -> Tensor:
        ctx.gradients = gradients
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        """`upstream` is the loss scale under AMP."""
        return upstream, None, *(upstream.to(g.dtype) * g for g in ctx.gradients)
