"""The documentation says what is: links lead somewhere, the API page is complete, and its code runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import running
import torch

import nnunet_dante

REPOSITORY = Path(__file__).parents[1]
PAGES = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (REPOSITORY / "docs").glob("*.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page):
    links = re.findall(r"\]\((?!\w+:|#)([^)#\s]+)", page.read_text())
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing


def test_the_api_page_has_every_public_name():
    listed = re.findall(r"^::: nnunet_dante\.(\w+)$", (REPOSITORY / "docs" / "api.md").read_text(), re.MULTILINE)
    assert sorted(listed) == sorted(name for name in nnunet_dante.__all__ if name != "__version__")


def test_readme_has_every_trainer():
    from nnunet_dante.training.trainers import TRAINERS

    for page in ("README.md", "docs/reference.md"):
        assert TRAINERS.keys() <= set(re.findall(r"nnUNetTrainer\w+", (REPOSITORY / page).read_text())), page


def test_the_method_of_contributing_trains(prepared):
    code = re.search(r"```python\n(.*?)```", (REPOSITORY / "CONTRIBUTING.md").read_text(), re.DOTALL)[1]
    names = {"__name__": __name__}
    exec(code, names)  # noqa: S102
    trained = running.train(names["nnUNetTrainerHeadThenBottleneck"], prepared)
    start = torch.load(prepared.preprocessed / "nnUNetDantePlans_3d_fullres_start.pth", weights_only=True)
    end = trained.network.state_dict()
    changed = {key for key, old in start["network_weights"].items() if not torch.equal(old, end[key])}
    assert {key.split(".")[0] for key in changed} == {"encoder", "decoder"}
    assert all("seg_layers" in key or "encoder.stages.2" in key for key in changed)
    assert sum(len(line) > 0 for line in code.splitlines()) <= 20


def _section(title: str) -> str:
    return (REPOSITORY / "docs" / "reference.md").read_text().partition(title)[2].partition("\n## ")[0]


def test_the_reference_lists_the_keys_that_are_written(prepared):
    from nnunet_dante.adapters.file import read_adapter
    from nnunet_dante.training.trainers import nnUNetTrainerLoRA

    folder = Path(running.train(nnUNetTrainerLoRA, prepared).output_folder)
    written = torch.load(folder / "checkpoint_final.pth", weights_only=False)["dante"]
    rows = re.findall(r"^\| (`.*?) \|", _section("## Checkpoints"), re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(written)

    example = json.loads(re.search(r"```json\n(.*?)```", _section('### The `"dante"` block'), re.DOTALL)[1])
    block = json.loads((prepared.preprocessed / "nnUNetDantePlans.json").read_text())["dante"]
    assert set(block) <= set(example)
    for configuration, entry in block["start_weights"].items():
        assert set(entry) == set(example["start_weights"][configuration])
        assert set(entry["donor"]) == set(example["start_weights"][configuration]["donor"])

    metadata, _ = read_adapter(folder / "adapter.safetensors")
    row = re.search(r"^\| metadata .*$", _section("## `adapter.safetensors`"), re.MULTILINE)[0]
    assert set(metadata) <= set(re.findall(r"`(\w+)`", row))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_files_that_are_named_exist(page):
    named = set(re.findall(r"`(?:nnunet_dante/)?((?:\w+/)+\w+\.py)`", page.read_text()))
    missing = {name for name in named if not any((root / name).exists() for root in (
        REPOSITORY, REPOSITORY / "nnunet_dante"))}
    assert page.name == "CHANGELOG.md" or not missing


@pytest.mark.slow
def test_the_tutorial_runs(tmp_path):
    subprocess.run([sys.executable, REPOSITORY / "docs" / "tutorial.py"], cwd=tmp_path, check=True, timeout=900)
    assert (tmp_path / "nnunet-dante-tutorial" / "tutorial.png").is_file()
    assert (tmp_path / "nnunet-dante-tutorial" / "Liver.model").is_file()
