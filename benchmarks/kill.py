"""kill -9 many times, at random moments of trainings and of their writes; every training must end as if undisturbed.

    python benchmarks/kill.py [--kills 200] [--seed 0] [--out benchmarks/results]

Trains tiny networks on synthetic images, as tests/faults/test_kill.py does with few kills. After a kill all checkpoints
must load and lead no further back than before; after up to three kills a training continues to its end, where weights,
best checkpoint, logged losses and adapter must equal those of the undisturbed training bit for bit. Needs a system that
can fork (Linux, macOS) and the packages of the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import sys
import tempfile
import time
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ |= {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "nnUNet_compile": "f", "MPLBACKEND": "Agg",
               "OMP_NUM_THREADS": "1"}

import torch  # noqa: E402
from killing import PeakedGradualUnfreezing, PeakedLoRA, Report, Training, kill_and_continue, moments, undisturbed  # noqa: E402
from running import prepare, with_overrides  # noqa: E402
from tqdm import tqdm  # noqa: E402

from nnunet_dante import __version__  # noqa: E402


def campaign(root: Path, *, kills: int, seed: int) -> Report:
    """Kill trainings of two methods in turn until there were so many kills."""
    (root / "nnUNet").mkdir()
    prepared = prepare(root / "nnUNet")
    os.environ |= {name: str(prepared.root / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    plans, rng, report = with_overrides(prepared, epochs=5), random.Random(seed), Report()
    contenders = []
    for trainer in (PeakedLoRA, PeakedGradualUnfreezing):
        training = Training(trainer, prepared, root / trainer.__name__, plans)
        contenders.append((training, undisturbed(training)))
    with tqdm(total=kills, unit="kill") as progress:
        while report.kills < kills:
            training, whole = contenders[report.trainings % 2]
            draws = moments(rng, seconds=whole.seconds, events=whole.events)
            try:
                kill_and_continue(replace(training, results=root / f"killed_{report.trainings}"), draws, report,
                                  at_most=min(3, kills - report.kills), expected=whole.left)
            except AssertionError as error:
                report.failures.append(str(error))
            progress.update(report.kills - progress.n)
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args()
    begin = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        report = campaign(Path(folder), kills=options.kills, seed=options.seed)
    result = {"date": date.today().isoformat(), "version": __version__, "python": platform.python_version(),
              "torch": torch.__version__, "system": f"{platform.system()} {platform.machine()}", "seed": options.seed,
              "minutes": round((time.monotonic() - begin) / 60, 1), **asdict(report)}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "kill.json").write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    sys.exit(bool(report.failures))


if __name__ == "__main__":
    main()
