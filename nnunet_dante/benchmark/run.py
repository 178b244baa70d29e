"""Running a protocol: prepare the data, then every run that has no result yet, some side by side."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..compare.results import RunResult, read_results, write_result
from ..datasets.dataset import open_target
from ..errors import ConfigurationError
from ..files import read_json, write_text_atomically
from ..models.checkpoint import file_sha256
from ..training.launch import VARIABLE, search_path
from ..transfers.transfer import transfer
from ..types import PathLike
from .processes import cores, execute_all
from .protocol import PlannedRun, Protocol, planned_runs, read_protocol, settings_digest


def run_protocol(file: PathLike, out: PathLike, *, jobs: int = 1) -> tuple[RunResult, ...]:
    """Run what is left of a protocol and return all results; `out`/runs holds one JSON file a run.

    A run that failed is recorded with its error and the others go on; the next call tries it again. Stopped at any
    moment, the same call goes on: only runs in progress are lost. jobs: runs side by side; each gets its share of the
    CPU cores.

    Raises:
        ConfigurationError: the protocol, its data sets or donors cannot be used, or `out` holds results of a run that
            meant something else.
    """
    protocol, out = read_protocol(file), Path(out).resolve()
    tables = {e.name: _shots_table(e.dataset) for e in protocol.experiments}
    runs = tuple(planned_runs(protocol, tables))
    todo = _without_results(runs, protocol, tables, out)
    os.environ |= {"nnUNet_results": str(out / "nnUNet_results"), "nnUNet_n_proc_DA": "0", VARIABLE: search_path()}
    targets = {e.name: _prepare(e, out) for e in protocol.experiments} if todo else {}
    threads = max(1, cores() // jobs)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    with tqdm(total=len(runs), initial=len(runs) - len(todo), unit="run", smoothing=0, file=sys.stderr) as progress:
        for phase in ([r for r in todo if r.fold is None], [r for r in todo if r.fold is not None]):
            made = [_job(run, protocol, tables[run.experiment.name], out, threads, targets) for run in phase]
            for result, run in execute_all(made, jobs):
                write_result(result, out / "runs" / f"{run.id}.json")
                tqdm.write(_line(result), file=sys.stderr)
                progress.update()
    return read_results(out)


def _shots_table(dataset: int | str) -> dict[str, Any]:
    target = open_target(dataset)
    file = target.preprocessed / "shots.json"
    if not file.is_file():
        raise ConfigurationError(f"{target.name} has no shots.json; draw its shots first: nnunet-dante shots -d "
                                 f"{int(target.name[7:10])} -k 1 2 4 8 --seeds 3 --test FILE")
    table = _table(file)
    if not table["test"]:
        raise ConfigurationError(f"the shots of {target.name} keep no test cases, so nothing could be compared; draw "
                                 f"them again with --test FILE.")
    return table


def _table(file: Path) -> dict[str, Any]:
    """Read a shots.json as far as a protocol needs it."""
    try:
        table = read_json(file)
        cases = [case for key in ("val", "test") for case in table[key]]
        for fold in table["folds"]:
            cases += fold["train"]
            numbers = [fold[key] for key in ("fold", "shots", "seed")]
            if not isinstance(fold["all"], bool) or not all(isinstance(number, int) for number in numbers):
                raise TypeError(f"a fold is {fold!r:.80}")
        if not all(isinstance(case, str) for case in cases):
            raise TypeError("a case is no name")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{file} is damaged ({error!r}); draw the shots again: nnunet-dante shots.") from error
    return table


def _without_results(runs: Sequence[PlannedRun], protocol: Protocol, tables: dict, out: Path) -> list[PlannedRun]:
    """Return the runs to do; refuse results of runs that had other settings."""
    file = out / "settings.json"
    known = json.loads(file.read_text()) if file.is_file() else {}
    digests = {}
    for run in runs:
        table = tables[run.experiment.name]
        train: list[str] = next((f["train"] for f in table["folds"] if f["fold"] == run.fold), [])
        digests[run.id] = settings_digest(run, protocol, {"train": train, "val": table["val"], "test": table["test"]})
    done = {r.id for r in runs if (out / "runs" / f"{r.id}.json").is_file()}
    if changed := sorted(i for i in done if known.get(i) != digests[i]):
        raise ConfigurationError(f"{out} holds results of {len(changed)} runs whose settings or cases are others now, "
                                 f"first {changed[0]}; choose another folder for the changed protocol, or remove "
                                 f"runs/{changed[0]}.json and the like to run them anew.")
    write_text_atomically(json.dumps(known | digests, indent=1), file)
    failed = {i for i in done if json.loads((out / "runs" / f"{i}.json").read_text()).get("error")}
    return [r for r in runs if r.id not in done or r.id in failed]


def _prepare(experiment: Any, out: Path) -> dict[str, Any]:
    """Transfer and preprocess where that has not been done with this donor; returns the folders a job needs."""
    target = open_target(experiment.dataset)
    plans_file = target.preprocessed / f"{experiment.plans_name}.json"
    mark = out / "prepared" / f"{experiment.plans_name}.json"
    donor = Path(experiment.donor)
    weights = sorted(donor.glob("fold_*/checkpoint_final.pth")) if donor.is_dir() else [donor]
    state = {"donor": [file_sha256(w) for w in weights], "cases": sorted(target.cases),
             "invert": list(experiment.invert)}
    if not (plans_file.is_file() and mark.is_file() and json.loads(mark.read_text())["state"] == state):
        tqdm.write(f"{experiment.name}: transfer {donor.name} to {target.name} and preprocess", file=sys.stderr)
        report = transfer(donor, experiment.dataset, configuration=experiment.configuration, preprocess=True,
                          plans_name=experiment.plans_name, invert=experiment.invert, num_processes=1)
        mark.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(json.dumps({"state": state, "configuration": report.configuration}), mark)
    return {"configuration": json.loads(mark.read_text())["configuration"], "preprocessed": target.preprocessed,
            "raw": target.raw}


def _job(run: PlannedRun, protocol: Protocol, table: dict, out: Path, threads: int, targets: dict) -> Any:
    from .worker import Job

    return Job(run=run, protocol=protocol, out=out, threads=threads, test=tuple(table["test"]),
               donor_before=_donor_before(run, out), **targets[run.experiment.name])


def _donor_before(run: PlannedRun, out: Path) -> Any:
    """Return what the zero-shot run of the experiment scored on the donor's own cases."""
    if run.fold is None or not run.experiment.donor_test:
        return {}
    zero_shot = next(r for r in read_results(out) if r.experiment == run.experiment.name and r.is_zero_shot)
    return zero_shot.donor_cases


def _line(result: RunResult) -> str:
    dice = [s["dice"] for case in result.cases.values() for s in case.values()]
    said = result.error or f"Dice {np.nanmean(dice):.3f}" if dice or result.error else "no cases"
    return f"{result.experiment}, {result.method}, K={result.shots}, draw {result.seed}: {said}"
