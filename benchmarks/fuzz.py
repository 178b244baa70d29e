"""Hostile files for every reader of the package, and what became of them (Linux).

    python benchmarks/fuzz.py --seconds 1200 [--seed 0] [--out benchmarks/results/fuzz.json]

Each case is made and read in a process of its own, and must end in a DanteError or a correct result: without running
code, 20 s of computing, 256 MiB of memory, a file elsewhere, or a half-written output. See docs/threat-model.md.
Needs the tests, so a checkout. `python -m fuzz.campaign --only READER --case NAME` in tests/ repeats one case.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from fuzz.campaign import run, table  # noqa: E402


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1200)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "fuzz.json")
    options = parser.parse_args()
    counts = run(seconds=options.seconds, seed=options.seed)
    print(table(counts))
    options.out.write_text(json.dumps({
        "date": date.today().isoformat(), "seconds": options.seconds, "seed": options.seed,
        "machine": f"{os.cpu_count()} CPU cores, {platform.system()} {platform.machine()}",
        "versions": {"python": platform.python_version(),
                     **{name: version(name) for name in ("nnunet-dante", "nnunetv2", "torch", "numpy", "safetensors",
                                                         "SimpleITK", "nibabel")}},
        "cases": sum(c.cases for c in counts), "failures": sum(len(c.failures) for c in counts),
        "readers": [{"reader": c.reader, "cases": c.cases, "errors": c.errors, "correct": c.correct,
                     "failures": c.failures} for c in counts]}, indent=1) + "\n")
    sys.exit(any(c.failures for c in counts))


if __name__ == "__main__":
    main()
