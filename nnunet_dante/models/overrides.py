"""The numbers and options that plans can override: steps per epoch, and every option of every method."""

from __future__ import annotations

import dataclasses
import json
import os
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..errors import ConfigurationError
from ..methods import Method
from ..methods.base import COUNT

OVERRIDES = {"epochs": int, "iterations": int, "val_iterations": int, "lr": float, "rank": int, "alpha": float}
"""Name -> type of the overrides that have an option of their own on the command line."""

SEARCH_PATH = "nnUNet_extTrainer"
_AUTO = ("strength", "auto")  # "auto" is the default, so that this override changes nothing
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text",
          dict: 'JSON such as {"a": 1}', list: "a list such as a,b"}


def known_overrides() -> dict[str, type]:
    """Return {name: type} of all overrides, also those of the user's own methods that are already imported."""
    found: dict[str, type] = dict(OVERRIDES)
    for method in _methods(Method):
        try:
            # nnU-Net's search drops the modules that it imports, but functions still know the names in their module.
            hints = typing.get_type_hints(method, localns=getattr(method.__init__, "__globals__", None))
        except NameError:  # the type hints of a user's own method use names that its module does not import
            continue
        for name in _options(method):
            if name != "uses_start_weights" and (kind := _kind(hints[name])) in _KINDS:
                found.setdefault(name, kind)
    return found


def checked_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides that are not None, after a check of their names, types and ranges.

    An unknown name may be an option of the user's own trainers. To find out, the trainers below nnUNet_extTrainer are
    imported.

    Raises:
        ConfigurationError: a name is unknown, or a value has the wrong type or is out of range.
    """
    known, checked = _known_with_own(overrides), dict[str, Any]()
    for name, value in overrides.items():
        if name not in known:
            raise ConfigurationError(f"Override {name!r} is unknown; allowed are {', '.join(sorted(known))}.")
        if value is not None and (name, value) != _AUTO:
            checked[name] = _of_kind(name, value, known[name])
            _refuse_out_of_range(name, checked[name])
    return checked


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """Return the overrides in texts such as "l2_sp=0.01", after the checks of `checked_overrides`.

    Raises:
        ConfigurationError: as for `checked_overrides`; or a text has no =, or a key is set twice.
    """
    found = dict[str, str]()
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or name in found:
            raise ConfigurationError(f"--set {text!r} " + ("sets a key for the second time; give each once."
                                                           if equals else "is not KEY=VALUE, such as l2_sp=0.01."))
        found[name] = value
    known = _known_with_own(found)
    return checked_overrides({name: _parsed(name, text, known.get(name, str)) for name, text in found.items()})


def _known_with_own(names: Iterable[str]) -> dict[str, type]:
    """Return `known_overrides`, after importing the user's trainers if one of `names` is not among them."""
    known = known_overrides()
    if any(name not in known for name in names):
        _import_own_trainers()
        known = known_overrides()
    return known


_own_methods: list[type[Method]] = []  # keeps the classes alive: nnU-Net's search drops the modules that it imports


def _import_own_trainers() -> None:
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    for folder in filter(os.path.isdir, os.environ.get(SEARCH_PATH, "").split(os.pathsep)):
        try:
            # The search imports every module, because no class has this name.
            recursive_find_python_class(folder, "every module", None, folder, cleanup_imports_from_base_folder=True)
        except Exception as error:  # whatever a user's module raises
            raise ConfigurationError(f"a trainer below {folder} ({SEARCH_PATH}) cannot be imported: "
                                     f"{type(error).__name__}: {error}. nnU-Net could not use it either. Correct it, "
                                     f"or take the folder out of {SEARCH_PATH}.") from error
    _own_methods[:] = _methods(Method)


def _refuse_out_of_range(name: str, value: Any) -> None:
    """Refuse a value that no method accepts; a method counts only if it defines the option itself."""
    if name in ("iterations", "val_iterations") and not COUNT.allows(value):
        raise ConfigurationError(f"Override {name} is {value!r}; give {COUNT.text}.")
    errors: list[ConfigurationError] = []
    for method in _methods(Method):
        if name not in _options(method) or any(name in _options(base) for base in method.__bases__):
            continue
        try:
            method.check(name, value)
            if not any(required and other != name for other, required in _options(method).items()):
                method(**{name: value})  # the method's own checks, beyond the range
            return
        except ConfigurationError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _options(method: type) -> dict[str, bool]:
    """Return {option: whether it has no default, so that it must be given} of a method."""
    fields = dataclasses.fields(method) if dataclasses.is_dataclass(method) else ()
    return {f.name: f.default is f.default_factory is dataclasses.MISSING for f in fields if f.init}


def _parsed(name: str, text: str, kind: type) -> Any:
    if kind is str or (name, text) == _AUTO:
        return text
    try:
        if kind is bool:
            return {"true": True, "false": False}[text.lower()]
        if kind is list and not text.startswith("["):
            return [part.strip() for part in text.split(",")]
        return json.loads(text) if kind in (dict, list) else kind(text)
    except (ValueError, KeyError):
        raise _wrong(name, text, kind) from None


def _of_kind(name: str, value: Any, kind: type) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind in (int, float) and number and float("-inf") < value < float("inf") and kind(value) == value:
        value = kind(value)
    elif kind is list and isinstance(value, list | tuple):
        value = list(value)  # as JSON has it
    elif not isinstance(value, kind) or kind in (int, float):
        raise _wrong(name, value, kind)
    return value


def _wrong(name: str, value: Any, kind: type) -> ConfigurationError:
    return ConfigurationError(f"Override {name} is {value!r}; it must be {_KINDS[kind]}"
                              f"{' or the word auto' if name == _AUTO[0] else ''}.")


def _kind(hint: Any) -> Any:
    """Return the class for a type hint: `dict` for dict[str, int], `int` for int | None, `list` for a tuple."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        kinds = [_kind(part) for part in typing.get_args(hint) if part is not type(None)]
        return kinds[0] if len(kinds) == 1 else None
    origin = typing.get_origin(hint) or hint
    return {tuple: list, Mapping: dict}.get(origin, origin)


def _methods(method: type[Method]) -> Iterator[type[Method]]:
    yield method
    for below in method.__subclasses__():
        yield from _methods(below)
