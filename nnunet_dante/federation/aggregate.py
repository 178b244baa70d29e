"""The arithmetic of a federation: what a round trains, what is refused, and the average. It knows no engine.

Averaging both factors of a low-rank update would be wrong: the mean of the products A_i B_i is not the product of the
mean factors. Two ways are exact:

- "alternating" (RoLoRA, Chen 2024, arXiv 2409.02346): even rounds train B and odd rounds train A, while the other
  factor is the same at every site. Then sum_i w_i A B_i = A (sum_i w_i B_i).
- "frozen" (FFA-LoRA, Sun 2024, arXiv 2403.12313): A stays as it was drawn, and every round trains B.

Norms, biases, stem and heads are averaged as they are, and so is every weight that is trained in full (FedAvg, McMahan
2017, arXiv 1602.05629). A row of a head belongs to a label, and is averaged over the sites that draw this label.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import FederationError
from ..types import ReadOnlyStateDict, StateDict

AVERAGING = ("alternating", "frozen")
BACKGROUND = "background"
_FACTORS = ("lora_A", "lora_B")
_JUDGED = 3  # with fewer sites, nothing tells which norm is the odd one


@dataclass(frozen=True, kw_only=True)
class Update:
    """What a site sends after a round.

    site: its name. cases: number of its training cases, the weight in the average. tensors: name -> trained tensor;
    rows of heads are in the federation's order. draws: the labels that the site draws, without background.
    """

    site: str
    cases: int
    tensors: ReadOnlyStateDict
    draws: frozenset[str]


def frozen_factor(averaging: str, round_: int) -> str:
    """Return the factor that no site trains in this round (0 is the first): "lora_A" or "lora_B".

    Raises:
        FederationError: averaging is unknown.
    """
    if averaging not in AVERAGING:
        raise FederationError(f"averaging is {averaging!r}; choose one of {', '.join(AVERAGING)}.")
    return _FACTORS[round_ % 2 if averaging == "alternating" else 0]


def trained_in(names: Collection[str], averaging: str, round_: int) -> tuple[str, ...]:
    """Return those of `names` that a site trains in this round, and sends."""
    frozen = frozen_factor(averaging, round_)
    return tuple(name for name in names if name.rpartition(".")[2] != frozen)


def refusal(update: Update, expected: ReadOnlyStateDict) -> str | None:
    """Return why an update cannot be averaged, or None if it can.

    expected: name -> tensor of the shape that every site must send.
    """
    if isinstance(update.cases, bool) or not isinstance(update.cases, int) or not 1 <= update.cases < 2**24:
        return f"it says that it has {update.cases!r} training cases"
    if wrong := sorted(expected.keys() ^ update.tensors.keys()):
        what = "does not send" if wrong[0] in expected else "sends"
        return f"it {what} {wrong[0]} ({len(wrong)} names differ from those of this round)"
    for name, tensor in update.tensors.items():
        if tensor.shape != expected[name].shape or tensor.dtype != expected[name].dtype:
            return (f"{name} has shape {tuple(tensor.shape)} and type {tensor.dtype}, and not "
                    f"{tuple(expected[name].shape)} and {expected[name].dtype}")
        if not torch.isfinite(tensor).all():
            return f"{name} holds NaN or infinite numbers"
    return None


def distance(tensors: ReadOnlyStateDict, start: ReadOnlyStateDict) -> float:
    """Return the Euclidean norm of tensors - start over all tensors, the length of an update."""
    return math.sqrt(sum(float((tensor.double() - start[name].double()).square().sum())
                         for name, tensor in tensors.items()))


def far_off(lengths: Mapping[str, float], factor: float) -> dict[str, str]:
    """Return site -> reason for each site whose update is more than `factor` times as long as the median.

    With fewer than three sites, or a factor of 0, none is refused.
    """
    if factor == 0 or len(lengths) < _JUDGED:
        return {}
    typical = statistics.median(lengths.values())
    return {site: f"its update has length {length:.3g}, more than {factor:g} times the median of all sites "
                  f"({typical:.3g})" for site, length in lengths.items() if length > factor * typical}


class Average:
    """The average of the updates of a round, added one by one: memory does not grow with the number of sites.

    Sums are kept in double precision, where float32 times a number of cases is exact. So the average of equal updates
    is this update bit for bit, and the order of the sites does not matter beyond rounding.

    Args:
        labels: names of the rows of heads, in their order.
        heads: name of a head's tensor -> dimension of its rows.
        trim: of each number, leave out the `trim` smallest and the `trim` largest values of all sites, and take the
            mean of the others without weights (Yin 2018, arXiv 1803.01498). 0 takes the mean weighted by cases. Where
            too few sites know a number, as many are left out as leave one or two, which is the median.
    """

    def __init__(self, *, labels: Sequence[str], heads: Mapping[str, int], trim: int = 0) -> None:
        self.labels, self.heads, self.trim = tuple(labels), dict(heads), trim
        self._sums: dict[tuple[str, int | None], _Mean | _TrimmedMean] = {}

    def add(self, update: Update) -> None:
        """Add the update of one site, which `refusal` has accepted."""
        for key, values in self._parts(update):
            total = self._sums.get(key)
            if total is None:
                total = self._sums[key] = _TrimmedMean(self.trim) if self.trim else _Mean()
            total.add(values, update.cases)

    def result(self, start: ReadOnlyStateDict) -> StateDict:
        """Return the average of each tensor; rows of labels that no site draws, and other tensors, are as in `start`.
        """
        averaged = {name: tensor.clone() for name, tensor in start.items()}
        for (name, row), total in self._sums.items():
            if row is None:
                averaged[name] = total.result().to(start[name].dtype)
            else:
                averaged[name].select(self.heads[name], row).copy_(total.result())
        return averaged

    def _parts(self, update: Update) -> Iterator[tuple[tuple[str, int | None], Tensor]]:
        """Yield whole tensors, and of heads those rows whose label the site draws."""
        for name, tensor in update.tensors.items():
            if name not in self.heads:
                yield (name, None), tensor
                continue
            for row, label in enumerate(self.labels):
                if label == BACKGROUND or label in update.draws:
                    yield (name, row), tensor.select(self.heads[name], row)


class _Mean:
    """sum_i w_i x_i / sum_i w_i."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.weight = 0

    def add(self, values: Tensor, weight: int) -> None:
        self.total = self.total + weight * values.double()
        self.weight += weight

    def result(self) -> Tensor:
        return self.total / self.weight  # type: ignore[return-value]


class _TrimmedMean:
    """The mean of each number without its smallest and largest values; keeps 2 * trim values and a sum."""

    def __init__(self, trim: int) -> None:
        self.trim, self.count = trim, 0
        self.low: list[Tensor] = []  # the smallest values so far, ascending
        self.high: list[Tensor] = []  # of the others, the largest so far, descending
        self.middle: Tensor | float = 0.0

    def add(self, values: Tensor, _: int) -> None:
        self.count += 1
        rest: Tensor | None = _insert(self.low, values.double(), self.trim, torch.minimum, torch.maximum)
        if rest is not None:
            rest = _insert(self.high, rest, self.trim, torch.maximum, torch.minimum)
        if rest is not None:
            self.middle = self.middle + rest

    def result(self) -> Tensor:
        if self.count > 2 * self.trim:
            return self.middle / (self.count - 2 * self.trim)  # type: ignore[return-value]
        ordered = torch.stack([*self.low, *self.high]).sort(0).values  # (count, ...)
        trim = (self.count - 1) // 2
        return ordered[trim:self.count - trim].mean(0)


def _insert(kept: list[Tensor], values: Tensor, room: int, keeps, passes_on) -> Tensor | None:
    """Put values into a sorted list of `room` tensors, number by number; return what has no place in it."""
    for i, other in enumerate(kept):
        kept[i], values = keeps(other, values), passes_on(other, values)
    if len(kept) < room:
        kept.append(values)
        return None
    return values
