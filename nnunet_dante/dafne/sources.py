"""The source code in a `.model` file: nine functions, made from the modules in `payload/`.

Dafne keeps each function as text, runs the text with `exec`, and takes the first function that this defines. It cannot
reach imports, constants and other functions beside it. So each function is written as

    from __future__ import annotations
    def apply_model(model, data):
        <the source of the payload modules it needs, without their imports of one another>
        return apply(model, data)

The modules in `payload/` are ordinary modules, linted and tested there; their text is read from there. The functions of
`payload/weights.py` stand alone already and are shipped without a wrapper.
"""

from __future__ import annotations

import ast
import inspect
import io
import json
import pprint
import re
import textwrap
import tokenize
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

from .. import __version__
from ..errors import DafneError
from ..files import MAX_JSON_BYTES, bounded, parse_json
from .payload import apply, cases, geometry, learn, network, weights

_HEADER = f"# nnunet-dante {__version__}, Apache License 2.0\n"
_APPLY = (geometry, apply)
_LEARN = (*_APPLY, cases, learn)
_LITERAL = ("{", "}", "[", "]", ":", ",", "-", "True", "False", "None")
_MAX_DEPTH = 64
_REWRITTEN = re.compile(r"(from|import) dl")  # Dafne replaces these words wherever they stand


def sources(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return the source of each function of a `.model` file; the init function holds `settings` as a literal.

    Raises:
        DafneError: the settings are not plain JSON values, or Dafne could not run a source as it is.
    """
    shipped = {
        "init_model_function": _wrapped("init_model", network.build, (network,), settings),
        "apply_model_function": _wrapped("apply_model", apply.apply, _APPLY),
        "incremental_learn_function": _wrapped("incremental_learn", learn.learn, _LEARN)}
    for name in ("weights_to_model", "model_to_weights", "weight_copy", "calc_delta"):
        shipped[f"{name}_function"] = inspect.getsource(getattr(weights, name))
    shipped["apply_delta_function"] = inspect.getsource(weights.add)
    shipped["factor_multiply_function"] = inspect.getsource(weights.multiply)
    for name, source in shipped.items():
        function_of(source, name)
    return shipped


def _wrapped(name: str, entry: Callable, modules: tuple[ModuleType, ...], settings: Mapping | None = None) -> str:
    parameters = "" if settings is not None else str(inspect.signature(entry))[1:-1]
    arguments = "SETTINGS" if settings is not None else ", ".join(inspect.signature(entry).parameters)
    body = "\n".join(_standing_alone(module) for module in modules)
    if settings is not None:
        body += f"\nSETTINGS = {_literal(settings)}\n"
    body += f"\nreturn {entry.__name__}({arguments})\n"
    return (f"{_HEADER}from __future__ import annotations\n\n\ndef {name}({parameters}):\n"
            f"{textwrap.indent(body, '    ')}")


def _standing_alone(module: ModuleType) -> str:
    """Return the module's source without `from __future__` and without imports of other payload modules."""
    source = inspect.getsource(module)
    lines = source.splitlines()
    for node in ast.parse(source).body:
        if isinstance(node, ast.ImportFrom) and (node.level or node.module == "__future__"):
            lines[node.lineno - 1:node.end_lineno] = [""] * ((node.end_lineno or node.lineno) - node.lineno + 1)
    return "\n".join(lines) + "\n"


def _literal(settings: Mapping[str, Any]) -> str:
    try:
        plain = json.loads(json.dumps(settings, allow_nan=False))
    except (TypeError, ValueError) as error:
        raise DafneError(f"The settings of the model cannot be written into a .model file ({error}); plans.json and "
                         "dataset.json must hold finite numbers, strings, lists and objects only.") from error
    return pprint.pformat(plain, width=116, sort_dicts=False)


def function_of(source: str, name: str = "function") -> Callable:
    """Return the function that Dafne would take from `source`: the first one that running it defines.

    Raises:
        DafneError: Dafne would change the text, could not run it, or would find no function.
    """
    if found := _REWRITTEN.search(source):
        raise DafneError(f"The source of {name} holds {found.group()!r}, which Dafne rewrites to "
                         f"{found.group().replace('dl', 'dafne_dl')!r}; rename the label, channel or data set there.")
    defined: dict[str, Any] = {}
    try:
        exec(compile(source, f"<{name} of a .model>", "exec"), {}, defined)
    except Exception as error:  # Dafne swallows it and keeps the text in the function's place
        raise DafneError(f"The source of {name} does not run by itself ({error!r}).") from error
    function = next((v for v in defined.values() if callable(v)), None)
    if function is None:
        raise DafneError(f"The source of {name} defines no function.")
    function.source = source
    return function


def settings_of(source: str) -> dict[str, Any]:
    """Read the settings back from the source of an init function, without running it.

    Raises:
        DafneError: the source holds no settings, or they are not JSON values.
    """
    _, found, text = source.partition("\n    SETTINGS = ")
    if not found:
        raise DafneError("The .model file was not written by nnunet-dante: its network has no SETTINGS to read.")
    try:
        settings = ast.literal_eval(_first_literal(text))
        bounded(settings)
        return parse_json(json.dumps(dict(settings)))
    except Exception as error:  # whatever tokenize, ast and json raise on damaged text
        raise DafneError(f"The network's description in the .model file is damaged ({type(error).__name__}: "
                         f"{error}).") from error


def _first_literal(text: str) -> str:
    """Return the dict at the start of `text`, and nothing but brackets, strings, numbers, True, False and None.

    Python's parser itself must not see more of a foreign source: 3.10 crashes on a long chain of names or sums.
    """
    words, depth = list[str](), 0
    for token in tokenize.generate_tokens(io.StringIO(text[:MAX_JSON_BYTES]).readline):
        if token.type in (tokenize.NL, tokenize.INDENT, tokenize.DEDENT):
            continue
        if token.type not in (tokenize.STRING, tokenize.NUMBER) and token.string not in _LITERAL:
            raise ValueError(f"{token.string[:20]!r} is no part of it")
        if token.string == "-" == "".join(words[-1:]) or depth > _MAX_DEPTH:
            raise ValueError("it is nested too deeply")
        words.append(token.string)
        depth += {"{": 1, "[": 1, "}": -1, "]": -1}.get(token.string, 0)
        if depth == 0:
            break
    return " ".join(words)
