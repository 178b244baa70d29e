"""Move weights to other labels and channels by name: pure functions from state dict to state dict and report.

Rules for what the donor does not know, chosen so that what it does know is untouched:

- softmax head, new label: the mean of the rows kept. Softmax only sees differences between logits, so the mean row is
  the zero row: at the start a new label never wins against the known ones, and their ranking does not change. Where
  background alone is kept, that mean would be background's row: all rows alike let no gradient through to the network.
  Then it is the mean of all the donor's rows, so that the new labels start where the donor saw any structure.
- sigmoid head (regions), new region: zero weights and bias log(p / (1 - p)) with p = 0.1: absent everywhere at the
  start (the prior of Lin et al. 2017, Focal Loss, section 3.3, larger so that few steps suffice).
- label of a softmax donor -> region: its row minus the background row, which for a donor of one foreground label is
  exactly the same probability. Region of a sigmoid donor -> label: its row beside a background row of zeros, which
  for one region is again exactly the same probability.
- new image channel: zero kernels if at least one channel is known, so that the network computes what it did on the
  known ones; if none is known (another modality) all get the mean of the donor's kernels times (donor channels /
  target channels), so that a signal common to all channels keeps its strength.
- new label fed back by the previous stage of a cascade: zero kernels.
- channel whose contrast is inverted: its kernels negated, so that the network computes what it did on -x.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from ..errors import TransferError
from ..models.checkpoint import alias_sets
from ..types import ReadOnlyStateDict, StateDict
from .match import LabelMatch, NameMatch, NameReport

NEW_REGION_PROBABILITY = 0.1
NO_NAMES = NameMatch(target=(), donor=())


def _replace(weights: ReadOnlyStateDict, changed: Mapping[str, Tensor]) -> StateDict:
    """Put each changed tensor under every name that its old one has."""
    result = dict(weights)
    for names in alias_sets(weights).values():
        for tensor in (changed[n] for n in names if n in changed):
            result |= dict.fromkeys(names, tensor)
    return result


def head_surgery(weights: ReadOnlyStateDict, *, heads: Mapping[str, int],
                 labels: LabelMatch) -> tuple[StateDict, NameReport]:
    """Give every segmentation head the target's rows, by name; all deep-supervision heads alike.

    Args:
        weights: the donor's state dict; it is not changed.
        heads: state-dict key of each head's weight and bias -> dimension of its rows (0 for a convolution's weight, 1
            for a transposed one's, 0 for a bias).
        labels: which rows of the donor the target's rows are.

    Raises:
        TransferError: a head has another number of rows than the donor has names.
    """
    changed = {}
    for key, dim in heads.items():
        rows = weights[key].movedim(dim, 0)  # (donor rows, ...)
        if len(rows) != len(labels.donor):
            raise TransferError(f"Head {key} of the donor has {len(rows)} rows, its dataset.json names "
                                f"{len(labels.donor)}: {', '.join(labels.donor)}. Use its own dataset.json.")
        new = _head_rows(rows, labels, is_bias=rows.ndim == 1)  # (target rows, ...)
        changed[key] = new.movedim(0, dim).contiguous()
    rule = (f"absent at first: zero weights, probability {NEW_REGION_PROBABILITY}" if labels.target_regions
            else "mean of the known rows: never wins at the start, known labels keep their ranking"
            if labels.knows_structure
            else "no label is known: mean of all the donor's rows, so they start where it saw any structure")
    return _replace(weights, changed), labels.report(rule)


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
    """Give the first convolution the target's channels, by name; return reports for images and previous stage.

    Args:
        weights: the donor's state dict; it is not changed.
        stems: state-dict keys of the weights, shape (out, in, *kernel), that read the image.
        channels: which channels of the donor the target's are.
        previous: the same for the labels that a cascade feeds back as channels behind the images.

    Raises:
        TransferError: a stem has another number of channels than the donor has names.
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
    rule = ("zero kernels: the network computes what it did on the known channels" if known
            else "no channel is known: mean of the donor's kernels")
    return _replace(weights, changed), channels.report(rule), previous.report("zero kernels")


def invert_channels(weights: ReadOnlyStateDict, *, stems: tuple[str, ...], channels: tuple[int, ...]) -> StateDict:
    """Negate the kernels of these channels; with padding by zeros that is the network on the negated channels."""
    changed = {}
    for key in stems:
        changed[key] = weights[key].clone()
        changed[key][:, list(channels)] *= -1
    return _replace(weights, changed)
