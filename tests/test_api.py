"""The public names, and which folder may import which."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import nnunet_dante

PACKAGE = Path(nnunet_dante.__file__).parent
PUBLIC = {
    "DanteError", "LowRankDelta", "inject", "merge", "remove", "audit_gradients", "parameter_groups", "Schedule",
    "Stage", "TrainingPlan", "Method", "LoRA", "GradualUnfreezing", "DanteGradualUnfreezing", "FineTune",
    "DecoderOnly", "HeadOnly", "FromScratch", "SpatialAdapter", "AdaptFormer",
    "DoRA", "LPFT", "ConvAdapter", "drop_aliases", "BitFit", "NormAffine", "DanteMixin", "open_donor", "transfer", "inspect_path", "export_model",
    "import_model", "__version__"}
ALLOWED = {
    "peft": {"peft", "errors", "types"},
    "freezing": {"freezing", "errors", "types"},
    "methods": {"methods", "peft", "freezing", "errors"},
    "nnunet": {"nnunet", "peft", "freezing", "methods", "errors", "types", "files", "dafne.importer"},
    "evaluation": {"evaluation", "errors", "types", "files"},
    "dafne": {"dafne", "nnunet", "errors", "types", "files"},
    "protocol": {"protocol", "nnunet", "evaluation", "errors", "files", "types"},
    "demo": {"demo", "nnunet", "evaluation", "dafne", "errors", "types"},
    "compare": {"compare", "nnunet", "evaluation", "errors", "types", "files"},
}


def test_the_public_names_are_these_and_all_can_be_imported():
    assert set(nnunet_dante.__all__) == PUBLIC
    for name in PUBLIC:
        assert getattr(nnunet_dante, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        nnunet_dante.nonsense  # noqa: B018


@pytest.mark.parametrize("command", ["import nnunet_dante", "import nnunet_dante.cli"])
def test_importing_is_quick(command):
    heavy = "import sys; sys.exit(any(m in sys.modules for m in ('torch', 'nnunetv2', 'matplotlib', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", f"{command}; {heavy}"]).returncode == 0


def imports(file: Path) -> set[str]:
    """The parts of this package that a file imports, as the first word below the package."""
    found = set()
    below = file.relative_to(PACKAGE).parts
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = list(below[:len(below) - node.level])
            target = base + (node.module.split(".") if node.module else [])
            if target:
                found.add(target[0])
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("nnunet_dante."):
            found.add(node.module.split(".")[1])
    return found


@pytest.mark.parametrize("part", ALLOWED)
def test_imports_go_one_way(part):
    files = sorted((PACKAGE / part).rglob("*.py")) or [PACKAGE / f"{part}.py"]
    for file in files:
        allowed = {name.split(".")[0] for name in ALLOWED[part]}
        assert imports(file) <= allowed, f"{file.name} imports {imports(file) - allowed}"


@pytest.mark.parametrize("part", ["peft", "freezing", "evaluation"])
def test_what_knows_no_nnunet_imports_none(part):
    for file in (PACKAGE / part).rglob("*.py"):
        assert "nnunetv2" not in {name.split(".")[0] for name in absolute_imports(file)}, file


def absolute_imports(file: Path) -> set[str]:
    nodes = list(ast.walk(ast.parse(file.read_text())))
    return {a.name for n in nodes if isinstance(n, ast.Import) for a in n.names} | {
        n.module for n in nodes if isinstance(n, ast.ImportFrom) and not n.level and n.module}
