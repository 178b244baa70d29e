"""Which labels were drawn in which case: the entry "annotated" of dataset.json, which stock nnU-Net does not read.

One rule holds everywhere: a label that was not drawn in a case is unknown there, and not background. So it is neither
learned nor scored in this case. `"annotated": {"case_007": ["liver"]}` says that only the liver was drawn in case_007;
in a case that is left out, every label was drawn.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import TransferError
from ..files import read_json
from ..models.labels import head_names
from ..types import DatasetJson

ANNOTATED, REHEARSED = "annotated", "rehearsed"  # entries of dataset.json that name cases
COMPLETED = "completed"  # the labels of which some masks are a donor's predictions
RECORD = "completed.json"  # beside dataset.json: how the masks were completed

Undrawn = Mapping[str, frozenset[str]]
"""Case -> the labels that were not drawn in it; cases in which every label was drawn are left out."""


def foreground(dataset_json: DatasetJson) -> tuple[str, ...]:
    """Return the names of labels or regions in the order of the network's outputs, without background."""
    return tuple(name for name in head_names(dataset_json) if name != "background")


def undrawn_labels(dataset_json: DatasetJson, cases: Collection[str] | None = None) -> dict[str, frozenset[str]]:
    """Return what "annotated" says, as case -> labels that were not drawn.

    Args:
        dataset_json: the content of a dataset.json.
        cases: the cases of the data set; None: names of cases are not checked.

    Raises:
        TransferError: the entry has another form, or names a case or a label that the data set does not have.
    """
    entry = dataset_json.get(ANNOTATED, {})
    if not isinstance(entry, dict) or not all(
            isinstance(drawn, list) and all(isinstance(name, str) for name in drawn) for drawn in entry.values()):
        raise TransferError(f'"{ANNOTATED}" of dataset.json is {entry!r:.80}; it must name the drawn labels of each '
                            f'case, such as {{"case_007": ["liver"]}}.')
    if not entry:
        return {}
    known = foreground(dataset_json)
    for case, drawn in entry.items():
        if cases is not None and case not in cases:
            raise TransferError(f'"{ANNOTATED}" of dataset.json names the case {case!r}, which imagesTr does not hold; '
                                f"a case is named without channel and ending, such as {min(cases)}.")
        if unknown := [name for name in drawn if name not in known]:
            raise TransferError(f'"{ANNOTATED}" of dataset.json names the label {unknown[0]!r} for case {case}, which '
                                f"is not among its labels: {', '.join(known)}. Correct the name.")
    found = {case: frozenset(known).difference(drawn) for case, drawn in entry.items()}
    return {case: labels for case, labels in found.items() if labels}


def read_undrawn(folder: Path | None) -> dict[str, frozenset[str]]:
    """Return what the dataset.json in a folder says; {} where there is none.

    Raises:
        TransferError: as `undrawn_labels`. OSError, ValueError: the file cannot be read.
    """
    file = folder / "dataset.json" if folder is not None else None
    return undrawn_labels(read_json(file)) if file is not None and file.is_file() else {}


def read_completed(folder: Path | None) -> dict[str, Any]:
    """Return what completed.json says of how the masks of a data set were completed; {} without a readable one.

    "completed": case -> the labels that the donor speaks for. "donor_values": label -> its value in donorTr.
    """
    try:
        content = read_json(folder / RECORD) if folder else {}
        return content if isinstance(content, dict) and content.get("format") == 1 else {}
    except (OSError, ValueError):
        return {}


def completed_labels(folder: Path | None, dataset_json: DatasetJson,
                     cases: Collection[str]) -> dict[str, frozenset[str]]:
    """Return case -> labels of which the mask is a donor's prediction.

    folder: of the data set in nnUNet_raw. Without completed.json there, a label that a donor completed somewhere is
    taken as completed in every case.
    """
    completed = read_completed(folder).get("completed", dict.fromkeys(cases, dataset_json.get(COMPLETED, ())))
    return {case: frozenset(completed.get(case, ())) for case in cases}


def without_cases(dataset_json: DatasetJson) -> DatasetJson:
    """Return the content of dataset.json as it goes into checkpoints: cases may have the names of patients.

    nnU-Net's "dataset", and "training" and "test" of the Medical Segmentation Decathlon, list files by name.
    """
    lists = (ANNOTATED, REHEARSED, "dataset", "training", "test")
    return {key: value for key, value in dataset_json.items() if key not in lists}


def drawn_nothing(dataset_json: DatasetJson, undrawn: Undrawn, case: str) -> bool:
    """Whether no label at all was drawn in the case."""
    return undrawn.get(case, frozenset()) == frozenset(foreground(dataset_json))


def check_drawn(mask: np.ndarray, dataset_json: DatasetJson, undrawn: Collection[str], name: str) -> None:
    """Refuse a mask that holds a label of which "annotated" says that it was not drawn there.

    Raises:
        TransferError: names the mask and the label.
    """
    labels: Mapping[str, Any] = dataset_json["labels"]
    drawn = [value for other in foreground(dataset_json) if other not in undrawn for value in np.ravel(labels[other])]
    for label in undrawn:
        values = np.setdiff1d(np.ravel(labels[label]), drawn)
        if np.isin(mask, values).any():
            raise TransferError(f'Mask {name} holds voxels of {label}, but "{ANNOTATED}" of dataset.json says that it '
                                f"was not drawn in this case. Add {label} to the case there, or correct the mask.")
