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
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import TransferError
from ..models.checkpoint import alias_sets
from ..models.labels import match
from ..types import ReadOnlyStateDict, StateDict

NEW_REGION_PROBABILITY = 0.1


@dataclass(frozen=True, kw_only=True)
class NameReport:
    """What surgery did with a list of names; `rule` says how the new ones start ("" if there are none)."""

    matched: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]
    rule: str = ""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The rows of a segmentation head: names in order, and whether they are sigmoid regions or softmax labels."""

    names: tuple[str, ...]
    regions: bool = False


def _report(target: tuple[str, ...], donor: tuple[str, ...], rule: str) -> NameReport:
    found = match(target, donor)
    new = tuple(n for n, i in zip(target, found) if i is None)
    return NameReport(matched=tuple(n for n, i in zip(target, found) if i is not None), new=new,
                      dropped=tuple(n for i, n in enumerate(donor) if i not in found), rule=rule if new else "")


def _replace(weights: ReadOnlyStateDict, changed: Mapping[str, Tensor]) -> StateDict:
    """Put each changed tensor under every name that its old one has."""
    result = dict(weights)
    for names in alias_sets(weights).values():
        for tensor in (changed[n] for n in names if n in changed):
            result |= dict.fromkeys(names, tensor)
    return result


def head_surgery(weights: ReadOnlyStateDict, *, heads: Mapping[str, int], donor: Rows,
                 target: Rows) -> tuple[StateDict, NameReport]:
    """Give every head the rows of `target`, by name; all deep-supervision heads alike.

    heads: state-dict key of each head's weight and bias -> dimension of its rows (0 for a convolution's weight, 1 for
    a transposed one's, 0 for a bias).

    Raises:
        TransferError: a head has another number of rows than the donor has names.
    """
    changed = {}
    for key, dim in heads.items():
        rows = weights[key].movedim(dim, 0)
        if len(rows) != len(donor.names):
            raise TransferError(f"Head {key} of the donor has {len(rows)} rows, its dataset.json names "
                                f"{len(donor.names)}: {', '.join(donor.names)}. Use its own dataset.json.")
        new = _head_rows(rows, donor, target, is_bias=rows.ndim == 1)
        changed[key] = new.movedim(0, dim).contiguous()
    rule = (f"absent at first: zero weights, probability {NEW_REGION_PROBABILITY}" if target.regions
            else "mean of the known rows: never wins at the start, known labels keep their ranking"
            if _structure_known(donor, target)
            else "no label is known: mean of all the donor's rows, so they start where it saw any structure")
    # Where only one side is a softmax head, its background row has no counterpart; the rules above account for it.
    one_sided = {"background"} if donor.regions != target.regions else set()
    kept, known = (tuple(n for n in rows.names if n not in one_sided) for rows in (target, donor))
    return _replace(weights, changed), _report(kept, known, rule)


def _head_rows(rows: Tensor, donor: Rows, target: Rows, *, is_bias: bool) -> Tensor:
    known: dict[str, Tensor] = {}
    for name, i in zip(target.names, match(target.names, donor.names)):
        if i is not None:
            known[name] = rows[i] - rows[0] if target.regions and not donor.regions else rows[i]
    if donor.regions and not target.regions:
        known["background"] = torch.zeros_like(rows[0])
    if target.regions:
        prior = math.log(NEW_REGION_PROBABILITY / (1 - NEW_REGION_PROBABILITY))
        new = torch.full_like(rows[0], prior if is_bias else 0.0)
    else:
        unknown = [] if _structure_known(donor, target) else [
            row for row, i in zip(rows, match(donor.names, target.names)) if i is None]
        new = torch.stack([*known.values(), *unknown]).mean(0)
    return torch.stack([known.get(name, new) for name in target.names])


def _structure_known(donor: Rows, target: Rows) -> bool:
    return any(i is not None for n, i in zip(target.names, match(target.names, donor.names)) if n != "background")


def stem_surgery(weights: ReadOnlyStateDict, *, stems: tuple[str, ...], donor: tuple[str, ...],
                 target: tuple[str, ...], donor_previous: tuple[str, ...] = (),
                 target_previous: tuple[str, ...] = ()) -> tuple[StateDict, NameReport, NameReport]:
    """Give the first convolution the channels of `target`, by name; returns reports for images and previous stage.

    stems: state-dict keys of weights of shape (out, in, *kernel). `*_previous`: labels that a cascade feeds back as
    channels behind the images.

    Raises:
        TransferError: a stem has another number of channels than the donor has names.
    """
    images, fed_back, changed = match(target, donor), match(target_previous, donor_previous), {}
    for key in stems:
        kernels = weights[key].unbind(1)
        if len(kernels) != len(donor) + len(donor_previous):
            raise TransferError(f"Stem {key} of the donor reads {len(kernels)} channels, its dataset.json names "
                                f"{', '.join(donor + donor_previous)}. Use the dataset.json it was trained with.")
        zero = torch.zeros_like(kernels[0])
        new = zero
        if all(i is None for i in images):
            new = torch.stack(kernels[: len(donor)]).mean(0) * (len(donor) / len(target))
        stem = [new if i is None else kernels[i] for i in images]
        stem += [zero if i is None else kernels[len(donor) + i] for i in fed_back]
        changed[key] = torch.stack(stem, dim=1)
    rule = ("no channel is known: mean of the donor's kernels" if all(i is None for i in images)
            else "zero kernels: the network computes what it did on the known channels")
    return (_replace(weights, changed), _report(target, donor, rule),
            _report(target_previous, donor_previous, "zero kernels"))


def invert_channels(weights: ReadOnlyStateDict, *, stems: tuple[str, ...], channels: tuple[int, ...]) -> StateDict:
    """Negate the kernels of these channels; with padding by zeros that is the network on the negated channels."""
    changed = {}
    for key in stems:
        changed[key] = weights[key].clone()
        changed[key][:, list(channels)] *= -1
    return _replace(weights, changed)
