"""Trainings in forked processes that are killed: at any moment, and around every write of a result.

nnU-Net is imported once, in the process that forks: a training that is killed costs a second, not an import.
"""

from __future__ import annotations

import os
import random
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from running import Prepared, build

from nnunet_dante.adapters.file import read_adapter
from nnunet_dante.command.inspect import inspect_path
from nnunet_dante.methods import GradualUnfreezing, LoRA
from nnunet_dante.models.checkpoint import file_sha256, load_checkpoint_safely
from nnunet_dante.training.trainer import DanteMixin

CHECKPOINTS = ("checkpoint_final.pth", "checkpoint_latest.pth", "checkpoint_best.pth")  # the order in which --c looks
FULL = Path("/dev/full")  # every write into it fails with ENOSPC


class Peaked(DanteMixin):
    """The second epoch scores best: whoever loses its checkpoint_best, or its score, ends with another one."""

    def on_validation_epoch_end(self, val_outputs: list) -> None:
        super().on_validation_epoch_end(val_outputs)
        self.logger.log("mean_fg_dice", 9.0 * (self.current_epoch == 1), self.current_epoch)


class PeakedLoRA(Peaked, nnUNetTrainer):
    method = LoRA()


class PeakedGradualUnfreezing(Peaked, nnUNetTrainer):
    method = GradualUnfreezing()


def full_disk_for(path: Path) -> None:
    """Let the next write of `path` in this process find the disk full."""
    if not FULL.exists():
        pytest.skip("this system has no /dev/full")
    path.with_name(f".{path.name}.{os.getpid()}.tmp").symlink_to(FULL)


@dataclass(frozen=True)
class Kill:
    """When to kill: after `seconds`; or, with an event, `seconds` after the event-th access to a file of results."""

    seconds: float
    event: int | None = None


def moments(rng: random.Random, *, seconds: float, events: int) -> Iterator[Kill]:
    """Draw moments of a training that takes `seconds` and has so many events; two of three lie in or around a write."""
    while True:
        if rng.random() < 1 / 3:
            yield Kill(rng.uniform(0, seconds))
        else:
            yield Kill(rng.choice([0.0, rng.uniform(0, 0.003)]), event=rng.randint(1, events))


@dataclass(frozen=True)
class Training:
    """One trainer on one data set, whose results lie in the folder of results of its own."""

    trainer: type
    prepared: Prepared
    results: Path
    plans: dict = field(default_factory=dict)
    save_every: int = 2

    @property
    def folder(self) -> Path:
        return next(iter(self.results.glob("*/*/fold_0")), self.results / "nothing yet")

    def run(self, *, resume: bool = True) -> None:
        """Train as `nnUNetv2_train` does, with --c unless told otherwise."""
        from nnunetv2.training.logging.nnunet_logger import LocalLogger

        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(4711 if resume and any((self.folder / name).is_file() for name in CHECKPOINTS) else 0)
        os.environ |= {"nnUNet_results": str(self.results)}
        LocalLogger.plot_progress_png = lambda *_: None  # most of the time of a tiny epoch
        trainer = build(self.trainer, self.prepared, plans=dict(self.plans), resume=resume)
        if not trainer.was_initialized:
            trainer.initialize()
        trainer.save_every = self.save_every
        trainer.run_training()


def forked(action: Callable[[], None], *, kill: Kill | None = None, watch: Path | None = None) -> int:
    """Run in a child process; return its wait status: 0 for success, the signal if it was killed, else 256 and more.

    watch: the folder in which an access to a result is an event: it is opened, renamed, removed or synchronised.
    """
    sys.stdout.flush()
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        _child(action, writing, watch)
    os.close(writing)
    try:
        if kill is not None:
            _wait(reading, kill)
            os.kill(child, signal.SIGKILL)  # a zombie if it has ended: its number is still its own
        return os.waitpid(child, 0)[1]
    finally:
        os.close(reading)


def _child(action: Callable[[], None], writing: int, watch: Path | None) -> None:
    status = 1
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork: the child would wait for them for ever
    try:
        if watch is not None:
            _report(writing, str(watch))
        with Path(os.devnull).open("w") as sys.stdout:
            action()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def _report(writing: int, watch: str) -> None:
    """Write a byte into the pipe before each access to a result."""
    synchronise = os.fsync

    def hook(event: str, arguments: tuple) -> None:
        if event in ("open", "os.rename", "os.remove") and str(arguments[0]).startswith(watch) and (
                str(arguments[0]).endswith((".tmp", ".pth"))):
            os.write(writing, b".")

    def fsync(number: int) -> None:
        os.write(writing, b".")
        synchronise(number)

    sys.addaudithook(hook)
    os.fsync = fsync


def _wait(reading: int, kill: Kill) -> None:
    if kill.event is not None:
        for _ in range(kill.event):
            if not os.read(reading, 1):  # the child has ended
                return
        time.sleep(kill.seconds)
        return
    end = time.monotonic() + kill.seconds
    while (left := end - time.monotonic()) > 0 and select.select([reading], [], [], left)[0]:
        if not os.read(reading, 1 << 16):
            return


def content(folder: Path) -> dict[str, bytes]:
    """The files below a folder but nnU-Net's logs."""
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*"))
            if file.is_file() and not file.name.startswith("training_log")}


def reached(training: Training) -> int:
    """Check that all in the folder is whole; return the epoch from which --c goes on, -1 if it starts anew."""
    folder, epochs = training.folder, []
    for name in CHECKPOINTS:
        if (folder / name).is_file():
            checkpoint = load_checkpoint_safely(folder / name)
            assert all(tensor.isfinite().all() for tensor in checkpoint["network_weights"].values())
            epochs.append(checkpoint["current_epoch"])
    if (folder / "adapter.safetensors").is_file():
        read_adapter(folder / "adapter.safetensors")
    temporary = [file.name for file in folder.glob(".*.tmp")]
    assert len(temporary) <= 1, f"temporary files pile up: {temporary}"
    if epochs and (folder.parent / "plans.json").is_file():
        assert not any(name in inspect_path(folder.parent) for name in temporary)
    return epochs[0] if epochs else -1


def outcome(folder: Path) -> dict:
    """What a finished training leaves in its fold folder, to be compared with that of another."""
    final, best = (load_checkpoint_safely(folder / f"checkpoint_{name}.pth") for name in ("final", "best"))
    logged = {key: final["logging"][key] for key in ("train_losses", "val_losses", "ema_fg_dice", "lrs")}
    adapter = folder / "adapter.safetensors"
    assert not list(folder.glob(".*.tmp")) and not (folder / "checkpoint_latest.pth").exists()
    return {"final": final["network_weights"], "best": best["network_weights"], "best epoch": best["current_epoch"],
            "logged": logged, "adapter": file_sha256(adapter) if adapter.is_file() else None}


def differences(a: dict, b: dict) -> list[str]:
    """Return which parts of two outcomes are not equal bit for bit."""
    def same(x, y) -> bool:
        return list(x) == list(y) and all(torch.equal(x[key], y[key]) for key in x)

    return [key for key in a if not (same(a[key], b[key]) if key in ("final", "best") else a[key] == b[key])]


@dataclass
class Report:
    """What happened to trainings that were killed."""

    kills: int = 0
    trainings: int = 0
    in_writes: int = 0
    before_first_checkpoint: int = 0
    after_final: int = 0
    temporaries: int = 0
    failures: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Undisturbed:
    """What a training that nobody kills takes, and leaves."""

    seconds: float
    events: int
    left: dict


def undisturbed(training: Training) -> Undisturbed:
    """Train to the end."""
    reading, writing = os.pipe()
    begin = time.monotonic()
    child = os.fork()
    if child == 0:
        _child(training.run, writing, training.results)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        events = len(stream.read())
    assert os.waitpid(child, 0)[1] == 0
    return Undisturbed(time.monotonic() - begin, events, outcome(training.folder))


def kill_and_continue(training: Training, kills: Iterator[Kill], report: Report, *, at_most: int,
                      expected: dict) -> None:
    """Kill a training `at_most` times, check what is left each time, then let it end and compare with `expected`."""
    epoch, report.trainings, done = -1, report.trainings + 1, []
    for kill in islice(kills, at_most):
        done.append(kill)
        status = forked(training.run, kill=kill, watch=training.results)
        assert status in (0, signal.SIGKILL), f"the training ended with {status} before {kill}"
        now, final = reached(training), (training.folder / CHECKPOINTS[0]).is_file()
        assert now >= epoch, f"{kill} took the training from epoch {epoch} back to {now}"
        epoch = now
        report.kills += status == signal.SIGKILL
        report.in_writes += status == signal.SIGKILL and kill.event is not None
        report.before_first_checkpoint += epoch < 0
        report.after_final += final
        report.temporaries += len(list(training.folder.glob(".*.tmp")))
        if final:
            break
    assert forked(training.run) == 0
    if wrong := differences(outcome(training.folder), expected):
        raise AssertionError(f"after {done} these differ from the undisturbed training: {wrong}")
