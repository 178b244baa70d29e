"""What foreign plans may say: which code nnU-Net finds by the names in them, and how large their numbers are.

nnU-Net imports `network_class_name` and the arguments listed in `_kw_requires_import` by their full names, and calls
what it finds with arguments from the plans: "nonlin": "subprocess.Popen" would start a program. Other names it looks up
in its own folders, where each also finds what those modules import.
"""

from __future__ import annotations

import json
import math
import pydoc
import re
from collections.abc import Iterator
from functools import lru_cache
from inspect import isfunction
from itertools import permutations
from pathlib import Path
from typing import Any

import dynamic_network_architectures
import nnunetv2
from nnunetv2.imageio.base_reader_writer import BaseReaderWriter
from nnunetv2.preprocessing.normalization.default_normalization_schemes import ImageNormalization
from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
from nnunetv2.utilities.find_class_by_name import recursive_find_python_class
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import nn

from ..errors import ConfigurationError, UntrustedFileError
from ..files import bounded
from ..types import DatasetJson, Plans
from .labels import channel_names, head_names

_PACKAGES = ("torch.nn.", "dynamic_network_architectures.")
_FOLDERS: dict[str, tuple[str, type | None]] = {  # key of the plans -> where nnU-Net looks, what it expects
    "image_reader_writer": ("imageio", BaseReaderWriter),
    "label_manager": ("utilities.label_handling", LabelManager),
    "preprocessor_name": ("preprocessing", DefaultPreprocessor),
    "normalization_schemes": ("preprocessing.normalization", ImageNormalization),
    **dict.fromkeys(("resampling_fn_data", "resampling_fn_seg", "resampling_fn_probabilities"),
                    ("preprocessing.resampling", None))}
_MAX_NUMBER = 1 << 20  # larger than any image or layer
_MAX_ENTRIES = 1000
_MAX_VOXELS = 1 << 31


def check_plans(plans: Plans, *, trust: bool = False) -> None:
    """Refuse plans that name code of other packages than nnU-Net and torch, or that cannot be used.

    trust: do not check names of code. Architectures and normalisations of the user's own are code of other packages.

    Raises:
        UntrustedFileError: a name belongs to another package, from which nothing was imported.
        ConfigurationError: an entry is missing, of the wrong type, or absurdly large.
    """
    try:
        bounded(plans)
        json.dumps(plans)  # plans in a checkpoint may hold tensors, which plans.json cannot
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"The plans cannot be used: {error}. Use those that nnU-Net wrote.") from error
    configurations = plans.get("configurations") if isinstance(plans, dict) else None
    if not isinstance(configurations, dict) or not all(isinstance(c, dict) for c in configurations.values()):
        raise _wrong("configurations", configurations, "an object of configurations, such as 3d_fullres")
    axes = plans.get("transpose_forward")
    if axes not in [list(p) for p in permutations(range(3))]:
        raise _wrong("transpose_forward", axes, "an order of the axes 0, 1 and 2")
    for name, config in configurations.items():
        if not re.fullmatch(r"\w[\w.-]*", str(name)):  # files and folders get this name
            raise _wrong("configurations", name, "names of letters, digits, '_', '-' and '.'")
        _check_geometry(config)
        _check_numbers(config)
        _check_links(config)
    if not trust:
        for entry in (plans, *configurations.values()):
            _check_names(entry)
            _check_architecture(entry.get("architecture"))


def _wrong(key: str, value: object, allowed: str) -> ConfigurationError:
    return ConfigurationError(f"{key} of the plans is {value!r:.200}; it must be {allowed}. Use the plans.json that "
                              "nnU-Net wrote for this model.")


def _check_geometry(config: dict[str, Any]) -> None:
    spacing, patch = config.get("spacing", [1.0, 1.0]), config.get("patch_size", [1, 1])
    if not _are(spacing, float) or len(spacing) not in (2, 3):
        raise _wrong("spacing", spacing, "two or three positive numbers of mm")
    if not _are(patch, int) or len(patch) not in (2, 3) or math.prod(patch) > _MAX_VOXELS:
        raise _wrong("patch_size", patch, "two or three positive numbers of voxels, of a size that memory can hold")
    if not _are([config.get("batch_size", 1)], int):
        raise _wrong("batch_size", config["batch_size"], "a positive whole number")
    for key, kind in (("normalization_schemes", str), ("use_mask_for_norm", bool)):
        if not isinstance(given := config.get(key, []), list) or not all(isinstance(v, kind) for v in given):
            raise _wrong(key, given, "a list with an entry for each channel")


def _check_links(config: dict[str, Any]) -> None:
    stages = config.get("next_stage")
    for key, value in (*((key, config.get(key)) for key in ("inherits_from", "previous_stage", "data_identifier")),
                       *(("next_stage", stage) for stage in (stages if isinstance(stages, list) else [stages]))):
        if value is not None and not isinstance(value, str):
            raise _wrong(key, value, "a name")


def check_donor(plans: Plans, dataset_json: DatasetJson, configuration: str, *, trust: bool = False) -> None:
    """Check plans as `check_plans` does, and that `configuration` and dataset.json have all that a transfer needs.

    Raises:
        UntrustedFileError, ConfigurationError: as for `check_plans`.
        TransferError: dataset.json names no channels or labels.
    """
    check_plans(plans, trust=trust)
    if not isinstance(dataset_json, dict):
        raise ConfigurationError(f"dataset.json of the model holds a {type(dataset_json).__name__}, not an object.")
    channels, _ = len(channel_names(dataset_json)), head_names(dataset_json)
    try:
        json.dumps(dataset_json)
    except (ValueError, TypeError) as error:
        raise ConfigurationError(f"dataset.json of the model cannot be used: {error}. Use that of nnU-Net.") from error
    known = plans["configurations"]
    if configuration not in known:
        raise _wrong("configurations", sorted(known), f"a set of configurations that includes {configuration!r}")
    entry, seen = dict(known[configuration]), {configuration}
    while (parent := entry.pop("inherits_from", None)) is not None:
        if parent not in known or parent in seen:
            raise _wrong("inherits_from", parent, "another configuration of these plans")
        seen.add(parent)
        entry = known[parent] | entry
    for key in ("spacing", "patch_size", "batch_size", "normalization_schemes", "use_mask_for_norm"):
        if key not in entry:
            raise _wrong(key, None, f"given for {configuration}")
    for name, config in known.items():
        for key in ("normalization_schemes", "use_mask_for_norm"):
            if key in config and len(config[key]) != channels:
                raise _wrong(f"{key} of {name}", config[key], f"a list of {channels} entries, one for each channel")
    for key in ("foreground_intensity_properties_per_channel", "foreground_intensity_properties_by_modality"):
        statistics = plans.get(key)
        if statistics and not (isinstance(statistics, dict) and all(
                isinstance(statistics.get(str(i)), dict) for i in range(channels))):
            raise _wrong(key, statistics, f"an object with an entry for each of {channels} channels")


def _are(values: Any, kind: type) -> bool:
    """Return whether `values` are a list of positive finite numbers of this type; whole numbers count as float."""
    kinds = (int, float) if kind is float else (int,)
    return isinstance(values, (list, tuple)) and all(
        isinstance(v, kinds) and not isinstance(v, bool) and 0 < v < float("inf") for v in values)


def _check_numbers(value: Any) -> None:
    if isinstance(value, (dict, list, tuple)):
        if len(value) > _MAX_ENTRIES:
            raise _wrong("a list", f"{len(value)} entries long", f"at most {_MAX_ENTRIES} long")
        for item in value.values() if isinstance(value, dict) else value:
            _check_numbers(item)
    elif isinstance(value, (int, float)) and not abs(value) <= _MAX_NUMBER:
        raise _wrong("a number", value, f"at most {_MAX_NUMBER}")


def _check_names(entry: dict[str, Any]) -> None:
    for key, (folder, kind) in _FOLDERS.items():
        for name in entry[key] if isinstance(entry.get(key), list) else [entry.get(key)]:
            if name is not None and not _is_nnunets(str(name), folder, kind):
                raise _untrusted(key, name, f"no part of nnunetv2.{folder}")


@lru_cache
def _is_nnunets(name: str, folder: str, kind: type | None) -> bool:
    """Return False if nnU-Net would find something else by this name; a name that it does not find is harmless."""
    if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
        return False
    found = recursive_find_python_class(str(Path(nnunetv2.__path__[0], *folder.split("."))), name, f"nnunetv2.{folder}")
    if found is None:
        return True
    right = isfunction(found) if kind is None else isinstance(found, type) and issubclass(found, kind)
    return right and found.__module__.startswith("nnunetv2.")


def _check_architecture(architecture: Any) -> None:
    for key, name in _imported(architecture):
        if not isinstance(name, str) or not re.fullmatch(rf"({'|'.join(map(re.escape, _PACKAGES))})[\w.]+", name):
            raise _untrusted(key, name, "a class of another package, whose code would run")
        found = _located(name)
        if found is None:
            raise ConfigurationError(f"{key} of the plans is {name!r}, which cannot be found. Install the version of "
                                     f"{name.split('.')[0]} that the model was trained with.")
        if not (isinstance(found, type) and issubclass(found, nn.Module) and found.__module__.startswith(_PACKAGES)):
            raise _untrusted(key, name, "no layer or network")


def _imported(architecture: Any) -> Iterator[tuple[str, Any]]:
    """Yield (key, name) of everything that nnU-Net would import to build the network."""
    if not isinstance(architecture, dict):
        return
    yield "network_class_name", architecture.get("network_class_name")
    arguments, imported = architecture.get("arch_kwargs"), architecture.get("_kw_requires_import")
    if not isinstance(arguments, dict) or not isinstance(imported, list):
        raise _wrong("architecture", architecture, "an object with arch_kwargs and _kw_requires_import")
    yield from ((str(key), arguments[key]) for key in map(str, imported) if arguments.get(key) is not None)


@lru_cache
def _located(name: str) -> Any:
    """Return what nnU-Net finds by a name that begins with one of `_PACKAGES`; it also finds classes that moved."""
    if (found := pydoc.locate(name)) is None and name.startswith("dynamic_network_architectures."):
        folder, package = Path(dynamic_network_architectures.__path__[0]), "dynamic_network_architectures.architectures"
        return recursive_find_python_class(str(folder / "architectures"), name.split(".")[-1], package)
    return found


def _untrusted(key: str, name: object, what: str) -> UntrustedFileError:
    return UntrustedFileError(
        f"{key} of the plans is {name!r:.200}, {what}, so the network cannot be built safely. Nothing was imported. If "
        "it is an architecture that you installed yourself, say so with --trust (Python: trust=True).")
