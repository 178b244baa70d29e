"""Running a protocol: prepare the data, then every run that has no result yet, some side by side."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from tqdm import tqdm

from ..compare.results import RunResult, read_results, write_result
from ..datasets.dataset import Target, open_target
from ..datasets.images import Case, image_files
from ..datasets.shots import Shots, read_shots
from ..errors import ConfigurationError
from ..files import read_json, write_text_atomically
from ..models.donor import Donor, open_donor
from ..models.settings import read_dante_block
from ..training.launch import VARIABLE, search_path
from ..transfers.transfer import next_trainer, transfer
from ..types import PathLike
from .processes import cores, execute_all
from .protocol import Experiment, PlannedRun, Protocol, planned_runs, read_protocol, settings_digest
from .worker import Job, Scored, check_methods, execute


def run_protocol(file: PathLike, out: PathLike, *, jobs: int = 1) -> tuple[RunResult, ...]:
    """Run what is left of a protocol and return all results; each run is one JSON file in `out`/runs.

    Trainers and options are checked before the first run. A run that fails later is recorded with its error, the others
    go on, and the next call tries it again. Stopped at any moment, the same call goes on: only runs in progress are
    lost.

    Args:
        file: the protocol, a TOML file.
        out: folder of the results.
        jobs: how many runs go side by side; each gets its share of the CPU cores.

    Raises:
        ConfigurationError: the protocol, its data sets, donors, trainers or options cannot be used, or `out` holds
            results of a run that had other settings or cases.
    """
    protocol, out = read_protocol(file), Path(out).resolve()
    shots = {e.name: _shots(e.dataset) for e in protocol.experiments}
    runs = tuple(planned_runs(protocol, shots))
    todo = _without_results(runs, protocol, shots, out)
    if not todo:
        return read_results(out)
    threads = max(1, cores() // jobs)
    os.environ |= {"nnUNet_results": str(out / "nnUNet_results"), "nnUNet_n_proc_DA": "0", VARIABLE: search_path(),
                   "OMP_NUM_THREADS": str(threads)}
    with contextlib.redirect_stdout(io.StringIO()):  # nnU-Net prints where it looks for each trainer
        check_methods(protocol)
    prepared = {e.name: _prepare(e, shots[e.name].test) for e in protocol.experiments}
    with tqdm(total=len(runs), initial=len(runs) - len(todo), unit="run", smoothing=0, file=sys.stderr) as progress:
        for phase in ([r for r in todo if r.fold is None], [r for r in todo if r.fold is not None]):
            made = [Job(run=run, protocol=protocol, out=out, threads=threads, side_by_side=jobs,
                        donor_before=_donor_before(run, out), **prepared[run.experiment.name]) for run in phase]
            for result, run in execute_all(execute, made, jobs):
                write_result(result, out / "runs" / f"{run.id}.json")
                tqdm.write(_line(result), file=sys.stderr)
                progress.update()
    return read_results(out)


def _shots(dataset: int | str) -> Shots:
    """Return the folds that were drawn for a data set."""
    target = open_target(dataset)
    file = target.preprocessed / "shots.json"
    if not file.is_file():
        raise ConfigurationError(f"{target.name} has no shots.json; draw its shots first: nnunet-dante shots -d "
                                 f"{target.name} -k 1,2,4,8 --seeds 3 --test FILE")
    shots = read_shots(file)
    if not shots.test:
        raise ConfigurationError(f"the shots of {target.name} keep no test cases, so nothing could be compared; draw "
                                 f"them again with --test FILE.")
    return shots


def _without_results(runs: Sequence[PlannedRun], protocol: Protocol, shots: Mapping[str, Shots],
                     out: Path) -> list[PlannedRun]:
    """Return the runs to do; refuse results of runs that had other settings."""
    file = out / "settings.json"
    known = _known_settings(file)
    digests = {}
    for run in runs:
        drawn = shots[run.experiment.name]
        train = next((f.train for f in drawn.folds if f.fold == run.fold), ())
        digests[run.id] = settings_digest(run, protocol, {"train": train, "val": drawn.val, "test": drawn.test})
    done = {r.id for r in runs if (out / "runs" / f"{r.id}.json").is_file()}
    if changed := sorted(i for i in done if known.get(i) != digests[i]):
        raise ConfigurationError(f"{out} holds results of {len(changed)} runs whose settings or cases were others, "
                                 f"first {changed[0]}; choose another folder for the changed protocol, or remove "
                                 f"runs/{changed[0]}.json and the like to run them anew.")
    write_text_atomically(json.dumps(known | digests, indent=1), file)
    failed = {i for i in done if read_results(out / "runs" / f"{i}.json")[0].error}
    return [r for r in runs if r.id not in done or r.id in failed]


def _known_settings(file: Path) -> dict[str, str]:
    """Return the digest of each run that was planned in this folder before."""
    try:
        return msgspec.convert(read_json(file), dict[str, str]) if file.is_file() else {}
    except ValueError as error:  # msgspec.ValidationError is one, too
        raise ConfigurationError(f"{file} is damaged ({error}), so it is unknown which settings the results beside it "
                                 "had. Choose another folder, or delete this one.") from error


def _prepare(experiment: Experiment, test: Sequence[str]) -> dict[str, Any]:
    """Transfer and preprocess, unless that has been done; return what the jobs of the experiment share."""
    target = open_target(experiment.dataset)
    if unknown := sorted(set(test) - set(target.cases)):
        raise ConfigurationError(f"shots.json of {target.name} keeps {unknown[0]} for the test, which the data set no "
                                 "longer holds; draw the shots again: nnunet-dante shots.")
    donor = open_donor(experiment.donor, configuration=experiment.configuration)
    if not _is_prepared(experiment, donor, target):
        tqdm.write(f"{experiment.name}: transfer {donor.source} to {target.name} and preprocess", file=sys.stderr)
        transfer(experiment.donor, experiment.dataset, configuration=experiment.configuration, preprocess=True,
                 plans_name=experiment.plans_name, invert=experiment.invert, geometry=experiment.geometry,
                 num_processes=1)
    return {"configuration": donor.configuration, "preprocessed": target.preprocessed,
            "untrained": next_trainer(donor, otherwise="nnUNetTrainerHeadOnly"),
            "test": Scored(cases={case: target.cases[case] for case in test}, labels=target.dataset_json["labels"],
                           undrawn=target.undrawn), "donor_test": _donor_test(experiment, donor)}


def _is_prepared(experiment: Experiment, donor: Donor, target: Target) -> bool:
    """Whether plans are there that came from this donor, and preprocessed data of every case."""
    file = target.preprocessed / f"{experiment.plans_name}.json"
    if not file.is_file():
        return False
    plans = read_json(file)
    start = read_dante_block(plans)["start_weights"].get(donor.configuration, {})
    if (start.get("donor"), start.get("inverted_channels", []), start.get("geometry", "donor")) != (
            donor.provenance(), [*experiment.invert], experiment.geometry):
        return False
    data = target.preprocessed / PlansManager(plans).get_configuration(donor.configuration).data_identifier
    return all((data / f"{case}.pkl").is_file() for case in target.cases)  # the last file that nnU-Net writes of a case


def _donor_test(experiment: Experiment, donor: Donor) -> Scored | None:
    """Return the cases of the donor's own domain, whose masks have the donor's labels."""
    if not experiment.donor_test:
        return None
    folder, ending = Path(experiment.donor_test), donor.dataset_json["file_ending"]
    cases = {name: Case(images=tuple(files), mask=folder / "labelsTr" / f"{name}{ending}")
             for name, files in image_files(folder / "imagesTr", ending).items()}
    if not cases or (missing := [case.mask.name for case in cases.values() if not case.mask.is_file()]):
        raise ConfigurationError(
            f"donor_test of experiment {experiment.name!r} is {folder}, which holds " +
            (f"no {missing[0]} in labelsTr" if cases else f"no images CASE_0000{ending} in imagesTr") +
            "; give a folder with images and masks of the donor's own data set, named as nnU-Net names them.")
    return Scored(cases=cases, labels=donor.dataset_json["labels"])


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
