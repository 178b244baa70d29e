"""One run of a protocol in this process: nnU-Net's training, nnU-Net's prediction, scores."""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import traceback
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from ..adapters.strength import trained_weights
from ..compare.metrics import LabelValues, score
from ..compare.results import CaseScores, RunResult
from ..compare.training_log import training_facts
from ..datasets.annotated import Undrawn
from ..datasets.images import Case
from ..errors import ConfigurationError, DanteError
from ..models.checkpoint import load_checkpoint_safely
from ..models.memory import PeakMemory
from ..models.overrides import checked_overrides
from ..models.settings import read_dante_block, with_overrides
from ..training.launch import VARIABLE
from ..training.trainer import DanteMixin
from ..training.trainers import find_trainer
from .processes import processor_name
from .protocol import PlannedRun, Protocol

_WARM: list[bool] = []  # True once this process has trained


@dataclass(frozen=True, kw_only=True)
class Scored:
    """Test cases, the labels of their masks, and in which cases some of these were not drawn."""

    cases: Mapping[str, Case]
    labels: LabelValues
    undrawn: Undrawn = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker needs for one run.

    preprocessed: folder of the data set. untrained: trainer of a zero-shot run, which starts as any other does.
    test, donor_test: cases to score after the run, None for none. out: the protocol's folder, in which the run keeps
    its log and masks. donor_before: the untrained donor's scores on its own cases, {} where not measured. threads: CPU
    threads of this run. side_by_side: runs at a time.
    """

    run: PlannedRun
    protocol: Protocol
    configuration: str
    preprocessed: Path
    untrained: str
    test: Scored
    donor_test: Scored | None
    out: Path
    donor_before: CaseScores
    threads: int
    side_by_side: int


def execute(job: Job) -> RunResult:
    """Run a job and return its result; whatever goes wrong stands in the result's `error`."""
    torch.set_num_threads(job.threads)
    torch._dynamo.reset()  # after 8 networks in one process it would compile no more, and run the others eagerly
    log = job.out / "logs" / f"{job.run.id}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        try:
            _warm_up(job)
            return _result(job, **_train_and_score(job))
        except Exception as error:
            traceback.print_exc()
            return _result(job, error=f"{type(error).__name__}: {error}")


def _warm_up(job: Job) -> None:
    """Take one step before the first run of a process: what libraries load then would count as memory of that run."""
    if _WARM or torch.cuda.is_available():  # CUDA's allocator counts tensors alone
        return
    trainer = _trainer(job)
    trainer.initialize()
    trainer.num_val_iterations_per_epoch = 1
    trainer.on_train_start()
    trainer.on_train_epoch_start()
    trainer.train_step(next(trainer.dataloader_train))
    _WARM.append(True)


def _train_and_score(job: Job) -> dict[str, Any]:
    """Return the facts of the run's result."""
    _seed(job.run.id)
    trainer, trained = _trainer(job), job.run.fold is not None
    memory = PeakMemory(trainer.device)
    if trained:
        trainer.run_training()
    else:
        trainer.on_train_start()  # scores the start weights and saves them as the first checkpoint_best
    facts: dict[str, Any] = {"trained_parameters": 0, "iterations_per_epoch": trainer.num_iterations_per_epoch}
    peak = memory.peak_mib()
    folder, checkpoint = Path(trainer.output_folder), f"checkpoint_{'final' if trained else 'best'}.pth"
    content = load_checkpoint_safely(folder / checkpoint)
    known = training_facts(content)
    if trained:
        adapter = folder / "adapter.safetensors"
        facts |= known | {"adapter_mib": adapter.stat().st_size / 2**20 if adapter.is_file() else None}
    else:
        facts |= {name: known[name] for name in ("start_dice", "total_parameters")}
    facts["peak_memory_mib"] = peak
    predictor = _predictor(job, folder, checkpoint, trainer.device)
    facts |= _score(job, predictor, masks=job.out / "predictions" / job.run.id)
    if trained and known["strength"] not in (None, 1):
        predictor.list_of_parameters = [trained_weights(content)]
        facts["full_strength"] = _score(job, predictor)
    if not job.protocol.keep_checkpoints:
        for file in (*folder.glob("*.pth"), *folder.glob("*.safetensors")):
            file.unlink()
    return facts


def _score(job: Job, predictor: nnUNetPredictor, *, masks: Path | None = None) -> dict[str, CaseScores]:
    """Return the scores on the test cases, and on the donor's own where there are any."""
    tolerance_mm = job.protocol.tolerance_mm
    scores = {"cases": score_cases(predictor, job.test, tolerance_mm=tolerance_mm, masks=masks)}
    if job.donor_test:
        scores["donor_cases"] = score_cases(predictor, job.donor_test, tolerance_mm=tolerance_mm)
    return scores


def _seed(name: str) -> None:
    """Two runs of a protocol draw different patches, the same run always the same ones (one process, CPU)."""
    number = zlib.crc32(name.encode())
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def check_methods(protocol: Protocol) -> None:
    """Find every trainer of the protocol, and check what the protocol sets for it.

    Raises:
        ConfigurationError: names the method; a trainer is not found, or has no such option, or refuses a value.
    """
    for method in protocol.methods:
        if not method.trainer:
            continue
        try:
            cls = _trainer_class(method.trainer)
            overrides = checked_overrides({**protocol.training, **method.set})
            known: set[str] = set()
            if issubclass(cls, DanteMixin):
                cls.method.with_overrides(overrides)
                known = cls.method.known_overrides() | {"iterations", "val_iterations"}
            if unread := sorted(method.set.keys() - known):
                raise ConfigurationError(f"{cls.__name__} has no option {unread[0]!r}, so that `set` would change "
                                         f"nothing; it has {', '.join(sorted(known)) or 'none'}.")
        except DanteError as error:
            raise ConfigurationError(f"Method {method.name!r} of the protocol cannot run: {error}") from error


def _trainer_class(name: str) -> type[nnUNetTrainer]:
    """Return the trainer; finding it imports it, so that options of a user's own method are known from then on."""
    try:
        return find_trainer(name)
    except Exception as error:  # nnU-Net does not find it, or whatever importing a user's module raises
        raise ConfigurationError(f"The trainer {name} is not found among nnU-Net's, nor in the folders of "
                                 f"{VARIABLE} ({os.environ.get(VARIABLE)}): {error}") from error


def _trainer(job: Job) -> nnUNetTrainer:
    """Return the run's trainer, whose results go to a folder of its own; preprocessed data are shared."""
    run = job.run
    cls = _trainer_class(run.method.trainer or job.untrained)  # first: this imports the options that are checked next
    plans = json.loads((job.preprocessed / f"{run.experiment.plans_name}.json").read_text())
    block = read_dante_block(plans)
    overrides = checked_overrides({**block["overrides"], **job.protocol.training, **run.method.set})
    plans |= {"plans_name": run.id.replace("__", "-"), "continue_training": False,
              "dante": with_overrides(block, overrides)}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = cls(plans=plans, configuration=job.configuration, fold=run.fold or 0, device=device,
                  dataset_json=json.loads((job.preprocessed / "dataset.json").read_text()))
    trainer.logger.plot_progress_png = lambda folder: None  # one figure per epoch costs more time than a short epoch
    shutil.rmtree(trainer.output_folder, ignore_errors=True)  # of a run that was stopped
    Path(trainer.output_folder).mkdir(parents=True)
    return trainer


def _predictor(job: Job, fold: Path, checkpoint: str, device: torch.device) -> nnUNetPredictor:
    predictor = nnUNetPredictor(use_mirroring=job.protocol.mirroring, device=device, allow_tqdm=False,
                                perform_everything_on_device=device.type == "cuda")
    predictor.initialize_from_trained_model_folder(str(fold.parent), (fold.name.removeprefix("fold_"),), checkpoint)
    return predictor


def score_cases(predictor: nnUNetPredictor, test: Scored, *, tolerance_mm: float,
                masks: Path | None = None) -> dict[str, dict[str, dict[str, float]]]:
    """Predict the cases as nnU-Net does and score the predictions; return case -> label -> scores.

    masks: folder for the predicted masks; None: they are not kept. Labels that only the test masks or only the network
    have are left out.
    """
    reader = predictor.plans_manager.image_reader_writer_class()
    scores = {}
    for name, case in test.cases.items():
        image, properties = reader.read_images([str(file) for file in case.images])
        truth, _ = reader.read_seg(str(case.mask))
        mask = predictor.predict_single_npy_array(image, properties, None, None, False)
        if masks is not None:
            masks.mkdir(parents=True, exist_ok=True)
            reader.write_seg(mask, str(masks / f"{name}{predictor.dataset_json['file_ending']}"), properties)
        labels = {label: v for label, v in test.labels.items() if label not in test.undrawn.get(name, ())}
        scores[name] = score(truth[0].astype(int), mask, labels=labels,
                             predicted_labels=predictor.dataset_json["labels"], spacing_mm=properties["spacing"],
                             tolerance_mm=tolerance_mm)
    return scores


def _result(job: Job, **facts: Any) -> RunResult:
    run, experiment = job.run, job.run.experiment
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor_name()
    machine = f"{device}, {job.threads} threads a run, {job.side_by_side} at a time"
    return RunResult(**{
        "experiment": experiment.name, "simulated": experiment.simulated, "donor": Path(experiment.donor).name,
        "method": run.method.name, "trainer": run.method.trainer, "shots": run.shots, "all": run.all, "seed": run.seed,
        "cases": {}, "tolerance_mm": job.protocol.tolerance_mm, "donor_before": job.donor_before,
        "machine": machine, "date": date.today().isoformat(), **facts})
