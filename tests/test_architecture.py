"""The architecture, enforced: the direction of imports, no circle, and files and folders that can be read.

The rooms of the package and the reasons for them are in docs/decisions.md. Imports are read from the source, those
inside functions included; imports for type checkers alone do not count.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "nnunet_dante"
LEVELS = (  # a room may import from those before its own level, and from its neighbours without a circle
    ("errors", "types", "files", "versions"),
    ("peft",),
    ("methods",),
    ("models",),
    ("training", "transfers", "adapters", "datasets"),
    ("ui", "adaptation", "federation", "demo", "benchmark", "advise", "command", "dafne", "compare"),
    ("cli_adapter", "cli_compare", "cli_dataset", "cli_federate", "cli_options", "cli_words"),
    ("cli",),
)
LEVEL_OF = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}
WITHOUT_NNUNET = ("nnunet_dante.peft", "nnunet_dante.methods", "nnunet_dante.compare.metrics",
                  "nnunet_dante.dafne.payload", "nnunet_dante.federation.aggregate")
SMALL_FILES = {  # file: why it stands alone although it has fewer than 40 lines
    "types.py": "names of types that every room uses; any other place would make a circle",
    "peft/modes.py": "used by rooms that share nothing else",
    "training/lr.py": "a pure function of the epoch, tested alone",
}
LARGEST_FILE, SMALLEST_FILE, LARGEST_FOLDER = 350, 40, 16  # lines, lines, files


def _module(file: Path) -> str:
    parts = ("nnunet_dante", *file.relative_to(PACKAGE).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {_module(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def _nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Yield every node that runs: the body of `if TYPE_CHECKING:` is left out."""
    for node in ast.iter_child_nodes(tree):
        guarded = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        yield from (inner for part in node.orelse for inner in (part, *_nodes(part))) if guarded else (
            node, *_nodes(node))


def _imports(module: str, source: str, known: set[str], *, is_package: bool) -> set[str]:
    """Return the absolute names of the modules that `source` imports."""
    found = set()
    for node in _nodes(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[:len(module.split(".")) - node.level + is_package] if node.level else []
            target = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:  # `from . import x` imports the module x where there is one
                inner = f"{target}.{alias.name}"
                found.add(inner if inner in known else target)
    return found - {module}


GRAPH = {module: _imports(module, file.read_text(), set(FILES), is_package=file.name == "__init__.py")
         for module, file in FILES.items()}


def _room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def _own(modules: set[str]) -> set[str]:
    return {module for module in modules if module in FILES and module != "nnunet_dante"}


def _reachable(start: str) -> set[str]:
    found, todo = set(), [start]
    while todo:
        new = GRAPH.get(todo.pop(), set()) - found
        found |= new
        todo += new
    return found


def test_reading_imports():
    known = {"a", "a.b", "a.b.c", "a.d"}
    source = "import json\nfrom . import c, X\ndef f():\n    from ..d import y\nif TYPE_CHECKING:\n    from ..e import z\n"
    assert _imports("a.b.m", source, known, is_package=False) == {"json", "a.b.c", "a.b", "a.d"}
    assert _imports("a.b", "from .c import x\nfrom .. import d", known, is_package=True) == {"a.b.c", "a.d"}


def test_every_room_has_a_level():
    assert {_room(module) for module in FILES} - {""} <= set(LEVEL_OF)


def test_imports_run_in_one_direction():
    wrong = [f"{module} imports {other}" for module in FILES if module != "nnunet_dante"
             for other in _own(GRAPH[module]) if LEVEL_OF[_room(other)] > LEVEL_OF[_room(module)]]
    assert not wrong, "\n".join(sorted(wrong))


def test_no_circle_between_modules():
    try:
        TopologicalSorter({module: _own(others) for module, others in GRAPH.items()}).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_no_circle_between_rooms():
    rooms: dict[str, set[str]] = {}
    for module in FILES:
        if module != "nnunet_dante":
            rooms.setdefault(_room(module), set()).update(map(_room, _own(GRAPH[module])))
    try:
        TopologicalSorter({room: others - {room} for room, others in rooms.items()}).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


def test_what_must_work_without_nnunet_never_imports_it():
    wrong = [f"{module} reaches {other}" for module in FILES if module.startswith(WITHOUT_NNUNET)
             for other in _reachable(module) if other.split(".")[0] == "nnunetv2"]
    assert not wrong, "\n".join(sorted(wrong))


def test_code_shipped_to_dafne_imports_nothing_of_ours():
    wrong = [f"{module} imports {other}" for module in FILES if module.startswith("nnunet_dante.dafne.payload")
             for other in GRAPH[module]
             if other.startswith("nnunet_dante") and not other.startswith("nnunet_dante.dafne.payload")]
    assert not wrong, "\n".join(sorted(wrong))


@pytest.mark.parametrize("folder", ["benchmarks", "examples", "docs"])
def test_what_stands_beside_the_package_imports_what_it_has(folder):
    missing = []
    for file in (PACKAGE.parent / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").startswith("nnunet_dante"):
                module = import_module(str(node.module))
                missing += [f"{file.name}: {node.module}.{alias.name}" for alias in node.names
                            if not hasattr(module, alias.name) and not find_spec(f"{node.module}.{alias.name}")]
    assert not missing


def test_folders_can_be_looked_through():
    folders = {file.parent for file in FILES.values()}
    wrong = [f"{folder.relative_to(PACKAGE.parent)}: {count} files" for folder in sorted(folders)
             if (count := len(list(folder.glob("*.py")))) > LARGEST_FOLDER]
    assert not wrong, "\n".join(wrong)


def test_files_are_neither_crumbs_nor_books():
    lengths = {str(file.relative_to(PACKAGE)): len(file.read_text().splitlines()) for file in FILES.values()}
    wrong = [f"{name}: {lines} lines" for name, lines in lengths.items() if lines > LARGEST_FILE
             or (lines < SMALLEST_FILE and not name.endswith("__init__.py") and name not in SMALL_FILES)]
    assert not wrong, "\n".join(wrong)
    assert all(lengths.get(name, 0) < SMALLEST_FILE for name in SMALL_FILES), "no longer small: take it off the list"
