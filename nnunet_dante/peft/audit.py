"""The gradient audit: a proof, before the first step, that every tensor to be trained receives a gradient."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import GradientAuditError
from .modes import evaluating


@dataclass(frozen=True)
class AuditReport:
    """Result of an audit that was passed.

    trainable, total: number of trainable parameters, and of all. tensors: number of trainable tensors.
    """

    trainable: int
    total: int
    tensors: int

    def __str__(self) -> str:
        return (f"Gradient audit passed: {self.tensors} trainable tensors receive a gradient; "
                f"{self.trainable:,} of {self.total:,} parameters are trained ({self.trainable / self.total:.1%}).")


def audit_on_small_patch(network: nn.Module, channels: int, patch_size: Sequence[int]) -> AuditReport:
    """Audit the gradients of `network` with a random patch, the smallest that it accepts.

    Whether a tensor receives a gradient does not depend on the size of the patch, but time and memory do.

    Args:
        network: on the device it is trained on.
        channels: number of image channels.
        patch_size: of the training, in voxels; networks that accept no smaller patch are audited with this one.

    Raises:
        GradientAuditError: as `audit_gradients`.
    """
    device = next(network.parameters()).device

    def audit(size: Sequence[int]) -> AuditReport:
        patch = torch.rand((1, channels, *size), generator=torch.Generator().manual_seed(0))
        return audit_gradients(network, patch.to(device))

    if (small := smallest_patch(network, patch_size)) != tuple(patch_size):
        try:
            return audit(small)
        except Exception:  # an architecture of the user's own may raise anything here; the full patch decides
            pass
    return audit(patch_size)


def smallest_patch(network: nn.Module, patch_size: Sequence[int]) -> tuple[int, ...]:
    """Return the smallest patch, in voxels, that leaves two voxels at a U-Net's bottleneck: norms refuse a single one.

    Networks whose encoder does not tell its strides, such as Primus, get `patch_size` itself.
    """
    strides: Any = getattr(getattr(network, "encoder", None), "strides", None)
    if not isinstance(strides, list | tuple):
        return tuple(patch_size)
    axes = range(len(patch_size))
    sizes = [math.prod(s if isinstance(s, int) else s[axis] for s in strides) for axis in axes]
    longer = [axis for axis in axes if 2 * sizes[axis] <= patch_size[axis]]
    if not longer:
        return tuple(patch_size)
    sizes[min(longer, key=sizes.__getitem__)] *= 2  # the shortest axis costs least
    return tuple(sizes)


def audit_gradients(network: nn.Module, x: Tensor) -> AuditReport:
    """Run `x` forward and the mean squares of all outputs backward; demand a gradient for every trainable tensor.

    A gradient of zero passes (a factor whose partner is zero has one); a missing or non-finite one does not. Weights,
    gradients, modes and random state are left as they were.

    Args:
        network: with `requires_grad` set as for the training.
        x: (batch, channels, *patch) on the network's device.

    Raises:
        GradientAuditError: a trainable tensor is not part of the computation, or its gradient is not finite.
    """
    trainable = {name: p for name, p in network.named_parameters() if p.requires_grad}
    if not trainable:
        raise GradientAuditError(f"nothing in this {type(network).__name__} is trainable; choose a method that trains "
                                 f"something.")
    devices = [x.device] if x.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.enable_grad(), evaluating(network):
        loss = sum(y.float().square().mean() for y in _outputs(network(x)))
        gradients = torch.autograd.grad(loss, list(trainable.values()), allow_unused=True)  # type: ignore[arg-type]
    dead = [name for name, g in zip(trainable, gradients) if g is None]
    if dead:
        raise GradientAuditError(
            f"{len(dead)} of {len(trainable)} trainable tensors receive no gradient: {', '.join(dead[:5])}"
            f"{', ...' if len(dead) > 5 else ''}. Training would not change them, and nothing would show "
            f"it. The network's forward pass does not use them: adapt or unfreeze the modules that it uses.")
    if bad := [name for name, g in zip(trainable, gradients) if not torch.isfinite(g).all()]:
        raise GradientAuditError(f"the gradients of {', '.join(bad[:5])} are not finite at the start; the weights may "
                                 f"hold NaN or infinite numbers.")
    return AuditReport(trainable=sum(p.numel() for p in trainable.values()),
                       total=sum(p.numel() for p in network.parameters()), tensors=len(trainable))


def _outputs(y: object) -> Iterator[Tensor]:
    if isinstance(y, Tensor):
        yield y
    elif isinstance(y, list | tuple):
        for part in y:
            yield from _outputs(part)
