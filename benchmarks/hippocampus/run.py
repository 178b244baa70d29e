"""Everything of the hippocampus benchmark from a data folder: prepare, run a protocol, compare.

    python benchmarks/hippocampus/run.py TASK04 OUT [--protocol search.toml] [--jobs 2] [--go-on] [--keep]

OUT/<protocol>/ holds the results, OUT/<protocol>/report the report. Stopped at any moment, the same command goes on.
--go-on starts from the results in benchmarks/results/hippocampus instead of from none; --keep puts them there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

from nnunet_dante.benchmark.protocol import run_id
from nnunet_dante.compare.results import read_results, write_result, write_results

HERE = Path(__file__).parent
KEPT = HERE.parent / "results" / "hippocampus"


def unpack(results: Path, name: str) -> None:
    """Give `results` the runs that are kept in the repository."""
    results.mkdir(parents=True)
    shutil.copy(KEPT / name / "settings.json", results)
    for run in read_results(KEPT / name / "runs.json"):
        write_result(run, results / "runs" / f"{run_id(run.experiment, run.method, run.shots, run.seed)}.json")


def pack(results: Path, name: str) -> None:
    """Keep the runs, their settings and the report's tables in the repository."""
    kept = KEPT / name
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(results / "report" / "tables", kept / "tables")
    shutil.copy(results / "settings.json", kept)
    report = (results / "report" / "report.md").read_text().splitlines()
    (kept / "report.md").write_text("\n".join(line for line in report if not line.startswith("![")) + "\n")
    write_results(read_results(results), kept / "runs.json")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="Task04_Hippocampus of the Medical Segmentation Decathlon")
    parser.add_argument("out", type=Path)
    parser.add_argument("--protocol", default="protocol.toml", help="search.toml tunes on development cases")
    parser.add_argument("--jobs", default="1")
    parser.add_argument("--keep", action="store_true", help="the results in the repository")
    parser.add_argument("--go-on", action="store_true", help="from the results kept in the repository")
    options = parser.parse_args()
    out = options.out.resolve()
    if not (out / "donors").is_dir():
        subprocess.run([sys.executable, HERE / "prepare.py", options.data, out], check=True)
    shutil.copy(HERE / options.protocol, out / options.protocol)
    folders = {name: str(out / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    environment = os.environ | folders | {"nnUNet_compile": "f", "nnUNet_def_n_proc": "1"}
    results = out / Path(options.protocol).stem
    if options.go_on and not results.exists():
        unpack(results, results.name)
    for command in (["benchmark", out / options.protocol, "-o", results, "--jobs", options.jobs],
                    ["compare", results, "-o", results / "report"]):
        subprocess.run([sys.executable, "-m", "nnunet_dante.cli", *command], check=True, env=environment)
    if options.keep:
        pack(results, results.name)


if __name__ == "__main__":
    main()
