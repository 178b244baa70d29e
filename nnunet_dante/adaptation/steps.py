"""Run nnU-Net's commands as a user does, with progress on the screen and their output in log files."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from ..benchmark.processes import cores
from ..errors import DanteError
from ..files import NNUNET_FOLDERS

_ENTRY_POINTS = {
    "nnUNetv2_plan_and_preprocess": "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints:"
                                    "plan_and_preprocess_entry",
    "nnUNetv2_preprocess": "nnunetv2.experiment_planning.plan_and_preprocess_entrypoints:preprocess_entry",
    "nnUNetv2_train": "nnunetv2.run.run_training:run_training_entry",
    "nnUNetv2_predict": "nnunetv2.inference.predict_from_raw_data:predict_entry_point",
    "nnUNetv2_export_model_to_zip": "nnunetv2.model_sharing.entry_points:export_pretrained_model_entry",
    "nnunet-dante": "nnunet_dante.cli:main",
}
_NNUNET = {"nnUNet_compile": "f", "PYTHONWARNINGS": "ignore"}
# Up to so many cores, one process at a time is best. With more, nnU-Net's own numbers of processes hold: a GPU would
# wait for images that a single process augments.
FEW_CORES = 4
# Waiting threads sleep instead of spinning, and freed memory is kept for the next step instead of being returned to the
# system. Together, this reduces the system time of a demo to about a third (not measured one by one).
_LEAN = {"nnUNet_def_n_proc": "1", "OMP_WAIT_POLICY": "PASSIVE",
         "MALLOC_MMAP_THRESHOLD_": "2000000000", "MALLOC_TRIM_THRESHOLD_": "2000000000"}
_EPOCH, _DICE = re.compile(r"Epoch time: "), re.compile(r"Pseudo dice (\[.*\])")


def say(line: str) -> None:
    """Print a line for the user, above a bar of progress if there is one."""
    tqdm.write(line, file=sys.stderr)


class Steps:
    """Run numbered steps in the folder `out`, with the variables of nnU-Net's three folders set.

    own_folders: whether the three folders lie below `out`, even if the user has set others.
    commands: the commands so far, as a user would type them.
    """

    def __init__(self, out: Path, *, total: int, own_folders: bool = True):
        self.out, self.total, self.number, self.begun = out, total, 0, time.monotonic()
        self.commands: list[str] = []
        self.logs = out / "logs"
        folders = {name: str(out / name) for name in NNUNET_FOLDERS}
        if not own_folders and all(map(os.environ.get, NNUNET_FOLDERS)):
            folders = {name: os.environ[name] for name in NNUNET_FOLDERS}
        for folder in (self.logs, *map(Path, folders.values())):
            folder.mkdir(parents=True, exist_ok=True)
        self.few_cores = cores() <= FEW_CORES
        self.environment = os.environ | folders | _NNUNET | (_LEAN if self.few_cores else {})
        self.environment.pop("nnUNet_extTrainer", None)

    def folder(self, name: str, *below: str) -> Path:
        """Return a path below one of nnU-Net's three folders."""
        return Path(self.environment[name], *below)

    @contextmanager
    def nnunet_folders(self) -> Iterator[None]:
        """Set the variables of nnU-Net's three folders in this process, as they are set for the commands."""
        before = {name: os.environ.get(name) for name in NNUNET_FOLDERS}
        os.environ.update({name: self.environment[name] for name in NNUNET_FOLDERS})
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name)
                if value is not None:
                    os.environ[name] = value

    def announce(self, title: str) -> None:
        """Print the title of the next step, with its number and the time so far."""
        self.number += 1
        minutes, seconds = divmod(int(time.monotonic() - self.begun), 60)
        say(f"[{self.number}/{self.total}] {minutes}:{seconds:02d}  {title}")

    def run(self, command: str, *arguments: object, epochs: int = 0) -> str:
        """Run a command of nnU-Net or of this package, and return its output.

        epochs: number of epochs if it is a training, whose progress is then shown.
        """
        module, function = _ENTRY_POINTS[command].split(":")
        code = f"import sys; from {module} import {function}; sys.argv[0] = {command!r}; {function}()"
        self.commands.append(shlex.join([command, *map(str, arguments)]))
        return self.python(code, *arguments, name=command, epochs=epochs)

    def python(self, code: str, *arguments: object, name: str, epochs: int = 0) -> str:
        """Run Python code in a new process, and return its output.

        Raises:
            DanteError: the process failed; the message names the log file and shows its end.
        """
        environment = self.environment
        if self.few_cores:  # a training then augments in its own process; nnU-Net's planner does not accept 0
            environment = environment | {"nnUNet_n_proc_DA": "0" if epochs else "1"}
        log = self.logs / f"{self.number}_{name}_{len(list(self.logs.iterdir()))}.log"
        with log.open("w") as stream, EpochCount(epochs) as count:
            process = subprocess.Popen([sys.executable, "-c", code, *map(str, arguments)], stdout=stream,
                                       stderr=subprocess.STDOUT, env=environment, cwd=self.out)
            try:
                while process.poll() is None:
                    time.sleep(0.2)
                    count.read(log)
            finally:
                process.kill()
        said = log.read_text(errors="replace")
        if process.returncode != 0:
            tail = "\n".join(said.strip().splitlines()[-8:])
            raise DanteError(f"{name} failed with exit code {process.returncode}. Its output is in {log}; the end:\n"
                             f"{tail}")
        return said


class EpochCount:
    """Show the epochs in a growing log of nnU-Net: a bar on a terminal, else a line per epoch; for 0 epochs nothing."""

    def __init__(self, total: int):
        self.total, self.done = total, 0
        on_terminal = total > 0 and sys.stderr.isatty()
        self.bar = tqdm(total=total, disable=not on_terminal, unit="epoch", leave=False)

    def __enter__(self) -> EpochCount:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def read(self, log: Path) -> None:
        """Show how many epochs are done according to `log`, and the last Dice."""
        said = log.read_text(errors="replace") if self.total else ""
        done = len(_EPOCH.findall(said))
        if done == self.done:
            return
        dice = f"Dice {_mean_dice(said):.2f}"
        self.bar.set_postfix_str(dice)
        self.bar.update(done - self.done)
        self.done = done
        if self.bar.disable:
            say(f"      epoch {done}/{self.total}, {dice}")


def _mean_dice(said: str) -> float:
    """Return the mean of the last pseudo Dice values in a log, without those that are nan."""
    found = _DICE.findall(said)
    numbers = [float(n) for n in re.findall(r"(?<![\w.])\d+\.?\d*(?:e-?\d+)?", found[-1])] if found else []
    return sum(numbers) / len(numbers) if numbers else float("nan")
