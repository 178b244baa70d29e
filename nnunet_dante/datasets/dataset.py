"""The data set to train on: found below nnUNet_raw, checked, with fingerprint and a split for few cases."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from nnunetv2.utilities.crossval_split import generate_crossval_split
from nnunetv2.utilities.dataset_name_id_conversion import find_candidate_datasets
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from ..errors import TransferError
from ..files import NNUNET_FOLDERS, read_json, write_text_atomically
from ..models.labels import channel_names, file_ending, head_names, plain_labels
from ..types import DatasetJson
from .annotated import ANNOTATED, REHEARSED, drawn_nothing, undrawn_labels
from .checks import check_channels, check_geometry, check_masks, shorten, stray_files
from .fingerprint import fingerprint
from .images import Case, case_files, opens, reader_for


@dataclass(frozen=True, kw_only=True)
class Target:
    """A raw nnU-Net data set whose files agree with its dataset.json."""

    name: str
    raw: Path
    preprocessed: Path
    dataset_json: DatasetJson
    cases: dict[str, Case]
    warnings: tuple[str, ...] = field(default=())

    @cached_property
    def undrawn(self) -> dict[str, frozenset[str]]:
        """Case -> labels that were not drawn in it, by "annotated" of dataset.json; {} if all labels were."""
        return undrawn_labels(self.dataset_json, self.cases)

    @property
    def own(self) -> list[str]:
        """The cases of the data set itself, in the order of their names: without those rehearsed for the donor."""
        return sorted(self.cases.keys() - set(self.dataset_json.get(REHEARSED, {}).get("cases", ())))

    @property
    def labelled(self) -> list[str]:
        """The cases of `own` in which at least one label was drawn.

        Raises:
            TransferError: there is none.
        """
        found = [case for case in self.own if not drawn_nothing(self.dataset_json, self.undrawn, case)]
        if not found:
            raise TransferError(f'"{ANNOTATED}" of {self.name}/dataset.json says that no label was drawn in any case. '
                                "Name the labels that were drawn.")
        return found

    @property
    def number(self) -> int | None:
        """The number by which nnU-Net's commands find this data set; None where they would find another one, or none.

        nnU-Net looks in all three of its folders for names that begin with the number: 123 also finds Dataset1234.
        """
        found = re.match(r"Dataset(\d+)", self.name)
        return int(found[1]) if found and list(find_candidate_datasets(int(found[1]))) == [self.name] else None

    def reader(self, donor_reader: str) -> str:
        """Return the donor's reader if it opens this data set's first case, else nnU-Net's choice for the files.

        The reader decides the orientation that the network sees (NibabelIOWithReorient turns images, others do not),
        so the donor's is kept where possible. "overwrite_image_reader_writer" in dataset.json wins.
        """
        wanted = self.dataset_json.get("overwrite_image_reader_writer", "None")
        if wanted == "None" and opens(donor_reader, self.dataset_json, next(iter(self.cases.values()))):
            return donor_reader
        return reader_for(self.dataset_json, self.cases).__name__

    def fingerprint(self, *, num_processes: int | None = None) -> dict[str, Any]:
        """Return nnU-Net's dataset fingerprint, extracted anew if the files have changed; see fingerprint.py."""
        return fingerprint(self.name, self.preprocessed, self.dataset_json, self.cases, num_processes=num_processes)

    def split(self) -> tuple[str, list[dict[str, list[str]]] | None]:
        """Return what the folds are, as text, and the content of splits_final.json if it has to be written.

        nnU-Net makes its five folds itself. With 2 to 4 cases it cannot: fold i then validates on the i-th case in the
        order of the names and trains on the others.

        Raises:
            TransferError: the splits_final.json that is there is damaged, or names cases that are not.
        """
        path, cases = self.preprocessed / "splits_final.json", self.own
        if path.is_file():
            return _describe_split(path, cases), None
        if len(cases) >= 5 and len(cases) < len(self.cases):
            return ("nnU-Net's 5-fold cross-validation (folds 0 to 4) of your own cases; the rehearsed ones are only "
                    "trained on"), generate_crossval_split(cases, n_splits=5)
        if len(cases) >= 5:
            return "nnU-Net's own 5-fold cross-validation (folds 0 to 4), made when the first training starts", None
        if len(cases) == 1:
            return (f"only one training case ({cases[0]}): no fold can hold one back, so train with fold `all`; its "
                    "validation score is then one on training data"), None
        splits = [{"train": [c for c in cases if c != held_out], "val": [held_out]} for held_out in cases]
        return (f"{len(cases)} cases are too few for nnU-Net's 5 folds: splits_final.json written with {len(cases)} "
                f"folds that leave one case out each, in the order of the names (folds 0 to {len(cases) - 1})"), splits

    def folds(self) -> list[dict[str, list[str]]]:
        """Return the cases for "train" and "val" of each fold, as a training will use them; [] if there is one case.

        Without a splits_final.json, these are the folds that `transfer` or nnU-Net is going to write.

        Raises:
            TransferError: as `split`.
        """
        path, cases = self.preprocessed / "splits_final.json", self.own
        if path.is_file():
            return _read_split(path, cases)
        if len(cases) >= 5:
            return [{part: list(map(str, names)) for part, names in fold.items()}
                    for fold in generate_crossval_split(cases)]
        return self.split()[1] or []

    def write_split(self) -> str:
        """Write splits_final.json where nnU-Net could not make one; return what the folds are, as text."""
        text, splits = self.split()
        if splits is not None:
            write_text_atomically(json.dumps(splits, indent=2), self.preprocessed / "splits_final.json")
        return text


def open_target(dataset: str | int) -> Target:
    """Find a data set by number or name and check that its files and its dataset.json agree.

    Raises:
        TransferError: paths are not set, the data set is unknown, its number is also another's, or its files are not
            what dataset.json says.
    """
    raw_root, preprocessed_root = _folder("nnUNet_raw"), _folder("nnUNet_preprocessed")
    raw = _find(dataset, raw_root)
    content = _dataset_json(raw)
    cases = _cases(raw, content)
    reader = reader_for(content, cases)
    check_channels(raw, content, cases, reader)
    undrawn = undrawn_labels(content, cases)
    warnings = [*check_geometry(raw, cases), *check_masks(cases, content, reader, undrawn),
                *stray_files(raw, content, cases)]
    return Target(name=raw.name, raw=raw, preprocessed=preprocessed_root / raw.name, dataset_json=content, cases=cases,
                  warnings=tuple(warnings))


def _folder(variable: str) -> Path:
    value = os.environ.get(variable)
    if not value:
        raise TransferError(f"The environment variable {variable} is not set; nnU-Net finds its data through it. Set "
                            f"it first, for instance: export {variable}=/path/to/{variable}")
    if not Path(value).is_dir() and variable == "nnUNet_raw":
        raise TransferError(f"{variable} is {value!r}, which is no folder. Create it, or correct the variable.")
    return Path(value)


def _find(dataset: str | int, root: Path) -> Path:
    text = str(dataset)
    available = _names(root)
    if text in available:
        return root / text
    if text.isdecimal():
        owners: dict[str, list[str]] = {}
        for variable in filter(os.environ.get, NNUNET_FOLDERS):
            for name in _names(Path(os.environ[variable])):
                if (number := re.match(r"Dataset(\d+)", name)) and int(number[1]) == int(text):
                    owners.setdefault(name, []).append(variable)
        if len(owners) > 1:
            places = ", ".join(f"{name} (in {' and '.join(found)})" for name, found in sorted(owners.items()))
            raise TransferError(f"The number {text} is used twice: {places}. nnU-Net's commands would refuse it, too. "
                                "Give the full name of your data set.")
        if owners and (name := next(iter(owners))) in available:
            return root / name
    raise TransferError(f"Data set {dataset!r} is not below nnUNet_raw ({root}), which holds "
                        f"{', '.join(available) or 'no data set'}. Give a number such as 12 or a name Dataset012_Name.")


def _names(root: Path) -> list[str]:
    return sorted(p.name for p in root.glob("Dataset*") if p.is_dir())


def _dataset_json(raw: Path) -> DatasetJson:
    try:
        content = read_json(raw / "dataset.json")
    except (OSError, ValueError) as error:
        raise TransferError(f"{raw.name}/dataset.json cannot be read ({error}); nnU-Net needs it with channel_names, "
                            "labels, numTraining and file_ending.") from error
    if not isinstance(content, dict):
        raise TransferError(f"{raw.name}/dataset.json holds a {type(content).__name__}, not an object.")
    if missing := [k for k in ("labels", "file_ending") if k not in content]:
        raise TransferError(f"{raw.name}/dataset.json lacks {' and '.join(missing)}; it has {sorted(content)}.")
    channel_names(content)
    content = plain_labels(content)
    head_names(content)
    file_ending(content)
    try:
        LabelManager(content["labels"], content.get("regions_class_order"))
    except Exception as error:  # nnU-Net asserts, raises, or stumbles
        raise TransferError(f"nnU-Net refuses the labels of {raw.name}/dataset.json: {error}") from error
    return content


def _cases(raw: Path, content: DatasetJson) -> dict[str, Case]:
    cases = case_files(raw, content)
    if not cases:
        raise TransferError(f"{raw.name}/imagesTr holds no images CASE_0000{content['file_ending']}; nnU-Net needs one "
                            "file per case and channel, and labelsTr/CASE with the same ending.")
    if missing := [case.mask.name for case in cases.values() if not case.mask.is_file()]:
        raise TransferError(f"{raw.name}: {len(missing)} of {len(cases)} cases have no label file: labelsTr lacks "
                            f"{shorten(missing)}. Add them, or take these cases out of imagesTr.")
    if missing := [str(path) for case in cases.values() for path in case.images if not path.is_file()]:
        raise TransferError(f"{raw.name}: dataset.json lists images that are not there: {shorten(missing)}. Correct "
                            "the list, or put the images there.")
    return cases


def _read_split(path: Path, cases: list[str]) -> list[dict[str, list[str]]]:
    try:
        folds: list[dict[str, list[str]]] = read_json(path)
        named = _cases_of(folds)
        if not all(isinstance(case, str) for case in named) or not all(fold["train"] for fold in folds):
            raise TypeError("each fold needs the names of training and validation cases")
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise TransferError(f"{path.name} in nnUNet_preprocessed cannot be read ({error!r}); correct or delete it.") \
            from error
    if unknown := sorted(named - set(cases)):
        raise TransferError(f"{path.name} in nnUNet_preprocessed names cases that imagesTr does not hold: "
                            f"{shorten(unknown)}. Correct or delete it.")
    return folds


def _cases_of(folds: list[dict[str, list[str]]]) -> set[str]:
    return {case for fold in folds for part in ("train", "val") for case in fold[part]}


def _describe_split(path: Path, cases: list[str]) -> str:
    folds = _read_split(path, cases)
    left_out = len(set(cases) - _cases_of(folds))
    return (f"your splits_final.json with {len(folds)} folds (0 to {len(folds) - 1})"
            + (f"; it leaves out {left_out} of {len(cases)} cases" if left_out else ""))
