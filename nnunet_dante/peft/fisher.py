"""The diagonal Fisher information: on which weights a network's own prediction depends."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrize

from ..errors import ConfigurationError
from ..types import StateDict
from .modes import all_requiring_gradients, evaluating, full_resolution
from .penalty import Weight, effective


def diagonal_fisher(network: nn.Module, weights: Mapping[str, Weight], images: Iterable[Tensor], *,
                    rows: Sequence[int], sigmoid: bool) -> StateDict:
    """Return name -> F, of each weight's shape, with F_i the mean of (d log p(y|x) / d w_i)^2, scaled to mean 1.

    y is drawn from the network's own prediction, voxel by voxel (Kirkpatrick 2017, arXiv 1612.00796): no label is
    needed, and what counts is what the network computes now, not what it should learn. The true scale depends on the
    numbers of voxels; with mean 1 a penalty of c F is as strong as one of c on the average.

    Args:
        images: batches (batch, channels, *patch) on the network's device; each image counts by itself.
        rows: outputs whose prediction counts. sigmoid: they are independent regions, not exclusive labels.

    Raises:
        ConfigurationError: there is no image, or the prediction depends on none of the weights.
    """
    if len(rows) < 2 - sigmoid:
        raise ConfigurationError("ewc protects what the start weights know, but the donor knows none of these labels; "
                                 "use l2_sp, or labels with the donor's names.")
    totals: dict[str, Tensor] = {}
    with evaluating(network), all_requiring_gradients(network):
        for image in (x[i:i + 1] for x in images for i in range(len(x))):
            with parametrize.cached():  # forward and the gradient must mean the same merged weight
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
    """Of labels drawn from the prediction; divided by the root of their number, which keeps squares in range."""
    logits = full_resolution(network(image)).float()[:, rows]
    with torch.no_grad():
        if sigmoid:
            labels = torch.bernoulli(logits.sigmoid())
        else:  # Gumbel's trick draws all voxels at once
            labels = (logits - torch.empty_like(logits).exponential_().log()).argmax(1)
    if sigmoid:
        total = functional.binary_cross_entropy_with_logits(logits, labels, reduction="sum")
    else:
        total = functional.cross_entropy(logits, labels, reduction="sum")
    return total / logits[0, 0].numel() ** 0.5
