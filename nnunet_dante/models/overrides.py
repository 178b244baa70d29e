"""The names and kinds of what plans can override: the steps of an epoch, and every option of every method."""

from __future__ import annotations

import dataclasses
import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ..errors import ConfigurationError
from ..methods import Method

OVERRIDES = {"epochs": int, "iterations": int, "val_iterations": int, "lr": float, "rank": int, "alpha": float}
"""Those with an option of their own on the command line; they must be positive."""

_KINDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a text",
          dict: 'JSON such as {"a": 1}', list: "a list such as a,b"}


def known_overrides() -> dict[str, type]:
    """Return name -> kind of the steps of an epoch and of all options of all methods, the user's imported ones too."""
    found: dict[str, type] = dict(OVERRIDES)
    for method in _methods(Method):
        try:
            hints = typing.get_type_hints(method)
        except NameError:  # a user's method, whose hints name what its module does not import
            continue
        for field in dataclasses.fields(method):
            if field.name != "uses_start_weights" and (kind := _kind(hints[field.name])) in _KINDS:
                found.setdefault(field.name, kind)
    return found


def checked_overrides(overrides: Mapping[str, Any]) -> dict[str, Any]:
    """Return the given values (None counts as not given), each of its kind and accepted by a method that has it.

    Raises:
        ConfigurationError: an unknown name, or a value of the wrong kind or out of range.
    """
    known, checked = known_overrides(), {}
    for name, value in overrides.items():
        if name not in known:
            raise ConfigurationError(f"Override {name!r} is unknown; allowed are {', '.join(sorted(known))}.")
        if value is None:
            continue
        checked[name] = _of_kind(name, value, known[name])
        for method in _methods(Method):  # the first is the one that brought the option in
            if name in {field.name for field in dataclasses.fields(method)}:
                dataclasses.replace(method(), **{name: checked[name]})
                break
    return checked


def parse_overrides(texts: Iterable[str]) -> dict[str, Any]:
    """Return the overrides that texts KEY=VALUE say, checked.

    Raises:
        ConfigurationError: as `checked_overrides`, or a text without =, or the same key twice.
    """
    known, found = known_overrides(), dict[str, Any]()
    for text in texts:
        name, equals, value = (part.strip() for part in text.partition("="))
        if not equals or name in found:
            raise ConfigurationError(f"--set {text!r} " + ("sets a key for the second time; give each once."
                                                           if equals else "is not KEY=VALUE, such as l2_sp=0.01."))
        found[name] = _parsed(name, value, known.get(name, str))
    return checked_overrides(found)


def _parsed(name: str, text: str, kind: type) -> Any:
    if kind is str:
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
    if name in OVERRIDES and not value > 0:
        raise _wrong(name, value, kind)
    return value


def _wrong(name: str, value: Any, kind: type) -> ConfigurationError:
    wanted = _KINDS[kind] if name not in OVERRIDES else f"a positive {'whole ' if kind is int else ''}number"
    return ConfigurationError(f"Override {name} is {value!r}; it must be {wanted}.")


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
