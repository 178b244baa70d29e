"""The adaptations on this machine, as their folders say: what each was asked, how far it is, and whether it runs.

Nothing about a run is kept in the server. A run is a process of its own, and its folder tells all of it, so that the
page shows the same after a restart, in two browsers, and for runs that were started on the command line.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..adaptation import running
from ..adaptation.running import OWN_FILES, RECORD, process_in
from ..errors import ConfigurationError
from ..files import NNUNET_FOLDERS, cannot_write, read_json, write_text_atomically
from .progress import Training, read_trainings

LOG = "adapt.log"
_TAIL = 16_384  # bytes of a log that are shown
_WRITTEN = {RECORD, LOG, *OWN_FILES, "logs", "predictions", "report.md", "report.html", "results.json", "tables.json",
            "tables", "plots", "panels", "report_files", "model.zip", "adapter.safetensors", "confidence_unseen.csv"}
_started: dict[Path, subprocess.Popen] = {}  # by this server: a process imports torch before it claims its folder


@dataclass(frozen=True, kw_only=True)
class Run:
    """One adaptation.

    folder: its OUT. state: "running", "finished" or "stopped". asked: the arguments of `adapt`. begun: the trainings,
    as "TRAINER FOLD". done: step -> its facts, with "seconds" and "commands". said: the last lines that it printed
    since its last start, if the page started it.
    """

    folder: Path
    state: str
    asked: Mapping[str, Any]
    begun: Sequence[str]
    done: Mapping[str, Mapping[str, Any]]
    said: str

    @property
    def dice(self) -> dict[str, float]:
        """Mean Dice on unseen cases by name: donor, adapted, from scratch; empty until the report is there."""
        return {str(name): float(value) for name, value in dict(self.done.get("report", {}).get("dice", {})).items()}

    @property
    def number_of_trainings(self) -> int:
        """How many trainings it will have, 0 if that is not known yet: one per fold, those from scratch, all cases."""
        folds = self.done.get("folds", {}).get("folds", ())
        return len(folds) * (2 if self.asked.get("baseline") else 1) + 1 if "folds" in self.done else 0

    @property
    def title(self) -> str:
        """Which donor is adapted to which data."""
        return f"{title_of(str(self.asked.get('model')))} on {Path(str(self.asked.get('source'))).name}"

    @property
    def minutes(self) -> float:
        """How long its finished steps took together."""
        return sum(float(entry.get("seconds", 0)) for entry in self.done.values()) / 60

    @property
    def problem(self) -> str:
        """Why it stopped, as far as it said so."""
        lines = [line for line in self.said.splitlines() if line.strip()]
        at = max((i for i, line in enumerate(lines) if line.startswith("Error: ")), default=None)
        return "\n".join(lines[at:]) if self.state == "stopped" and at is not None else ""

    def trainings(self) -> list[Training]:
        """Return its trainings, as far as they are."""
        epochs = self.asked.get("overrides", {}).get("epochs") or self.done.get("cost", {}).get("epochs", 0)
        return read_trainings(self.results / self.dataset, self.begun, finished=self.done, epochs=int(epochs))

    @property
    def dataset(self) -> str:
        """The name of the data set that is trained on, "" if it is not known yet."""
        return self.datasets[-1] if self.datasets else ""

    @property
    def datasets(self) -> list[str]:
        """The data set that was given, and the one that the donor completed, if it did."""
        return [str(self.done[step]["dataset"]) for step in ("data", "transfer")
                if "dataset" in self.done.get(step, {})]

    @property
    def results(self) -> Path:
        """The folder nnUNet_results of this run: its own, or that of the environment."""
        return self._nnunet_folder("nnUNet_results")

    @property
    def final(self) -> Path:
        """The fold folder of the adapted network of a finished run."""
        return Path(self.folder, self.done["files"]["folder"], f"fold_{self.done['files']['fold']}").resolve()

    @property
    def raw(self) -> Path:
        """The data set in nnU-Net's format."""
        return self._nnunet_folder("nnUNet_raw") / self.dataset

    def _nnunet_folder(self, name: str) -> Path:
        own = self.folder / name
        return own if own.is_dir() else Path(os.environ.get(name, own))


def read_run(folder: Path) -> Run:
    """Return what a folder tells.

    Raises:
        ConfigurationError: it holds no adaptation, or a damaged one.
    """
    try:
        record = read_json(folder / RECORD)
        asked, begun, done = record["asked"], list(map(str, record.get("begun", ()))), record["done"]
        if not all(isinstance(entry, dict) for entry in (asked, done, *done.values())):
            raise ValueError("it is no record of an adaptation")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{folder / RECORD} cannot be read ({error}). Choose the folder of an adaptation, or "
                                 "delete it and start again.") from None
    state = "running" if _is_running(folder) else "finished" if "files" in done else "stopped"
    return Run(folder=folder, state=state, asked=asked, begun=begun, done=done, said=tail(folder / LOG))


def title_of(model: str) -> str:
    """Return what people call a donor: with the data set that it was trained on, where its path tells it."""
    path = Path(model)
    return f"{path.parent.name}, {path.name}" if path.parent.name.startswith("Dataset") else path.name


def tail(file: Path) -> str:
    """Return the end of a text file; "" if there is none. Of a bar of progress, its last state."""
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, file.stat().st_size - _TAIL))
            lines = stream.read().decode(errors="replace").replace("\r\n", "\n").split("\n")
            return "\n".join(line.rstrip("\r").rpartition("\r")[2] for line in lines)
    except OSError:
        return ""


def start(out: Path, asked: Mapping[str, Any]) -> None:
    """Start an adaptation in a process of its own, which goes on when the page ends.

    Args:
        out: its folder, new or empty.
        asked: the arguments of `nnunet_dante.adapt` but for `out`.

    Raises:
        ConfigurationError: the folder holds something.
        StorageError: the folder cannot be written.
    """
    try:
        if out.exists() and any(out.iterdir()):
            raise ConfigurationError(f"{out} holds something already. Choose another folder for this run.")
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(out / RECORD, error) from error
    write_text_atomically(json.dumps({"format": 1, "asked": dict(asked), "done": {}}, indent=1) + "\n", out / RECORD)
    _launch(out)


def go_on(run: Run) -> None:
    """Let a stopped run go on where it was.

    Raises:
        ConfigurationError: it is running.
    """
    if _is_running(run.folder):
        raise ConfigurationError(f"The run in {run.folder} is running already.")
    _launch(run.folder)


def _launch(out: Path) -> None:
    try:
        with (out / LOG).open("w") as log:
            _started[out] = subprocess.Popen(
                [sys.executable, "-m", "nnunet_dante.ui.work", "adapt", str(out)], stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True, cwd=out)
    except OSError as error:
        raise cannot_write(out / LOG, error) from error


def _starting(folder: Path) -> subprocess.Popen | None:
    """Return the process that this server started for a run, if it has not ended."""
    process = _started.get(folder)
    return process if process is not None and process.poll() is None else None


def _is_running(folder: Path) -> bool:
    return process_in(folder) is not None or _starting(folder) is not None


def stop(folder: Path) -> None:
    """End the process that works in the folder of a run, also one that has only just been started.

    Raises:
        ConfigurationError: the process belongs to another user, or does not end.
    """
    if process_in(folder) is None and (process := _starting(folder)) is not None:
        process.terminate()  # it has done nothing yet
        process.wait()
    running.stop(folder)


def delete(run: Run) -> list[str]:
    """Delete what a run wrote, and return the names of what else is in its folder, which stays.

    Raises:
        ConfigurationError: it is running.
    """
    if _is_running(run.folder):
        raise ConfigurationError(f"The run in {run.folder} is running. Stop it first.")
    names = [str(name) for name in run.done.get("files", {}).values() if name]
    written = {*_WRITTEN, *names, *(f"{name.removesuffix('.model')}.json" for name in names if name.endswith(".model"))}
    for name in NNUNET_FOLDERS:  # an adaptation makes them for one data set; a folder that holds more is not its own
        if {entry.name for entry in _entries(run.folder / name)} <= {*run.datasets}:
            written.add(name)
    for entry in _entries(run.folder):
        if entry.name in written and entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        elif entry.name in written:
            with suppress(OSError):
                entry.unlink()
    with suppress(OSError):
        run.folder.rmdir()
    return [entry.name for entry in _entries(run.folder)]


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


__all__ = ["LOG", "RECORD", "Run", "delete", "go_on", "read_run", "start", "stop", "tail", "title_of"]
