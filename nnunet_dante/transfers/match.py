"""Match the labels and channels of target and donor by name. This is done once, and all other code uses the result."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher
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


def are_alike(name: str, other: str) -> bool:
    """Return whether two names may mean the same: their words are the same up to order and spelling, or one has more.

    Example: "kidney_left" is like "LeftKidney", "kidney" and "kidneys_left", but not like "kidney_right".
    """
    one, two = ({*re.findall(r"[^\W\d_]+|\d+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", n).lower())} for n in (name, other))
    only_one, only_two = (" ".join(sorted(words)) for words in (one - two, two - one))
    shared = bool(one & two)
    return (shared and not (only_one and only_two)) or SequenceMatcher(None, only_one, only_two).ratio() > 0.75


@dataclass(frozen=True, kw_only=True)
class NameReport:
    """What surgery did with a list of names.

    rule: how the new ones start; "" if there are none.
    renamed: (new name, dropped name, reason) of pairs that may mean the same.
    """

    matched: tuple[str, ...]
    new: tuple[str, ...]
    dropped: tuple[str, ...]
    rule: str = ""
    renamed: tuple[tuple[str, str, str], ...] = ()

    def hint(self, kind: str) -> Iterator[str]:
        """Yield a sentence about the pairs in `renamed`, if there are any; `kind` is "labels" or "channels"."""
        if self.renamed:
            pairs = ", ".join(f"your {new} and the donor's {old} ({why})" for new, old, why in self.renamed[:3])
            more = f" and {len(self.renamed) - 3} more" if len(self.renamed) > 3 else ""
            yield (f"these {kind} may mean the same: {pairs}{more}. If they do, give yours the donor's name in "
                   "dataset.json and transfer again, so that it starts from what the donor learned")


@dataclass(frozen=True, kw_only=True)
class NameMatch:
    """The names of the target and those of the donor, each in the order of the weights."""

    target: tuple[str, ...]
    donor: tuple[str, ...]

    @cached_property
    def source(self) -> tuple[int | None, ...]:
        """For each target name, its position in `donor`, or None if the donor does not have it."""
        return match_names(self.target, self.donor)

    def by_name(self) -> dict[str, str | None]:
        """Return target name -> donor name, as the plans and checkpoints record it."""
        return {name: None if i is None else self.donor[i] for name, i in zip(self.target, self.source)}

    def report(self, rule: str, *, without: frozenset[str] = frozenset()) -> NameReport:
        """Return the matched, new and dropped names, except those in `without`; `rule` tells how new ones start."""
        new = tuple(n for n, i in zip(self.target, self.source) if i is None and n not in without)
        dropped = tuple(n for i, n in enumerate(self.donor) if i not in self.source and n not in without)
        return NameReport(matched=tuple(n for n, i in zip(self.target, self.source) if i is not None), new=new,
                          dropped=dropped, rule=rule if new else "", renamed=tuple(self._renamed(new, dropped)))

    def _renamed(self, new: Sequence[str], dropped: Sequence[str]) -> Iterator[tuple[str, str, str]]:
        for name in new:
            if other := next((other for other in dropped if are_alike(name, other)), None):
                yield name, other, "similar names"


@dataclass(frozen=True, kw_only=True)
class LabelMatch(NameMatch):
    """The labels, which are the rows of the segmentation heads.

    target_regions, donor_regions: whether these are overlapping regions (sigmoid), and not labels (softmax).
    """

    target_regions: bool = False
    donor_regions: bool = False

    @property
    def knows_structure(self) -> bool:
        """Whether the donor has any of the target's labels besides background."""
        return any(i is not None and name != "background" for name, i in zip(self.target, self.source))

    def report(self, rule: str, *, without: frozenset[str] = frozenset()) -> NameReport:
        """Return the matched, new and dropped labels. A background row that only one side has is left out."""
        one_sided = frozenset({"background"}) if self.target_regions != self.donor_regions else frozenset()
        return super().report(rule, without=without | one_sided)

    def _renamed(self, new: Sequence[str], dropped: Sequence[str]) -> Iterator[tuple[str, str, str]]:
        similar = list(super()._renamed(new, dropped))
        yield from similar
        if not (self.target_regions or self.donor_regions):  # without regions, the rows are in the order of the numbers
            for number, (name, other) in enumerate(zip(self.target, self.donor)):
                if name in new and other in dropped and not any(name == n or other == o for n, o, _ in similar):
                    yield name, other, f"both have the number {number}"


@dataclass(frozen=True, kw_only=True)
class Match:
    """All names of target and donor; previous_stage: the labels that a cascade's second stage reads as channels."""

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
