"""The models on this machine: where they lie, what each is, and donors that are named instead of given as a path."""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DanteError, DonorError
from ..files import read_json
from ..types import PathLike
from .archive import Model, find_models
from .labels import channel_names, head_names
from .trusted_plans import check_donor, check_plans

TOTALSEGMENTATOR = "totalsegmentator"
_LICENCE_CHARACTERS = 50_000
_NAMED = re.compile(rf"{TOTALSEGMENTATOR}:(\d+)", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Installed:
    """A model that was found. `problem` says why it cannot be a donor; then the facts about it are empty.

    donor: what to give where a donor is asked for. spacing_mm: in the order of the plans' axes. size: bytes of all of
    its checkpoints. licence: text of a file LICENSE beside them, or what dataset.json says; "" if neither is there.
    """

    donor: str
    name: str
    problem: str = ""
    labels: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()
    spacing_mm: tuple[float, ...] = ()
    trainer: str = ""
    configuration: str = ""
    folds: tuple[str, ...] = ()
    size: int = 0
    licence: str = ""


def totalsegmentator_folder() -> Path:
    """Return the folder in which TotalSegmentator keeps its weights, by the rules of its own code."""
    if folder := os.environ.get("TOTALSEG_WEIGHTS_PATH"):
        return Path(folder).expanduser()
    home = os.environ.get("TOTALSEG_HOME_DIR") or "~/.totalsegmentator"
    return Path(home).expanduser() / "nnunet" / "results"


def find_donor(source: PathLike) -> Path:
    """Return the path of a donor: `source` itself, or the folder that the name `totalsegmentator:291` stands for.

    Raises:
        DonorError: TotalSegmentator's weights are not there, or hold no such model, or several.
    """
    path, named = Path(source).expanduser(), _NAMED.fullmatch(str(source))
    if named is None or path.exists():
        return path
    root = totalsegmentator_folder()
    if not root.is_dir():
        raise DonorError(f"{source}: TotalSegmentator keeps its weights in {root}, which is no folder. Download them "
                         "with TotalSegmentator, or set TOTALSEG_WEIGHTS_PATH to the folder that holds Dataset291_... "
                         "and the others.")
    there = {folder: int(number[1]) for folder in sorted(root.iterdir())
             if folder.is_dir() and (number := re.match(r"Dataset(\d+)", folder.name))}
    found = [folder for folder, number in there.items() if number == int(named[1])]
    if len(found) == 1:
        return found[0]
    if found:
        raise DonorError(f"{source}: {root} holds {', '.join(folder.name for folder in found)}. Give the path of one "
                         "of them.")
    known = ", ".join(f"{TOTALSEGMENTATOR}:{number} ({folder.name})" for folder, number in there.items())
    raise DonorError(f"{source}: {root} has no folder Dataset{int(named[1]):03d}_...; it holds {known or 'no model'}. "
                     "Name one of these, or download the model with TotalSegmentator.")


def installed_models(folders: Sequence[Path] = ()) -> dict[Path, list[Installed]]:
    """Return folder -> models in it: of nnUNet_results, TotalSegmentator's weights and `folders`, where they exist.

    Plans and dataset.json are read, and of each checkpoint whether it is whole; weights are not loaded.
    """
    results = os.environ.get("nnUNet_results")  # noqa: SIM112 nnU-Net spells it so
    places = [*([Path(results)] if results else []), totalsegmentator_folder(), *folders]
    return {place: list(_models(place)) for place in dict.fromkeys(map(Path.absolute, places)) if place.is_dir()}


def _models(root: Path) -> Iterator[Installed]:
    try:
        found = find_models(root)
    except DonorError as error:  # only a model of nnU-Net v1
        yield Installed(donor=str(root), name=root.name, problem=str(error))
        return
    numbers = [match[1].lstrip("0") if (match := re.match(r"Dataset(\d+)_[^/]*/", f"{model.folder}/")) else ""
               for model in found]
    named = root == totalsegmentator_folder().absolute()
    for model, number in zip(found, numbers):
        donor = (f"{TOTALSEGMENTATOR}:{number}" if named and number and numbers.count(number) == 1
                 else str(root / model.folder))
        name = str(model.folder) if model.folder.name else model.name
        try:
            yield _described(root / model.folder, model, name, donor)
        except (DanteError, OSError, ValueError) as error:
            yield Installed(donor=donor, name=name, problem=str(error))


def _described(folder: Path, model: Model, name: str, donor: str) -> Installed:
    plans, dataset = read_json(folder / "plans.json"), read_json(folder / "dataset.json")
    check_plans(plans)
    parts = model.name.split("__")
    known = plans["configurations"]
    configuration = parts[-1] if parts[-1] in known or len(known) != 1 else next(iter(known))
    if not model.weights:
        raise DonorError("it holds no checkpoint")
    if damaged := [str(file.relative_to(model.folder)) for file in model.weights
                   if not zipfile.is_zipfile(folder / file.relative_to(model.folder))]:
        raise DonorError(f"{', '.join(damaged)} is truncated, or no checkpoint of nnU-Net v2")
    check_donor(plans, dataset, configuration)
    entry = known[configuration]
    while "spacing" not in entry:  # check_donor has seen that the chain ends
        entry = known[entry["inherits_from"]]
    return Installed(
        donor=donor, name=name, labels=tuple(label for label in head_names(dataset) if label != "background"),
        channels=channel_names(dataset), spacing_mm=tuple(entry["spacing"]),
        trainer=parts[0] if len(parts) == 3 else "unknown trainer", configuration=configuration,
        size=sum(model.weights.values()), licence=_licence(folder, dataset),
        folds=tuple(dict.fromkeys(file.parent.name.removeprefix("fold_") for file in model.weights
                                  if file.parent.name.startswith("fold_"))))


def _licence(folder: Path, dataset: Mapping[str, Any]) -> str:
    """Return the text of a file LICENSE in the folder of a model or of its data set, or the entry of dataset.json."""
    places = [folder, *([folder.parent] if folder.parent.name.startswith("Dataset") else [])]
    for file in (file for place in places for file in sorted(place.glob("LICEN[CS]E*"))):
        if file.is_file() and not file.is_symlink():
            with file.open(encoding="utf-8", errors="replace") as stream:
                return stream.read(_LICENCE_CHARACTERS)
    said = dataset.get("licence") or dataset.get("license")
    return said[:_LICENCE_CHARACTERS] if isinstance(said, str) else ""
