"""The names that belong to nnU-Net's numbers: image channels, rows of the segmentation head, inputs of a cascade.

nnU-Net's rules are easy to get wrong. Without regions, the head has one row per label value in ascending order, and one
of them is the background's. With regions, it has one row per entry of "labels", in the order of the file and without
the background; regions_class_order does not matter here. "ignore" never has a row.
"""

from __future__ import annotations

import re
from typing import Any

from ..errors import TransferError
from ..types import DatasetJson


def channel_names(dataset_json: DatasetJson) -> tuple[str, ...]:
    """Return the names of the image channels in the order of the files _0000, _0001, ...

    The old key "modality" is read, too.

    Raises:
        TransferError: there are no names, or their numbers are not 0 to n - 1.
    """
    named = dataset_json.get("channel_names", dataset_json.get("modality"))
    if not isinstance(named, dict) or not named:
        raise TransferError(f"dataset.json names no channels (channel_names is {named!r}); write for instance "
                            '"channel_names": {"0": "CT"}.')
    if sorted(map(str, named), key=lambda k: (len(k), k)) != [str(i) for i in range(len(named))]:
        raise TransferError(f"channel_names of dataset.json has the keys {list(named)}; nnU-Net needs 0 to "
                            f"{len(named) - 1}, the numbers in the file names (_0000, _0001, ...).")
    by_number = {int(number): str(name) for number, name in named.items()}
    return tuple(by_number[i] for i in range(len(named)))


def file_ending(dataset_json: DatasetJson) -> str:
    """Return the ending of the image files, such as ".nii.gz".

    Raises:
        TransferError: dataset.json has none, or one that is not like an ending.
    """
    ending = dataset_json.get("file_ending")
    if not isinstance(ending, str) or not re.fullmatch(r"(\.[A-Za-z0-9]+)+", ending):
        raise TransferError(f"file_ending of dataset.json is {ending!r:.80}; it must be one such as .nii.gz.")
    return ending


def _values(value: Any) -> frozenset[int]:
    values = value if isinstance(value, (list, tuple)) else [value]
    try:
        numbers = frozenset(int(v) for v in values)
        if not numbers or any(float(v) not in numbers for v in values):
            raise ValueError("no whole numbers")
    except (TypeError, ValueError, OverflowError) as error:
        raise TransferError(f'"labels" of dataset.json holds {value!r:.80}; it must be a whole number, or a list of '
                            "these.") from error
    return numbers


def _labels(dataset_json: DatasetJson) -> dict[str, Any]:
    labels = dataset_json.get("labels")
    if not isinstance(labels, dict) or not all(isinstance(name, str) for name in labels) or _values(
            labels.get("background", -1)) != {0}:
        raise TransferError(f"dataset.json needs \"labels\" as names with numbers and background 0, such as "
                            f'{{"background": 0, "liver": 1}}; it has {labels!r}.')
    return labels


def plain_labels(dataset_json: DatasetJson) -> DatasetJson:
    """Return dataset.json with each label as a whole number, or as a list of whole numbers for a region.

    nnU-Net also trains labels that are written as text ("1") or as a list of one number, but code that sorts or
    compares labels needs plain numbers. regions_class_order becomes a list of whole numbers, too.

    Raises:
        TransferError: labels or regions_class_order hold something else.
    """
    plain: dict[str, int | list[int]] = {}
    for name, value in _labels(dataset_json).items():
        numbers = _values(value)
        is_region = isinstance(value, (list, tuple)) and len(value) > 1
        plain[name] = [int(v) for v in value] if is_region else min(numbers)
    if not has_regions(dataset_json):
        return {**dataset_json, "labels": plain}
    order: Any = dataset_json.get("regions_class_order")
    regions = head_names(dataset_json)
    try:
        values = [min(_values(value)) for value in order if not isinstance(value, (list, tuple))]
        usable = isinstance(order, (list, tuple)) and len(values) == len(order) == len(regions)
    except (TransferError, TypeError):
        usable = False
    if not usable:
        raise TransferError(f"regions_class_order of dataset.json is {order!r:.80}; it must be a list of "
                            f"{len(regions)} whole numbers, such as {[*range(1, len(regions) + 1)]}: the value that "
                            f"nnU-Net writes into a mask for each of {', '.join(regions)}, in this order.")
    return {**dataset_json, "labels": plain, "regions_class_order": values}


def has_regions(dataset_json: DatasetJson) -> bool:
    """Return whether nnU-Net trains overlapping regions (sigmoid), and not exclusive labels (softmax)."""
    return any(isinstance(v, (list, tuple)) and len(v) > 1 for v in _labels(dataset_json).values())


def head_names(dataset_json: DatasetJson) -> tuple[str, ...]:
    """Return the name of each row of the segmentation head; "background" comes first unless there are regions.

    Raises:
        TransferError: there are no labels, two labels share a number, or a number between 0 and the largest is missing.
    """
    labels = {name: _values(value) for name, value in _labels(dataset_json).items() if name != "ignore"}
    if has_regions(dataset_json):
        return tuple(name for name, values in labels.items() if values != {0})
    ordered = sorted(labels, key=lambda name: min(labels[name]))
    if [sorted(labels[name]) for name in ordered] != [[i] for i in range(len(ordered))]:
        numbers = {name: sorted(labels[name]) for name in ordered}
        raise TransferError(f"The label numbers of dataset.json are {numbers}; nnU-Net needs 0 to {len(ordered) - 1}, "
                            "each once. Renumber the masks and dataset.json.")
    return tuple(ordered)


def previous_stage_names(dataset_json: DatasetJson) -> tuple[str, ...]:
    """Return the name of each one-hot channel that a cascade adds to the images: one per foreground value, ascending.

    With regions, a value has no name of its own. Its name is then that of all regions that contain it.
    """
    labels = {name: _values(v) for name, v in _labels(dataset_json).items() if name not in ("ignore", "background")}
    foreground = sorted(frozenset().union(*labels.values()) - {0})
    return tuple(" & ".join(sorted(name for name, values in labels.items() if value in values))
                 for value in foreground)
