"""The data set of an adaptation: where nnU-Net finds it, and which cases are trained on together."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from sklearn.model_selection import GroupKFold

from ..datasets.dataset import Target
from ..datasets.gather.gather import gather
from ..datasets.shots import read_groups
from ..errors import ConfigurationError
from ..files import write_text_atomically
from ..types import PathLike

_FOLDS = 5


def put_data(source: Path, raw: Path, name: str | None, labels: Sequence[str], groups: PathLike | None, *,
             channels: Sequence[str] = (), say: Callable[[str], object]) -> dict[str, Any]:
    """Let nnU-Net find labelled images below `raw`; return the name of the data set there.

    A data set in nnU-Net's format is linked. Of any other folder one is made, as `nnunet-dante dataset` does.

    Raises:
        ConfigurationError: the name is none that nnU-Net takes, or another data set has it; or `channels` are given
            for a data set that names its own.
        DatasetError: the folder holds no labelled images, or some with faults; names all of them.
    """
    own = source.name if re.fullmatch(r"Dataset\d{3,}_.+", source.name) else None
    name = name or own or f"Dataset{_number(source)}_" + re.sub(r"\W+", "", source.name)
    if not (found := re.fullmatch(r"Dataset(\d{3,})_(\w.*)", name)):
        raise ConfigurationError(f"the name of the data set is {name!r}; give one such as Dataset123_Mine.")
    place = raw / name
    if not all((source / part).exists() for part in ("dataset.json", "imagesTr", "labelsTr")):
        gather(source, int(found[1]), found[2], output=raw, labels=labels, groups=groups, channels=channels,
               say=say)
    elif channels:
        raise ConfigurationError(f"{source} is in nnU-Net's format, so its dataset.json names the channels. Change "
                                 "them there instead of giving --channels.")
    elif not place.exists():
        place.symlink_to(source, target_is_directory=True)
    elif place.resolve() != source:
        raise ConfigurationError(f"{place} is another data set than {source}; give another name.")
    return {"dataset": name}


def _number(source: Path) -> int:
    """Return a number from 100 to 999 that is the same for a folder in every call, and another for most other folders.

    Models of several adaptations can then lie in one nnUNet_results, where nnU-Net also takes numbers for names.
    """
    return 100 + zlib.crc32(str(source.resolve()).encode()) % 900


def write_folds(target: Target, groups: PathLike | None) -> dict[str, Any]:
    """Write splits_final.json unless there is one, and return the names of the folds.

    Cases of one group, such as a patient, stay together. Fewer than five cases or groups make as many folds; a single
    one makes none, since nothing would be left to choose and score on.
    """
    known = target.raw / "groups.csv"
    table = groups or (known if known.is_file() else None)
    splits = target.folds() if table is None else _by_group(target.own, read_groups(table))
    if splits:
        write_text_atomically(json.dumps(splits, indent=2), target.preprocessed / "splits_final.json")
    return {"folds": [str(n) for n in range(len(splits))]}


def _by_group(cases: Sequence[str], groups: Mapping[str, Sequence[str]]) -> list[dict[str, list[str]]]:
    group_of = {case: name for name, members in groups.items() for case in members}
    own = [group_of.get(case, case) for case in cases]
    number = min(_FOLDS, len(set(own)))
    return [{"train": [cases[i] for i in train], "val": [cases[i] for i in val]} for train, val in
            GroupKFold(number).split(cases, groups=own)] if number > 1 else []
