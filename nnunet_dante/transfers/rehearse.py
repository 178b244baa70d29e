"""Rehearsal: labelled cases of the donor's own data, from which a share of the training patches comes.

They become cases of the completed data set. The labels that the donor does not know were not drawn in them, which
dataset.json says (`datasets/annotated.py`). They are only trained on: no fold validates on them, and nothing is scored
on them. nnU-Net's own trainers do not see them, except in fold `all`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..datasets.checks import check_geometry
from ..datasets.dataset import Target
from ..datasets.images import Case, image_files
from ..errors import ConfigurationError, TransferError
from ..models.donor import Donor
from ..models.labels import channel_names, file_ending
from ..types import PathLike
from .match import match_names
from .union import Union

PREFIX = "rehearsed_"


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """Cases of the donor, by the names that they get, with their images in the order of the data set's channels.

    share: of the training patches. undrawn: labels of the data set that the donor does not know. values: what the
    donor's masks may hold.
    """

    share: float = 0.0
    cases: dict[str, Case] = field(default_factory=dict)
    undrawn: frozenset[str] = frozenset()
    values: frozenset[int] = frozenset()


def find_rehearsal(folder: PathLike, share: float, *, donor: Donor, target: Target, union: Union) -> Rehearsal:
    """Find the cases in a folder with imagesTr and labelsTr, whose masks are in the donor's numbers.

    Raises:
        ConfigurationError: `share` is none, or the folder holds no cases.
        TransferError: a case lacks its mask or a channel, or mask and image differ in size.
    """
    folder, ending = Path(folder), file_ending(target.dataset_json)
    if not 0 < share < 1:
        raise ConfigurationError(f"--share is {share}; give the part of the training patches that come from the "
                                 "donor's cases, between 0 and 1, such as 0.25.")
    images = image_files(folder / "imagesTr", ending)
    if not images:
        raise ConfigurationError(f"--rehearse {folder}: imagesTr holds no images CASE_0000{ending}. Give a folder with "
                                 "imagesTr and labelsTr of the donor's own data, with the file ending of yours.")
    names, own = channel_names(donor.dataset_json), channel_names(target.dataset_json)
    order = match_names(own, names)
    if None in order:
        raise TransferError(f"--rehearse {folder}: the donor's cases lack the channel {own[order.index(None)]} of your "
                            f"data set; they have {', '.join(names)}.")
    cases = {}
    for name, files in images.items():
        mask = folder / "labelsTr" / f"{name}{ending}"
        if not mask.is_file() or len(files) != len(names):
            raise TransferError(f"--rehearse {folder}: case {name} has {len(files)} of {len(names)} channels and "
                                f"{'a' if mask.is_file() else 'no'} mask in labelsTr. Complete it, or take it out.")
        cases[f"{PREFIX}{name}"] = Case(images=tuple(files[i] for i in order if i is not None), mask=mask)
    check_geometry(folder, cases)
    known = {union.names[value] for value in union.theirs.values()}
    return Rehearsal(share=share, cases=cases, undrawn=frozenset(union.names.values()) - known,
                     values=frozenset(map(int, donor.dataset_json["labels"].values())))
