"""Seconds to a result by method and phase, from the logs and results of a protocol that was run.

    python benchmarks/hippocampus/minutes.py OUT/minutes [--out benchmarks/results]   # OUT: of run.py with minutes.toml

Medians over all runs of a method. `start`: from the first line of the log to the first epoch: network, audit, data, and
the scoring of the start weights. `epochs`: training and nnU-Net's validation of each epoch. `choice`: of the strength.
`to 99 %`: start, and the epochs until the mean pseudo Dice of three epochs is 99 % of that of the last five; 0 epochs
where the start weights were there already. Importing nnU-Net is not in it: overhead.py measures that.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

from nnunet_dante.benchmark.protocol import run_id
from nnunet_dante.compare.results import RunResult, read_results

SHARE, LAST, WINDOW = 0.99, 5, 3
PHASES = ("start", "epochs", "choice", "all", "to 99 %")


def times(log: str) -> Iterator[tuple[datetime, str]]:
    """Yield (time, text) of each line of a log that has a time."""
    for line in log.splitlines():
        if found := re.match(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d+): (.*)", line):
            yield datetime.fromisoformat(found[1]), found[2]


def needed(run: RunResult) -> int:
    """Return the epochs to SHARE of the run's own final Dice."""
    target = SHARE * statistics.mean(run.curve[-LAST:])
    if run.start_dice is not None and run.start_dice >= target:
        return 0
    means = [statistics.mean(run.curve[max(0, n - WINDOW):n]) for n in range(1, len(run.curve) + 1)]
    return next(n for n, mean in enumerate(means, 1) if mean >= target)


def phases(run: RunResult, log: str) -> dict[str, float]:
    lines = list(times(log))
    began, first = lines[0][0], next(at for at, text in lines if text.startswith("Epoch 0"))
    chosen = [at for at, text in lines if text.startswith(("Choosing how much", "kept "))]
    ended = max([*chosen, *(at for at, text in lines if text.startswith("Epoch time"))])
    start = (first - began).total_seconds()
    return {"start": start, "epochs": sum(run.seconds),
            "choice": (chosen[-1] - chosen[0]).total_seconds() if len(chosen) > 1 else 0.0,
            "all": (ended - began).total_seconds(), "to 99 %": start + sum(run.seconds[:needed(run)])}


def rows(out: Path) -> list[dict[str, Any]]:
    found: dict[str, list[dict[str, float]]] = defaultdict(list)
    at_once: dict[str, list[bool]] = defaultdict(list)
    for run in read_results(out):
        if run.error or not run.curve or any(math.isnan(d) for d in run.curve):
            continue
        log = out / "logs" / f"{run_id(run.experiment, run.method, run.shots, run.seed)}.log"
        found[run.method].append(phases(run, log.read_text()))
        at_once[run.method].append(needed(run) == 0)
    return [{"method": method, "runs": len(of), "no epoch needed": sum(at_once[method]),
             **{phase: round(statistics.median(row[phase] for row in of), 1) for phase in PHASES}}
            for method, of in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder of a protocol's results, with its logs")
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[1] / "results")
    given = parser.parse_args()
    table = rows(given.results)
    facts = {"machine": read_results(given.results)[0].machine, "protocol": given.results.name, "rows": table}
    (given.out / "minutes.json").write_text(json.dumps(facts, indent=1) + "\n")
    print("| " + " | ".join(table[0]) + " |\n|" + "---|" * len(table[0]))
    print("\n".join("| " + " | ".join(map(str, row.values())) + " |" for row in table))


if __name__ == "__main__":
    main()
