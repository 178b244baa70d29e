"""Which labels and channels of a data set are the donor's: matched here, once, by name, and used everywhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from ..models.labels import channel_names, has_regions, head_names, previous_stage_names
from ..types import DatasetJson


def match_names(target: Sequence[str], donor: Sequence[str]) -> tuple[int | None, ...]:
    """Return for each target name the position of the same name in `donor`, or None.

    Upper and lower case and outer blanks do not count. A name that occurs several times (three channels "rgb_to_0_1")
    matches occurrence by occurrence.

    Example: `match_names(("vessel", "Liver"), ("background", "liver"))` is `(None, 1)`.
    """
    positions: dict[str, list[int]] = {}
    for position, name in enumerate(donor):
        positions.setdefault(name.strip().casefold(), []).append(position)
    return tuple(found.pop(0) if (found := positions.get(name.strip().casefold())) else None for name in target)


@dataclass(frozen=True, kw_only=True)
class NameReport:
    """What surgery did with a list of names; `rule` says how the new ones start ("" if there are none)."""

    matched: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]
    rule: str = ""


@dataclass(frozen=True, kw_only=True)
class NameMatch:
    """Names of the target and of the donor, each in the order in which the weights have them."""

    target: tuple[str, ...]
    donor: tuple[str, ...]

    @cached_property
    def source(self) -> tuple[int | None, ...]:
        """For each target name the donor's position, or None for a name that the donor does not have."""
        return match_names(self.target, self.donor)

    def by_name(self) -> dict[str, str | None]:
        """Return target name -> donor name, as the plans and checkpoints record it."""
        return {name: None if i is None else self.donor[i] for name, i in zip(self.target, self.source)}

    def report(self, rule: str, *, without: frozenset[str] = frozenset()) -> NameReport:
        """Return matched, new and dropped names; `rule` says how new ones start, names in `without` are left out."""
        new = tuple(n for n, i in zip(self.target, self.source) if i is None and n not in without)
        dropped = (n for i, n in enumerate(self.donor) if i not in self.source and n not in without)
        return NameReport(matched=tuple(n for n, i in zip(self.target, self.source) if i is not None), new=new,
                          dropped=tuple(dropped), rule=rule if new else "")


@dataclass(frozen=True, kw_only=True)
class LabelMatch(NameMatch):
    """The rows of the segmentation heads; `*_regions`: overlapping regions (sigmoid) instead of labels (softmax)."""

    target_regions: bool = False
    donor_regions: bool = False

    @property
    def knows_structure(self) -> bool:
        """Whether the donor has any of the target's labels besides background."""
        return any(i is not None and name != "background" for name, i in zip(self.target, self.source))

    def report(self, rule: str, *, without: frozenset[str] = frozenset()) -> NameReport:
        """Return matched, new and dropped labels; where only one side has a background row, it counts as neither."""
        one_sided = frozenset({"background"}) if self.target_regions != self.donor_regions else frozenset()
        return super().report(rule, without=without | one_sided)


@dataclass(frozen=True, kw_only=True)
class Match:
    """All names of a target and a donor; previous_stage: labels that a cascade's first stage feeds back as channels."""

    labels: LabelMatch
    channels: NameMatch
    previous_stage: NameMatch


def match_data_sets(target: DatasetJson, donor: DatasetJson, *, cascaded: bool) -> Match:
    """Match labels and channels of two dataset.json; `cascaded`: the network reads what a first stage predicted.

    Raises:
        TransferError: a dataset.json lacks names, or they cannot be used.
    """
    fed_back = [previous_stage_names(content) if cascaded else () for content in (target, donor)]
    return Match(
        labels=LabelMatch(target=head_names(target), donor=head_names(donor), target_regions=has_regions(target),
                          donor_regions=has_regions(donor)),
        channels=NameMatch(target=channel_names(target), donor=channel_names(donor)),
        previous_stage=NameMatch(target=fed_back[0], donor=fed_back[1]))
