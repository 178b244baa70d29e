"""The labels of a donor and a data set joined by name, and masks joined voxel by voxel: pure functions.

Who speaks for a label in a case: the user where it was drawn, else the donor if it knows the label, else nobody. In a
voxel that the user drew as another label, the user is right.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np

from ..datasets.annotated import Undrawn, foreground
from ..datasets.checks import shorten
from ..errors import ConfigurationError, TransferError
from ..models.labels import has_regions
from ..types import DatasetJson
from .match import match_names

ALL, NONE = "all", "none"
_CLAIMED = 0.5  # of what the donor calls a label lies where the user drew another: both mean the same structure
_FAR = 3.0  # times larger or smaller than the median case


@dataclass(frozen=True, kw_only=True)
class Union:
    """The labels of a donor and a data set in one numbering, and who speaks for which label in which case.

    labels: name -> value, "ignore" last. kept: the donor's labels that the data set does not have. completed: case ->
    labels that the donor speaks for. undrawn: case -> labels that nobody speaks for. mine, theirs: value in a mask of
    the data set or the donor -> value in the union.
    """

    labels: dict[str, int]
    kept: tuple[str, ...]
    completed: dict[str, frozenset[str]]
    undrawn: dict[str, frozenset[str]]
    mine: dict[int, int]
    theirs: dict[int, int]

    @property
    def names(self) -> dict[int, str]:
        """Value -> name of every structure."""
        return {value: name for name, value in self.labels.items() if name not in ("background", "ignore")}


def join_labels(target: DatasetJson, donor: DatasetJson, *, cases: Sequence[str], undrawn: Undrawn,
                keep: Sequence[str]) -> Union:
    """Join labels by name: background, then the donor's in its order, then the data set's new ones in theirs.

    keep: labels of the donor to keep, or ALL. Labels of the data set that were not drawn in a case are completed as
    well, if the donor knows them.

    Raises:
        ConfigurationError: `keep` names a label that the donor does not know, or two labels have one name.
        TransferError: a side has regions, or the donor has nothing to say.
    """
    for whose, content in (("your data set", target), ("the donor", donor)):
        if has_regions(content):
            raise TransferError(f"The labels of {whose} are regions, which overlap: two labels claim one voxel, and a "
                                "completed mask has room for one. Labels can be kept only where they do not overlap.")
    own, others = foreground(target), foreground(donor)
    positions = match_names(keep, others)
    if missing := [name for name, i in zip(keep, positions) if i is None and name != ALL]:
        raise ConfigurationError(f"--keep-labels names {missing[0]!r}, which the donor does not know; it knows "
                                 f"{', '.join(others)}. Give some of these, or the word {ALL}.")
    same = {name: None if i is None else own[i] for name, i in zip(others, match_names(others, own))}
    kept = tuple(name for i, name in enumerate(others) if same[name] is None and (ALL in keep or i in positions))
    joined = {name: same[name] or name for name in others if same[name] or name in kept}  # donor's -> union's
    known = frozenset(filter(None, same.values()))
    names = [*joined.values(), *(name for name in own if name not in known)]
    if twice := [name for name, count in Counter(name.strip().casefold() for name in names).items() if count > 1]:
        raise ConfigurationError(f"Two labels would have the name {twice[0]!r}. Rename one of the donor's: --rename "
                                 f"{twice[0]}=NEW.")
    labels = {"background": 0, **{name: i for i, name in enumerate(names, 1)}}
    labels |= {"ignore": len(labels)} if "ignore" in target["labels"] else {}
    missing_in = {case: undrawn.get(case, frozenset()) for case in cases}
    completed = {case: frozenset(kept) | (labels_ & known) for case, labels_ in missing_in.items()}
    if not any(completed.values()):
        raise TransferError(f"No label is kept: your masks have the labels that were asked for, drawn in every case "
                            f"({', '.join(own)}). The donor knows {', '.join(others)}. Leave out --keep-labels, or "
                            "name labels that your masks do not have.")
    return Union(labels=labels, kept=kept, completed=completed,
                 undrawn={case: rest for case, labels_ in missing_in.items() if (rest := labels_ - known)},
                 mine={int(target["labels"][name]): value for name, value in labels.items()
                       if name in target["labels"]},
                 theirs={int(donor["labels"][name]): labels[new] for name, new in joined.items()})


def translate(mask: np.ndarray, values: Mapping[int, int]) -> np.ndarray:
    """Return an integer mask with other values, old -> new; those that are missing in `values` become background."""
    table = np.zeros(max(int(mask.max(initial=0)), *values, 0) + 1, np.int64)
    for old, new in values.items():
        table[old] = new
    return table[mask]


class Tally:
    """Counts voxels of completed masks by label and source, case by case.

    drawn, donors: label -> voxels. claimed: label of the donor -> label of the user -> voxels that the donor predicts
    as the one and the user drew as the other. sizes_mm3: case -> label -> size of what the donor added.
    """

    def __init__(self, union: Union) -> None:
        self.union = union
        self.drawn, self.donors = dict.fromkeys(union.names.values(), 0), dict.fromkeys(union.names.values(), 0)
        self.claimed: dict[str, dict[str, int]] = {}
        self.sizes_mm3: dict[str, dict[str, float]] = {}

    def join(self, case: str, drawn: np.ndarray, predicted: np.ndarray, *, voxel_mm3: float) -> np.ndarray:
        """Return the completed mask of a case and count its voxels.

        drawn, predicted: masks of one shape, in the numbers of the data set and of the donor.
        """
        names, speaks = self.union.names, self.union.completed[case]
        mine = translate(drawn, self.union.mine)
        theirs = translate(predicted, {old: new for old, new in self.union.theirs.items() if names[new] in speaks})
        added = np.where(mine > 0, 0, theirs)
        self._count(self.drawn, mine)
        self._count(self.donors, added)
        for value, name in names.items():
            if name in speaks:
                self._count(self.claimed.setdefault(name, {}), mine[theirs == value])
                self.sizes_mm3.setdefault(case, {})[name] = float((added == value).sum() * voxel_mm3)
        return mine + added

    def _count(self, counts: dict[str, int], mask: np.ndarray) -> None:
        for value, voxels in zip(*np.unique(mask, return_counts=True)):
            if (name := self.union.names.get(int(value))) is not None:
                counts[name] = counts.get(name, 0) + int(voxels)

    def refuse_claims(self) -> None:
        """Refuse labels of two names for one structure.

        Raises:
            TransferError: most of what the donor calls a label was drawn by the user under another name.
        """
        for label, claims in self.claimed.items():
            lost = sum(claims.values())
            if lost > _CLAIMED * (lost + self.donors[label]):
                other = max(claims, key=lambda name: claims[name])
                raise TransferError(
                    f"Two labels claim the same voxels: of what the donor calls {label}, "
                    f"{lost / (lost + self.donors[label]):.0%} lies where you drew {', '.join(claims)}. If {other} "
                    f"is the same structure, say so with --rename {label}={other}; otherwise leave {label} out of "
                    f"--keep-labels. Nothing has to be predicted again.")

    def implausible(self) -> Iterator[str]:
        """Yield a warning for each label that the donor missed, or found with a size far from that of other cases."""
        for label in self.donors:
            sizes = {case: found[label] for case, found in self.sizes_mm3.items() if label in found}
            there = {case: size for case, size in sizes.items() if size}
            if sizes and not there:
                yield f"the donor finds no {label} in any case: it cannot be kept by these images"
                continue
            if missed := [case for case in sizes if case not in there]:
                yield f"the donor finds no {label} in {len(missed)} of {len(sizes)} cases: {shorten(missed)}"
            typical = median(there.values()) if len(there) > 2 else 0
            if typical and (odd := [f"{case} ({size / 1000:.3g} ml)" for case, size in there.items()
                                    if not typical / _FAR <= size <= typical * _FAR]):
                yield (f"what the donor adds of {label} is far from the median ({typical / 1000:.3g} ml) in "
                       f"{shorten(odd)}. Look at these cases")
