"""What all mergeable updates of a weight have in common, and the simplest of them: an update of a kernel's centre."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import ConfigurationError


class WeightUpdate(nn.Module):
    """A parametrisation of a weight, for `torch.nn.utils.parametrize`: W -> forward(W), with a few trained tensors.

    A subclass names its trained tensors, which are float32, in FACTORS, and itself, for files, in KIND. It starts as a
    no-op: forward(W) equals W bit for bit.
    """

    KIND: ClassVar[str]
    FACTORS: ClassVar[tuple[str, ...]] = ()

    def factors(self) -> dict[str, nn.Parameter]:
        """Return name -> trained tensor."""
        return {name: getattr(self, name) for name in self.FACTORS}

    def reset(self) -> None:
        """Make the update a no-op; draws no random numbers."""
        raise NotImplementedError

    def settings(self) -> dict[str, Any]:
        """Return the keyword arguments that make the same kind of update again, ready for JSON."""
        return {}

    def merged(self, weight: Tensor) -> Tensor:
        """Return the updated weight as prediction uses it, without dropout and without a gradient."""
        training = self.training
        self.training = False
        try:
            with torch.no_grad():
                return self(weight)
        finally:
            self.training = training


def interpolated(start: Tensor, trained: Tensor, strength: float) -> Tensor:
    """Return start + strength * (trained - start), in float32; 0 and 1 return the tensors as they are.

    Of integer tensors, which have no values between, the trained one counts as soon as the strength is above 0.
    """
    if strength in (0, 1) or not trained.is_floating_point():
        return trained if strength else start
    return torch.lerp(start.float(), trained.float(), strength).to(trained.dtype)


def has_centre(shape: Sequence[int]) -> bool:
    """Return whether the kernel of a weight (out, in, *kernel) has a centre: all of its sizes must be odd."""
    return len(shape) > 2 and all(size % 2 for size in shape[2:])


class PointwiseDelta(WeightUpdate):
    """W[:, :, centre] -> W[:, :, centre] + P. The same as a parallel 1x1 convolution with weight P, without bias.

    With the padding of nnU-Net, (kernel - 1) / 2 * dilation, and at any stride and number of groups:
    conv(x; W + P at the centre) = conv(x; W) + conv1x1(x; P). Source: parallel residual adapters (Rebuffi 2018, arXiv
    1803.10082), FSEFT's AdapterCNN. P is the factor `pointwise`, (out, in / groups), and starts as zero.

    Args:
        shape: of the weight, (out, in / groups, *kernel).
        device: of the factor.

    Raises:
        ConfigurationError: the kernel has no centre.
    """

    KIND = "conv_adapter"
    FACTORS = ("pointwise",)

    def __init__(self, shape: Sequence[int], *, device: torch.device | None = None):
        super().__init__()
        if not has_centre(shape):
            raise ConfigurationError(f"a weight of shape {tuple(shape)} has no kernel with a centre; choose "
                                     f"convolutions whose kernel sizes are all odd.")
        # functional.pad takes the last axis first, and two numbers for each axis.
        self.padding = [size // 2 for size in reversed(shape[2:]) for _ in (0, 1)]
        self.pointwise = nn.Parameter(torch.zeros(tuple(shape[:2]), device=device))

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight with the update, in the weight's dtype."""
        centre = self.pointwise[(..., *[None] * (len(self.padding) // 2))]  # (out, in / groups, 1, ..., 1)
        return weight + functional.pad(centre, self.padding).to(weight.dtype)

    def reset(self) -> None:
        """Make the update zero."""
        with torch.no_grad():
            self.pointwise.zero_()
