"""When a training loss has stopped falling."""

from __future__ import annotations

from collections.abc import Sequence

WINDOW = 10
MIN_GAIN = 1e-3


def on_plateau(losses: Sequence[float], *, patience: int) -> bool:
    """Whether the mean loss of the last 10 epochs is less than 0.001 below that of `patience` epochs before.

    FSEFT's rule (arXiv 2303.17051; there with a patience of 20). Never with a patience of 0, nor in the first
    10 + patience epochs.
    """
    if patience < 1 or len(losses) < WINDOW + patience:
        return False
    now = sum(losses[-WINDOW:]) / WINDOW
    before = sum(losses[-WINDOW - patience:-patience]) / WINDOW
    return before - now < MIN_GAIN
