"""One run of a protocol in this process: nnU-Net's training, nnU-Net's prediction, scores."""

from __future__ import annotations

import contextlib
import json
import platform
import random
import shutil
import traceback
import zlib
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

from ..compare.metrics import score
from ..compare.results import CaseScores, RunResult
from ..compare.training_log import read_training_log
from ..errors import ConfigurationError
from ..models.checkpoint import load_checkpoint_safely
from ..models.settings import checked_overrides
from .memory import PeakMemory
from .protocol import PlannedRun, Protocol


@dataclass(frozen=True, kw_only=True)
class Job:
    """What a worker needs for one run.

    preprocessed, raw: folders of the data set. test: its test cases. out: the protocol's folder, in which the run
    keeps its log and masks. donor_before: the donor's scores on its own test cases, {} where not measured.
    """

    run: PlannedRun
    protocol: Protocol
    configuration: str
    preprocessed: Path
    raw: Path
    test: tuple[str, ...]
    out: Path
    donor_before: CaseScores
    threads: int


def execute(job: Job) -> RunResult:
    """Run a job and return its result; whatever goes wrong is in the result's `error`, never lost."""
    torch.set_num_threads(job.threads)
    log = job.out / "logs" / f"{job.run.id}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        try:
            return _train_and_score(job)
        except Exception as error:
            traceback.print_exc()
            return _result(job, error=f"{type(error).__name__}: {error}")


def _train_and_score(job: Job) -> RunResult:
    _seed(job.run.id)
    trainer = _trainer(job)
    memory = PeakMemory(trainer.device)
    if job.run.fold is None:
        trainer.on_train_start()  # scores the start weights and saves them as the first checkpoint_best
        checkpoint = "checkpoint_best.pth"
    else:
        trainer.run_training()
        checkpoint = "checkpoint_final.pth"
    peak = memory.peak_mib()
    folder = Path(trainer.output_folder)
    dante = load_checkpoint_safely(folder / checkpoint).get("dante") or {}
    predictor = _predictor(job, folder, checkpoint, trainer.device)
    experiment, masks = job.run.experiment, job.out / "predictions" / job.run.id
    facts: dict[str, Any] = {
        "cases": score_cases(predictor, job.raw, job.test, masks, tolerance_mm=job.protocol.tolerance_mm),
        "start_dice": float(np.nanmean([*dante["start_dice"].values()])) if dante.get("start_dice") else None,
        "trained_parameters": dante.get("trainable_parameters") if job.run.fold is not None else 0,
        "total_parameters": dante.get("total_parameters"), "peak_memory_mib": peak,
        "iterations_per_epoch": trainer.num_iterations_per_epoch}
    if experiment.donor_test:
        test = Path(experiment.donor_test)
        cases = sorted(f.name.removesuffix(trainer.dataset_json["file_ending"])
                       for f in (test / "labelsTr").glob(f"*{trainer.dataset_json['file_ending']}"))
        facts["donor_cases"] = score_cases(predictor, test, cases, None, tolerance_mm=job.protocol.tolerance_mm)
    if job.run.fold is not None:
        training = read_training_log(folder)
        facts |= {"curve": training.mean_dice.tolist(), "seconds": training.seconds.tolist(),
                  "stages": training.stages}
        with contextlib.suppress(FileNotFoundError):
            facts["adapter_mib"] = (folder / "adapter.safetensors").stat().st_size / 2**20
    if not job.protocol.keep_checkpoints:
        for file in (*folder.glob("*.pth"), *folder.glob("*.safetensors")):
            file.unlink()
    return _result(job, **facts)


def _seed(name: str) -> None:
    """Two runs of a protocol draw different patches, the same run always the same ones (one process, CPU)."""
    number = zlib.crc32(name.encode())
    random.seed(number)
    np.random.seed(number)
    torch.manual_seed(number)


def _trainer(job: Job) -> nnUNetTrainer:
    """Return the run's trainer, whose results go to a folder of its own; preprocessed data are shared."""
    run = job.run
    plans = json.loads((job.preprocessed / f"{run.experiment.plans_name}.json").read_text())
    overrides = {**plans["dante"]["overrides"], **job.protocol.training, **run.method.set}
    plans["dante"]["overrides"] = checked_overrides(overrides)
    plans |= {"plans_name": run.id.replace("__", "-"), "continue_training": False}
    name = run.method.trainer or "nnUNetTrainerHeadOnly"  # zero-shot: the start weights of any method, untrained
    cls = recursive_find_trainer_class_by_name(name)
    if cls is None:
        raise ConfigurationError(f"method {run.method.name!r} asks for the trainer {name}, which nnU-Net does not find "
                                 f"in nnUNet_extTrainer nor among its own.")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    trainer = cls(plans=plans, configuration=job.configuration, fold=run.fold or 0, device=device,
                  dataset_json=json.loads((job.preprocessed / "dataset.json").read_text()))
    trainer.logger.plot_progress_png = lambda folder: None  # a figure an epoch costs more than a short epoch
    shutil.rmtree(trainer.output_folder, ignore_errors=True)  # of a run that was stopped
    Path(trainer.output_folder).mkdir(parents=True)
    return trainer


def _predictor(job: Job, fold: Path, checkpoint: str, device: torch.device) -> nnUNetPredictor:
    predictor = nnUNetPredictor(use_mirroring=job.protocol.mirroring, device=device, allow_tqdm=False,
                                perform_everything_on_device=device.type == "cuda")
    predictor.initialize_from_trained_model_folder(str(fold.parent), (fold.name.removeprefix("fold_"),), checkpoint)
    return predictor


def score_cases(predictor: nnUNetPredictor, folder: Path, cases: tuple[str, ...] | list[str], masks: Path | None, *,
                tolerance_mm: float) -> CaseScores:
    """Predict cases of `folder`/imagesTr as nnU-Net predicts, and score them against labelsTr.

    masks: folder for the predicted masks; None: not kept. Returns case -> label -> scores.
    """
    reader = predictor.plans_manager.image_reader_writer_class()
    ending, labels = predictor.dataset_json["file_ending"], predictor.dataset_json["labels"]
    scores = {}
    for case in cases:
        channels = sorted(str(f) for f in (folder / "imagesTr").glob(f"{case}_[0-9][0-9][0-9][0-9]{ending}"))
        image, properties = reader.read_images(channels)
        truth, _ = reader.read_seg(str(folder / "labelsTr" / f"{case}{ending}"))
        mask = predictor.predict_single_npy_array(image, properties, None, None, False)
        if masks is not None:
            masks.mkdir(parents=True, exist_ok=True)
            reader.write_seg(mask, str(masks / f"{case}{ending}"), properties)
        scores[case] = score(truth[0].astype(int), mask, labels=labels, spacing_mm=properties["spacing"],
                             tolerance_mm=tolerance_mm)
    return scores


def _result(job: Job, **facts: Any) -> RunResult:
    run, experiment = job.run, job.run.experiment
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else \
        f"{platform.machine()}, {job.threads} threads a run"
    return RunResult(**{
        "experiment": experiment.name, "simulated": experiment.simulated, "donor": Path(experiment.donor).name,
        "method": run.method.name, "trainer": run.method.trainer, "shots": run.shots, "all": run.all, "seed": run.seed,
        "cases": {}, "tolerance_mm": job.protocol.tolerance_mm, "donor_before": job.donor_before, "machine": machine,
        "date": date.today().isoformat(), **facts})
