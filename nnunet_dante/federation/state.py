"""The tensors that sites train and send: taken from a network, and put into it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..methods.plan import TrainingPlan
from ..peft.inject import factors
from ..transfers.match import match_names
from ..types import ReadOnlyStateDict, StateDict


def trained_tensors(network: nn.Module, plan: TrainingPlan) -> StateDict:
    """Return name -> tensor of all that a training changes, as in an adapter file; they share memory with the network.

    These are factors ("WEIGHT NAME.lora_A"), parameters that are trained in full, and running statistics of norms.
    """
    tensors = factors(network)
    inner = {tensor.data_ptr() for tensor in tensors.values()}
    for group in plan.groups:
        tensors |= {name: p.detach() for name, p in group.parameters if p.data_ptr() not in inner}
    tensors |= {f"{prefix}.{name}": buffer for prefix, module in network.named_modules()
                if isinstance(module, _NormBase)
                for name, buffer in module.named_buffers(recurse=False) if buffer.is_floating_point()}
    return dict(sorted(tensors.items()))


@torch.no_grad()
def put(values: ReadOnlyStateDict, targets: StateDict) -> None:
    """Copy values into the tensors of a network with these names."""
    for name, value in values.items():
        targets[name].copy_(value)


def reordered(tensors: ReadOnlyStateDict, heads: Mapping[str, int], *, given: Sequence[str],
              wanted: Sequence[str]) -> StateDict:
    """Return tensors whose head rows are in another order of labels.

    heads: head tensor -> dimension of its rows. given, wanted: the same labels in the order of `tensors`, and of the
    result.
    """
    order = torch.tensor([i for i in match_names(wanted, given) if i is not None])
    return {name: _rows(tensor, heads[name], order) if name in heads else tensor for name, tensor in tensors.items()}


def _rows(tensor: Tensor, dim: int, order: Tensor) -> Tensor:
    return tensor.index_select(dim, order.to(tensor.device))


def spelled(name: str, labels: Sequence[str]) -> str:
    """Return a label as the federation spells it."""
    (position,) = match_names([name], labels)
    return name if position is None else labels[position]
