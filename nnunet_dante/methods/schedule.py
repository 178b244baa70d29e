"""Which groups are trained in which epoch: a function of the epoch alone, so nothing has to be saved."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import ConfigurationError

DIRECTIONS = ("output_first", "input_first")


@dataclass(frozen=True)
class Stage:
    """From epoch `first_epoch` (0-based) on, the groups named in `trainable` are trained, and no others."""

    first_epoch: int
    trainable: tuple[str, ...]


@dataclass(frozen=True)
class Schedule:
    """Stages in the order of their first epochs.

    Example: the head for ten epochs, then everything.

        Schedule((Stage(0, ("head",)), Stage(10, ("head", "decoder.0", "bottleneck", "encoder.0"))))

    Raises:
        ConfigurationError: no stage starts at epoch 0, two start at one epoch, or one trains nothing.
    """

    stages: tuple[Stage, ...]

    def __post_init__(self):
        starts = [stage.first_epoch for stage in self.stages]
        if not starts or starts[0] != 0 or sorted(set(starts)) != starts:
            raise ConfigurationError(f"stages start at epochs {starts}; the first must start at 0, and each one later "
                                     f"than the one before.")
        if empty := [stage.first_epoch for stage in self.stages if not stage.trainable]:
            raise ConfigurationError(f"the stage from epoch {empty[0]} trains nothing; name at least one group.")

    def stage(self, epoch: int) -> Stage:
        """Return the stage of `epoch` (0-based)."""
        return [stage for stage in self.stages if stage.first_epoch <= epoch][-1]


def constant(names: Sequence[str]) -> Schedule:
    """Return the schedule that trains the groups `names` from the first epoch on."""
    return Schedule((Stage(0, tuple(names)),))


def gradual_unfreezing(names: Sequence[str], *, epochs: int, direction: str = "output_first", max_stages: int = 7,
                       open_by: float = 0.5, first: int = 1) -> Schedule:
    """Return the schedule that trains the first groups from epoch 0 and opens the other groups one after the other.

    The stages are equally long, and all groups are open from epoch `open_by * epochs` on. Stages that would begin in
    the same epoch become one.

    Args:
        names: of the groups, in the order of `parameter_groups`, head first.
        epochs: of the whole training.
        direction: "output_first" opens the decoder first and the image side last (ULMFiT, Howard 2018); "input_first"
            opens the encoder's image side first and the decoder's output last (Amiri 2020).
        max_stages: most stages; neighbouring groups share one where there are more groups.
        open_by: share of the epochs after which everything is open.
        first: number of groups that are trained from epoch 0 on; 1 is the head.
    """
    head, rest = list(names[:first]), list(names[first:])
    if direction == "input_first":
        rest.reverse()
    openings = min(max_stages - 1, len(rest))
    trainable = {0: head if openings else head + rest}
    for number in range(1, openings + 1):
        first_epoch = min(math.ceil(open_by * epochs * number / openings), epochs - 1)
        trainable[first_epoch] = head + rest[:math.ceil(len(rest) * number / openings)]
    return Schedule(tuple(Stage(epoch, tuple(open_groups)) for epoch, open_groups in trainable.items()))


def dante_fractions(*, epochs: int, fraction: float = 0.5) -> tuple[tuple[int, float], ...]:
    """Return pairs (first epoch, trainable share of blocks): Dante's schedule (arXiv 2605.03602).

    In a training of E epochs that starts with the share f frozen, the trainable share becomes
    min(1, (1 - f) + e / int(0.75 E)) at every epoch e that is a multiple of max(1, int(0.1 E)). Here f holds from epoch
    0 on; dante-trainer 1.0.3b3 ignores it in trainings of fewer than 20 epochs.

    Args:
        epochs: E.
        fraction: f.
    """
    steps = []
    for epoch in range(0, epochs, max(1, int(0.1 * epochs))):
        steps.append((epoch, min(1.0, (1 - fraction) + epoch / max(1, int(0.75 * epochs)))))
        if steps[-1][1] == 1:
            break
    return tuple(steps)
