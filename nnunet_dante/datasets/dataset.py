"""The data set to train on: found below nnUNet_raw, checked, with fingerprint and a split for few cases."""

from __future__ import annotations

import contextlib
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.configuration import default_num_processes
from nnunetv2.experiment_planning.dataset_fingerprint.fingerprint_extractor import DatasetFingerprintExtractor
from nnunetv2.imageio.reader_writer_registry import recursive_find_reader_writer_by_name
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

from ..errors import TransferError
from ..files import read_json, write_text_atomically
from ..models.labels import channel_names, file_ending, head_names, plain_labels
from ..types import DatasetJson
from .images import Case, check_channels, check_masks, image_files, reader_for, reading

INTENSITY = "foreground_intensity_properties_per_channel"
_SHOWN = 3


@dataclass(frozen=True, kw_only=True)
class Target:
    """A raw nnU-Net data set whose files agree with its dataset.json."""

    name: str
    raw: Path
    preprocessed: Path
    dataset_json: DatasetJson
    cases: dict[str, Case]
    warnings: tuple[str, ...] = field(default=())

    def reader(self, donor_reader: str) -> str:
        """Return the donor's reader if it reads this data set's files, else nnU-Net's choice for them.

        The reader decides the orientation that the network sees (NibabelIOWithReorient turns images, others do not),
        so the donor's is kept where possible. "overwrite_image_reader_writer" in dataset.json wins.
        """
        if self.dataset_json.get("overwrite_image_reader_writer", "None") == "None":
            with contextlib.suppress(RuntimeError):
                known = recursive_find_reader_writer_by_name(donor_reader)
                if self.dataset_json["file_ending"].lower() in known.supported_file_endings:
                    return donor_reader
        return reader_for(self.dataset_json, self.cases).__name__

    def fingerprint(self, *, num_processes: int | None = None) -> dict[str, Any]:
        """Return nnU-Net's dataset fingerprint; extracted where it is missing or of another number of cases."""
        path = self.preprocessed / "dataset_fingerprint.json"
        found = _read_fingerprint(path)
        if found is None or len(found["spacings"]) != len(self.cases):
            try:
                extractor = DatasetFingerprintExtractor(self.name, num_processes or default_num_processes)
                extractor.run(overwrite_existing=True)
                found = read_json(path)
            except Exception as error:  # whatever a reader raises on a damaged image
                raise TransferError(f"nnU-Net could not extract the fingerprint of {self.name} "
                                    f"({type(error).__name__}: {error}). Run `nnUNetv2_extract_fingerprint -d "
                                    f"{int(self.name[7:10])} --verify_dataset_integrity` to find the case.") from error
        statistics = [v for channel in found[INTENSITY].values() for v in channel.values()]
        if not np.isfinite(np.asarray(statistics, float)).all():
            raise TransferError(f"The intensity statistics of {self.name} are not finite: an image holds NaN or "
                                "infinite voxels, or no mask has foreground. Correct the images and delete "
                                f"{path.name} in nnUNet_preprocessed.")
        return found

    def write_split(self) -> str:
        """Write splits_final.json where nnU-Net could not make one (fewer than 5 cases); return what holds now.

        With 2 to 4 cases fold i validates on the i-th case in the order of the names and trains on the others.
        """
        path, cases = self.preprocessed / "splits_final.json", sorted(self.cases)
        if path.is_file():
            return _describe_split(path, cases)
        if len(cases) >= 5:
            return "nnU-Net's own 5-fold cross-validation (folds 0 to 4), made when the first training starts"
        if len(cases) == 1:
            return (f"only one training case ({cases[0]}): no fold can hold one back, so train with fold `all`; its "
                    "validation score is then one on training data")
        splits = [{"train": [c for c in cases if c != held_out], "val": [held_out]} for held_out in cases]
        write_text_atomically(json.dumps(splits, indent=2), path)
        return (f"{len(cases)} cases are too few for nnU-Net's 5 folds: splits_final.json written with {len(cases)} "
                f"folds that leave one case out each, in the order of the names (folds 0 to {len(cases) - 1})")


def _read_fingerprint(path: Path) -> dict[str, Any] | None:
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError):
        content = read_json(path)
        sizes = [np.asarray(content[key], float) for key in ("spacings", "shapes_after_crop")]
        statistics = [float(v) for channel in content[INTENSITY].values() for v in channel.values()]
        cropped = content.get("median_relative_size_after_cropping", 1.0)
        plausible = all(s.ndim == 2 and s.shape[1] == 3 and np.isfinite(s).all() and (s > 0).all() for s in sizes)
        if statistics and plausible and isinstance(cropped, float | int):
            return content
    return None


def open_target(dataset: str | int) -> Target:
    """Find a data set by id or name below nnUNet_raw and check that files and dataset.json agree.

    Raises:
        TransferError: paths are not set, the data set is unknown, or its files are not what dataset.json says.
    """
    raw_root, preprocessed_root = _folder("nnUNet_raw"), _folder("nnUNet_preprocessed")
    raw = _find(dataset, raw_root)
    content = _dataset_json(raw)
    cases = _cases(raw, content)
    warnings = check_masks(cases, content)
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
    available = sorted(p.name for p in root.iterdir() if p.is_dir() and re.match(r"Dataset\d{3}_", p.name))
    text = str(dataset)
    found = [n for n in available if n == text or (text.isdigit() and int(n[7:10]) == int(text))]
    if len(found) == 1:
        return root / found[0]
    if found:
        raise TransferError(f"Data set id {dataset} is used twice below nnUNet_raw: {', '.join(found)}. Give the name.")
    raise TransferError(f"Data set {dataset!r} is not below nnUNet_raw ({root}), which holds "
                        f"{', '.join(available) or 'no data set'}. Give an id such as 12 or a name Dataset012_Name.")


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
    if "dataset" in content:
        with reading(raw, "dataset.json"):
            listed = get_filenames_of_train_images_and_targets(str(raw), json.loads(json.dumps(content)))
        cases = {name: Case(images=tuple(map(Path, files["images"])), mask=Path(files["label"]))
                 for name, files in listed.items()}
    else:
        ending = file_ending(content)
        cases = {name: Case(images=tuple(paths), mask=raw / "labelsTr" / f"{name}{ending}")
                 for name, paths in image_files(raw / "imagesTr", ending).items()}
    if not cases:
        raise TransferError(f"{raw.name}/imagesTr holds no images CASE_0000{content['file_ending']}; nnU-Net needs one "
                            "file per case and channel, and labelsTr/CASE with the same ending.")
    if missing := [case.mask.name for case in cases.values() if not case.mask.is_file()]:
        raise TransferError(f"{raw.name}: {len(missing)} of {len(cases)} cases have no label file: labelsTr lacks "
                            f"{', '.join(missing[:_SHOWN])}. Add them, or take these cases out of imagesTr.")
    check_channels(raw, content, cases)
    return cases


def _describe_split(path: Path, cases: list[str]) -> str:
    try:
        folds = read_json(path)
        named = {case for fold in folds for part in ("train", "val") for case in fold[part]}
        if not all(isinstance(case, str) for case in named):
            raise TypeError("a case is no name")
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise TransferError(f"{path.name} in nnUNet_preprocessed cannot be read ({error!r}); correct or delete it.") \
            from error
    if unknown := sorted(named - set(cases)):
        raise TransferError(f"{path.name} in nnUNet_preprocessed names cases that imagesTr does not hold: "
                            f"{', '.join(unknown[:_SHOWN])}. Correct or delete it.")
    left_out = len(set(cases) - named)
    return (f"your splits_final.json with {len(folds)} folds (0 to {len(folds) - 1})"
            + (f"; it leaves out {left_out} of {len(cases)} cases" if left_out else ""))
