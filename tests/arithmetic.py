"""How equal two computations of the same sums must be.

Equal bits may be asked of the same computation on the same shapes alone. With another number of channels, images or
threads, and with channels at other places, the libraries below torch take other kernels, which add in another order;
which ones they take depends on the processor.
"""

from __future__ import annotations

import torch


def tolerance(terms: int, *, size: float = 10.0) -> float:
    """The most by which two float32 sums of the same `terms` numbers differ, when added in different orders.

    Each sum is off by at most (terms - 1) units in the last place of `size`, the sum of the absolute values (Higham
    2002, Accuracy and Stability of Numerical Algorithms, equation 4.4). 10 is large for a head that reads normalised
    features.
    """
    return 2 * (terms - 1) * torch.finfo(torch.float32).eps * size


def clear(logits: torch.Tensor, *, by: float) -> torch.Tensor:
    """Where (batch, *space) the largest of the logits (batch, labels, *space) wins, whichever moves by `by`."""
    first, second = logits.topk(2, dim=1).values.unbind(1)
    return first - second > 2 * by
