"""Weights by name, with shell patterns: `decoder.*`, `encoder.stages.0*`, `*.transpconvs.*`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from ..errors import ConfigurationError

Value = TypeVar("Value")


def weight_names(network: nn.Module, modules: Iterable[nn.Module]) -> dict[str, nn.Module]:
    """Return canonical weight name -> module; canonical is the name under which the module was registered first."""
    wanted = {id(module) for module in modules}
    return {f"{name}.weight".lstrip("."): m for name, m in network.named_modules() if id(m) in wanted}


def matching(names: Iterable[str], patterns: Mapping[str, Value], *, option: str) -> dict[str, Value]:
    """Return name -> value of the first pattern that matches it; names that none matches are left out.

    option: what the patterns are called where they come from, for the message.

    Raises:
        ConfigurationError: a pattern matches no name.
    """
    names = tuple(names)
    if idle := [pattern for pattern in patterns if not any(fnmatchcase(name, pattern) for name in names)]:
        shown = names if len(names) < 7 else (*names[:3], "...", *names[-3:])
        raise ConfigurationError(f"{option}: {idle[0]!r} matches none of the {len(names)} weights that can be adapted "
                                 f"here: {', '.join(shown) or 'none'}.")
    found = ((name, next((v for p, v in patterns.items() if fnmatchcase(name, p)), None)) for name in names)
    return {name: value for name, value in found if value is not None}
