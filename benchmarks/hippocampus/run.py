"""Everything of the hippocampus benchmark from a data folder: prepare, run a protocol, compare.

    python benchmarks/hippocampus/run.py TASK04 OUT [--protocol search.toml] [--jobs 2]

OUT/<protocol>/ holds the results, OUT/<protocol>/report the report. Stopped at any moment, the same command goes on.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="Task04_Hippocampus of the Medical Segmentation Decathlon")
    parser.add_argument("out", type=Path)
    parser.add_argument("--protocol", default="protocol.toml", help="search.toml tunes on development cases")
    parser.add_argument("--jobs", default="1")
    options = parser.parse_args()
    out = options.out.resolve()
    if not (out / "donors" / "merged" / "fold_0" / "checkpoint_final.pth").is_file():
        subprocess.run([sys.executable, HERE / "prepare.py", options.data, out], check=True)
    shutil.copy(HERE / options.protocol, out / options.protocol)
    folders = {name: str(out / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    environment = os.environ | folders | {"nnUNet_compile": "f", "nnUNet_def_n_proc": "1"}
    results = out / Path(options.protocol).stem
    for command in (["benchmark", out / options.protocol, "-o", results, "--jobs", options.jobs],
                    ["compare", results, "-o", results / "report"]):
        subprocess.run([sys.executable, "-m", "nnunet_dante.cli", *command], check=True, env=environment)


if __name__ == "__main__":
    main()
