"""What plans can override: the number of steps per epoch, and every option of every method."""

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
"""Name -> kind of the overrides that have an option of their own on the command line."""

SEARCH_PATH = "nnUNet_extTrainer"
_AUTO = ("strength", "auto")  # the default, in words
_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text",
          dict: 'JSON such as {"a": 1}', list: "a list such as a,b"}


def known_overrides() -> dict[str, type]:
    """Return name -> kind of all overrides, those of methods of the user's own included, if they are imported."""
    found: dict[str, type] = dict(OVERRIDES)
    for method in _methods(Method):
        try:
            # nnU-Net's search forgets the modules it imports; the names in them are still those of their functions.
            hints = typing.get_type_hints(method, localns=getattr(method.__init__, "__globals__", None))
        except NameError:  # a method of the user's own; its hints use names that its module does not import
            continue
        for name in _options(method):
            if name != "uses_start_weights" and (kind := _kind(hints[name])) in _KINDS:
                found.setdefault(name, kind)
    return found


def checked_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the overrides that are not None, after checking their names, kinds and ranges.

    A name that is not known yet may be an option of the user's own trainers: those below nnUNet_extTrainer are
    imported to find out.

    Raises:
        ConfigurationError: an unknown name, or a value of the wrong kind or out of range.
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
    """Return the overrides in texts such as "l2_sp=0.01", checked.

    Raises:
        ConfigurationError: as `checked_overrides`, or a text without =, or the same key twice.
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


_own_methods: list[type[Method]] = []  # nnU-Net's search forgets the modules it imports, and their classes with them


def _import_own_trainers() -> None:
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    for folder in filter(os.path.isdir, os.environ.get(SEARCH_PATH, "").split(os.pathsep)):
        try:
            # No class has this name, so the search imports every module.
            recursive_find_python_class(folder, "every module", None, folder, cleanup_imports_from_base_folder=True)
        except Exception as error:  # whatever a user's module raises
            raise ConfigurationError(f"a trainer below {folder} ({SEARCH_PATH}) cannot be imported: "
                                     f"{type(error).__name__}: {error}. nnU-Net could not use it either; mend it, or "
                                     f"take the folder out of {SEARCH_PATH}.") from error
    _own_methods[:] = _methods(Method)


def _refuse_out_of_range(name: str, value: Any) -> None:
    """Refuse a value that is out of range for every method that defines the option; derived methods do not count."""
    if name in ("iterations", "val_iterations") and not COUNT.allows(value):
        raise ConfigurationError(f"Override {name} is {value!r}; give {COUNT.text}.")
    errors: list[ConfigurationError] = []
    for method in _methods(Method):
        if name not in _options(method) or any(name in _options(base) for base in method.__bases__):
            continue
        try:
            method.check(name, value)
            if not any(required and other != name for other, required in _options(method).items()):
                method(**{name: value})  # its own checks, beyond the limits
            return
        except ConfigurationError as error:
            errors.append(error)
    if errors:
        raise errors[0]


def _options(method: type) -> dict[str, bool]:
    """Return option -> whether the method cannot be made without it."""
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
    """Return the class behind a type hint: `dict` of dict[str, int], `int` of int | None, `list` of a tuple."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        kinds = [_kind(part) for part in typing.get_args(hint) if part is not type(None)]
        return kinds[0] if len(kinds) == 1 else None
    origin = typing.get_origin(hint) or hint
    return {tuple: list, Mapping: dict}.get(origin, origin)


def _methods(method: type[Method]) -> Iterator[type[Method]]:
    yield method
    for below in method.__subclasses__():
        yield from _methods(below)
