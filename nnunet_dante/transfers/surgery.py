"""Move weights to other labels and channels by name: pure functions that return a new state dict and a report.

The rules for labels and channels that the donor does not know leave those that it does know as they are:

- softmax head, new label: the mean of the rows kept. Softmax only sees differences between logits, so the mean row is
  the zero row: at the start a new label never wins against the known ones, and their ranking does not change. Where
  only background is known, this mean would be background's row, and if all rows are equal, no gradient reaches the
  network. Then it is the mean of all the donor's rows, so that new labels start where the donor saw any structure.
- sigmoid head (regions), new region: zero weights and bias log(p / (1 - p)) with p = 0.1: absent everywhere at the
  start (the prior of Lin et al. 2017, Focal Loss, section 3.3, larger so that few steps suffice).
- label of a softmax donor -> region: its row minus the background row. If the donor has one foreground label, the
  probability stays exactly the same. Region of a sigmoid donor -> label: its row, and a background row of zeros. If
  there is one region, the probability again stays exactly the same.
- new image channel: zero kernels if at least one channel is known, so that the network computes the same as before
  from the known ones. If none is known (another modality), each gets the mean of the donor's kernels times (donor
  channels / target channels), so that a signal that all channels share keeps its strength.
- new label fed back by the previous stage of a cascade: zero kernels.
- channel whose contrast is inverted: its negated kernels, so that the network computes for x what it did for -x.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import TransferError
from ..models.checkpoint import replaced
from ..types import ReadOnlyStateDict, StateDict
from .match import LabelMatch, NameMatch, NameReport

NEW_REGION_PROBABILITY = 0.1
NO_NAMES = NameMatch(target=(), donor=())


def head_surgery(weights: ReadOnlyStateDict, *, heads: Mapping[str, int],
                 labels: LabelMatch) -> tuple[StateDict, NameReport]:
    """Give every segmentation head, also those of deep supervision, the rows of the target's labels by name.

    Args:
        weights: the donor's state dict; it is not changed.
        heads: what `models.network.head_rows` returns: {key of a weight or bias: dimension of its rows}.
        labels: the labels of target and donor.

    Raises:
        TransferError: the number of rows of a head is not the number of the donor's labels.
    """
    changed = {}
    for key, dim in heads.items():
        rows = weights[key].movedim(dim, 0)  # (donor rows, ...)
        if len(rows) != len(labels.donor):
            raise TransferError(f"Head {key} of the donor has {len(rows)} rows, its dataset.json names "
                                f"{len(labels.donor)}: {', '.join(labels.donor)}. Use its own dataset.json.")
        new = _head_rows(rows, labels, is_bias=rows.ndim == 1)  # (target rows, ...)
        changed[key] = new.movedim(0, dim).contiguous()
    rule = (f"start absent: zero weights, probability {NEW_REGION_PROBABILITY}" if labels.target_regions
            else "start as the mean of the known labels, so they never win before training"
            if labels.knows_structure
            else "start as the mean of all the donor's labels, where it saw any structure")
    return replaced(weights, changed), labels.report(rule)


def _head_rows(rows: Tensor, labels: LabelMatch, *, is_bias: bool) -> Tensor:
    known: dict[str, Tensor] = {}
    for name, i in zip(labels.target, labels.source):
        if i is not None:
            known[name] = rows[i] - rows[0] if labels.target_regions and not labels.donor_regions else rows[i]
    if labels.donor_regions and not labels.target_regions:
        known["background"] = torch.zeros_like(rows[0])
    if labels.target_regions:
        prior = math.log(NEW_REGION_PROBABILITY / (1 - NEW_REGION_PROBABILITY))
        new = torch.full_like(rows[0], prior if is_bias else 0.0)
    else:
        unknown = [] if labels.knows_structure else [
            row for i, row in enumerate(rows) if i not in labels.source]
        new = torch.stack([*known.values(), *unknown]).mean(0)
    return torch.stack([known.get(name, new) for name in labels.target])


def stem_surgery(weights: ReadOnlyStateDict, *, stems: tuple[str, ...], channels: NameMatch,
                 previous: NameMatch = NO_NAMES) -> tuple[StateDict, NameReport, NameReport]:
    """Give the first convolution the target's channels by name; also return a report on images and previous stage.

    Args:
        weights: the donor's state dict; it is not changed.
        stems: state-dict keys of the weights, shape (out, in, *kernel), that read the image.
        channels: the channels of target and donor.
        previous: the labels that a cascade's second stage reads as further channels.

    Raises:
        TransferError: the number of channels of a stem is not the number of the donor's channels.
    """
    changed, known = {}, any(i is not None for i in channels.source)
    for key in stems:
        kernels = weights[key].unbind(1)  # one of shape (out, *kernel) per channel
        if len(kernels) != len(channels.donor) + len(previous.donor):
            raise TransferError(f"Stem {key} of the donor reads {len(kernels)} channels, its dataset.json names "
                                f"{', '.join(channels.donor + previous.donor)}. Use the dataset.json it was trained "
                                "with.")
        new = zero = torch.zeros_like(kernels[0])
        if not known:
            new = torch.stack(kernels[: len(channels.donor)]).mean(0) * (len(channels.donor) / len(channels.target))
        stem = [new if i is None else kernels[i] for i in channels.source]
        stem += [zero if i is None else kernels[len(channels.donor) + i] for i in previous.source]
        changed[key] = torch.stack(stem, dim=1)
    rule = ("start with zero kernels, so the network computes the same as before from the known channels" if known
            else "start as the mean of the donor's kernels, because it knows none of them")
    return replaced(weights, changed), channels.report(rule), previous.report("start with zero kernels")


def invert_channels(weights: ReadOnlyStateDict, *, stems: tuple[str, ...], channels: tuple[int, ...]) -> StateDict:
    """Negate the kernels of these channels. As padding is zero, the network then acts as on the negated channels."""
    changed = {}
    for key in stems:
        changed[key] = weights[key].clone()
        changed[key][:, list(channels)] *= -1
    return replaced(weights, changed)
