"""What all mergeable updates of a weight have in common, whatever their arithmetic."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class WeightUpdate(nn.Module):
    """Parametrisation of a weight, for `torch.nn.utils.parametrize`: W -> forward(W), made by a few trained tensors.

    A subclass names its tensors in FACTORS; they are float32, and start as a no-op: forward(W) equals W bit for bit.
    KIND names it in files.
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
        """Return the keyword arguments that make the same kind of update again, as JSON has them."""
        return {}

    def merged(self, weight: Tensor) -> Tensor:
        """Return the updated weight as prediction has it, also in the middle of training; no gradient."""
        training = self.training
        self.training = False
        try:
            with torch.no_grad():
                return self(weight)
        finally:
            self.training = training
