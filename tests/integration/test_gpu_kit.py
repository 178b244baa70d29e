"""The measurements that wait for a GPU run here on the CPU, so that they work on the day."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_dante.training import trainers

pytestmark = pytest.mark.slow

RUN = Path(__file__).parents[2] / "benchmarks" / "gpu" / "run.sh"


def test_the_smoke_test_passes_every_trainer(tmp_path):
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    words = ["--part", "1", "--device", "cpu", "--tiny", "--out", tmp_path / "out", "--work", tmp_path / "work"]
    done = subprocess.run(["bash", RUN, *words], env=environment, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout[-5000:]
    rows = json.loads((tmp_path / "out" / "smoke.json").read_text())["rows"]
    assert {row["trainer"] for row in rows} == set(trainers.TRAINERS)
    assert not any(row["error"] for row in rows)
    assert done.stdout.rstrip().splitlines()[-1].startswith("| nnUNetTrainerSpatialAdapter | yes |")
