"""campaign.py: the short form, in an interpreter of its own, since it forks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fuzz.campaign import SHORT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="limits and counts of a process are Linux's")


def test_every_reader_refuses_or_reads_hostile_files(tmp_path):
    """The long form is benchmarks/fuzz.py."""
    file = tmp_path / "counts.json"
    result = subprocess.run([sys.executable, "-m", "fuzz.campaign", "--short", "--json", str(file)],
                            cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False)
    assert result.returncode == 0, f"{result.stdout}\n{result.stderr[-3000:]}"
    counts = {count["reader"]: count for count in json.loads(file.read_text())}
    for reader, count in counts.items():
        wanted = 1 + len(SHORT.get(reader, ()))
        assert count["cases"] + count["skipped"] == wanted and count["cases"] >= wanted - 1  # random damage may be none
    assert set(SHORT) <= set(counts)
