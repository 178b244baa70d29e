"""Which groups are trained at which epoch, as a pure function: nothing to save, nothing to resume wrongly."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigurationError

DIRECTIONS = ("output_first", "input_first")


@dataclass(frozen=True)
class Stage:
    """From `first_epoch` on (0-based), the groups named in `trainable` are trained and no others."""

    first_epoch: int
    trainable: tuple[str, ...]


@dataclass(frozen=True)
class Schedule:
    """Stages in order of their first epochs.

    Raises:
        ConfigurationError: no stage starts at epoch 0, two start at one epoch, or one trains nothing.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self):
        starts = [stage.first_epoch for stage in self.stages]
        if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
            raise ConfigurationError(f"stages start at epochs {starts}; the first must be 0, each later than the one "
                                     f"before.")
        if empty := [stage.first_epoch for stage in self.stages if not stage.trainable]:
            raise ConfigurationError(f"the stage from epoch {empty[0]} trains nothing; name at least one group.")

    def stage(self, epoch: int) -> Stage:
        """Return the stage that `epoch` (0-based) is in."""
        return [stage for stage in self.stages if stage.first_epoch <= epoch][-1]


def constant(names: Sequence[str]) -> Schedule:
    """Return one stage with all of `names`."""
    return Schedule((Stage(0, tuple(names)),))


def gradual_unfreezing(names: Sequence[str], *, epochs: int, direction: str = "output_first", max_stages: int = 7,
                       open_by: float = 0.5) -> Schedule:
    """Open groups one after the other at even distances, all by epoch `open_by * epochs`; the head from epoch 0 on.

    Args:
        names: of the groups in the order of `parameter_groups`, head first.
        direction: "output_first" goes on with the decoder and ends at the image (ULMFiT); "input_first" goes on with
            the encoder at the image and ends at the decoder's output (Amiri 2020).
        max_stages: neighbours share a stage where there would be more. Where two stages fall on one epoch they merge.
    """
    head, rest = list(names[:1]), list(names[1:])
    if direction == "input_first":
        rest.reverse()
    openings = min(max_stages - 1, len(rest))
    trainable = {0: head if openings else head + rest}
    for number in range(1, openings + 1):
        first_epoch = min(math.ceil(open_by * epochs * number / openings), epochs - 1)
        trainable[first_epoch] = head + rest[:math.ceil(len(rest) * number / openings)]
    return Schedule(tuple(Stage(epoch, tuple(open_groups)) for epoch, open_groups in trainable.items()))


def dante_fractions(*, epochs: int, fraction: float = 0.5) -> tuple[tuple[int, float], ...]:
    """Return (first epoch, trainable share of blocks) as Dante opens them, arXiv 2605.03602, dante-trainer 1.0.3b3.

    With E epochs and a share f frozen at first: every max(1, int(0.1 E)) epochs e the trainable share becomes
    min(1, (1 - f) + e / int(0.75 E)). Here f holds from epoch 0 for every E; there it is ignored for E below 20.
    """
    steps = []
    for epoch in range(0, epochs, max(1, int(0.1 * epochs))):
        steps.append((epoch, min(1.0, (1 - fraction) + epoch / max(1, int(0.75 * epochs)))))
        if steps[-1][1] == 1:
            break
    return tuple(steps)
