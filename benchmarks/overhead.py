"""What starting costs: up to the first training step's end, against stock; file commands against reading and writing.

    OMP_NUM_THREADS=1 python benchmarks/overhead.py [--rounds 3] [--out benchmarks/results]

Training: seconds from the start of the process to the end of the first training step, nnUNetTrainer and ours in turns,
on the same plans and synthetic images. Apart: the scoring of the start weights, a validation of 50 batches, and the
search for the trainer, in which nnU-Net imports all of its own before it looks at others. Commands: wall time on a
default network of 31 million weights, divided by (the import of the command's module in a process of its own + copying
what it reads and writes). Medians over the rounds. Needs the packages of the tests.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from time import perf_counter
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
os.environ |= {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "nnUNet_compile": "f", "MPLBACKEND": "Agg"}

import torch  # noqa: E402
from running import Prepared, prepare  # noqa: E402

from nnunet_dante.training.launch import VARIABLE, search_path  # noqa: E402

STOCK, OURS = "nnUNetv2_train", "nnunet-dante train"
TRAININGS = ((STOCK, "nnUNetTrainer"), (STOCK, "nnUNetTrainerLoRA"), (OURS, "nnUNetTrainerFineTune"),
             (OURS, "nnUNetTrainerLoRA"), (OURS, "nnUNetTrainerGradualUnfreezing"))
MODULES = {"inspect": "command.inspect", "adapter extract": "adapters.adapter", "adapter apply": "adapters.adapter",
           "adapter remove": "adapters.adapter", "export": "dafne.export", "import": "dafne.importer"}
LARGE = {"features": (32, 64, 128, 256, 320, 320), "patch": (64, 64, 64)}

# Runs a training command, whose name is the first argument, and ends after the first training step.
FIRST_STEP = """
from time import perf_counter, time
import json, os, psutil, sys
from nnunetv2.run import run_training
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
took = {"scoring": 0.0, "search": 0.0}
def timed(name, function):
    def run(*arguments, **options):
        start = perf_counter()
        try:
            return function(*arguments, **options)
        finally:
            took[name] += perf_counter() - start
    return run
def step(self, batch, stock=nnUNetTrainer.train_step):
    stock(self, batch)
    print(json.dumps({"first_step": time() - psutil.Process().create_time(), **took}), flush=True)
    os._exit(0)
nnUNetTrainer.validation_step, nnUNetTrainer.train_step = timed("scoring", nnUNetTrainer.validation_step), step
search = run_training.recursive_find_trainer_class_by_name
run_training.recursive_find_trainer_class_by_name = timed("search", search)
if sys.argv.pop(1) == "nnUNetv2_train":
    run_training.run_training_entry()
else:
    from nnunet_dante.training.launch import train
    train(sys.argv[1:])
"""


def seconds(command: Sequence[Any]) -> float:
    start = perf_counter()
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    return perf_counter() - start


def copying(paths: Sequence[Path], to: Path) -> float:
    start = perf_counter()
    for path in paths:
        (shutil.copytree if path.is_dir() else shutil.copy)(path, to / path.name)
    return perf_counter() - start


def prepared(root: Path, **donor: Any) -> Prepared:
    """Transfer a donor with these options of tiny.py to a data set of five synthetic images."""
    root.mkdir()
    return prepare(root, donor_options=donor, n_cases=5, shape=(48, 48, 48),
                   overrides={"epochs": 1, "iterations": 1, "rank": 8, "alpha": 16.0})


def training_rows(root: Path, rounds: int) -> list[dict[str, Any]]:
    dataset = prepared(root, features=(32, 64, 128, 256), patch=(32, 32, 32)).dataset
    plans = root / "nnUNet_preprocessed" / dataset / "nnUNetDantePlans.json"
    content = json.loads(plans.read_text())
    del content["dante"]["overrides"]["val_iterations"]  # nnU-Net's 50
    plans.write_text(json.dumps(content))
    folders = {name: str(root / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    found: dict[tuple[str, str], list[dict[str, float]]] = {training: [] for training in TRAININGS}
    for number in range(rounds):
        for command, trainer in TRAININGS:
            words = [sys.executable, "-c", FIRST_STEP, command, dataset, "3d_fullres", "0", "-tr", trainer, "-p",
                     "nnUNetDantePlans", "-device", "cpu"]
            done = subprocess.run(words, check=True, capture_output=True, text=True,
                                  env=os.environ | folders | {VARIABLE: search_path()})
            found[command, trainer].append(json.loads(done.stdout.strip().splitlines()[-1]))
        print(f"trainings: round {number + 1} of {rounds}", file=sys.stderr, flush=True)

    def row(command: str, trainer: str) -> dict[str, Any]:
        took = found[command, trainer]
        rest = [one["first_step"] - one["scoring"] - one["search"] for one in took]
        parts = {part: [one[part] for one in took] for part in ("first_step", "scoring", "search")} | {"rest": rest}
        return {"command": command, "trainer": trainer,
                **{f"{part}_s": round(statistics.median(seconds), 2) for part, seconds in parts.items()}}

    return [row(*training) for training in TRAININGS]


def command_rows(root: Path, rounds: int) -> list[dict[str, Any]]:
    dataset = prepared(root, **LARGE).dataset
    folders = {name: str(root / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    train = [sys.executable, "-m", "nnunetv2.run.run_training", dataset, "3d_fullres", "0", "-tr", "nnUNetTrainerLoRA",
             "-p", "nnUNetDantePlans", "-device", "cpu"]
    subprocess.run(train, check=True, stdout=subprocess.DEVNULL, env=os.environ | folders | {VARIABLE: search_path()})
    trained = root / "nnUNet_results" / dataset / "nnUNetTrainerLoRA__nnUNetDantePlans__3d_fullres"
    checkpoint = trained / "fold_0" / "checkpoint_final.pth"
    start = root / "start.pth"
    adapter, made = root / "adapter.safetensors", root / "made"
    dante = [sys.executable, "-m", "nnunet_dante.cli"]
    subprocess.run([*dante, "adapter", "remove", str(checkpoint), "-o", str(start)], check=True)
    subprocess.run([*dante, "adapter", "extract", str(checkpoint), "-o", str(adapter)], check=True)
    subprocess.run([*dante, "export", str(trained), "-o", str(root / "o.model"), "--orientation", "RAS"], check=True)
    commands = {"inspect": [checkpoint], "adapter extract": [checkpoint], "adapter apply": [start, adapter],
                "adapter remove": [checkpoint], "export": [trained], "import": [root / "o.model"]}
    found: dict[str, list[tuple[float, float, float]]] = {name: [] for name in commands}
    for number in range(rounds):
        for name, inputs in commands.items():
            shutil.rmtree(made, ignore_errors=True)
            made.mkdir()
            suffix = {"adapter extract": ".safetensors", "export": ".model", "import": ""}.get(name, ".pth")
            options = [] if name == "inspect" else ["-o", made / f"out{suffix}"]
            own = seconds([*dante, *name.split(), *inputs, *options, *(["--orientation", "RAS"] * (name == "export"))])
            imports = seconds([sys.executable, "-c", f"import nnunet_dante.cli, nnunet_dante.{MODULES[name]}"])
            read = [checkpoint] if name == "export" else inputs
            (made / "copy").mkdir()
            found[name].append((own, imports, copying([*read, *made.glob("out*")], made / "copy")))
        print(f"commands: round {number + 1} of {rounds}", file=sys.stderr, flush=True)
    return [{"command": name, "s": round(statistics.median(t[0] for t in times), 2),
             "import_s": round(statistics.median(t[1] for t in times), 2),
             "copy_s": round(statistics.median(t[2] for t in times), 2),
             "ratio": round(statistics.median(own / (imports + copy) for own, imports, copy in times), 2)}
            for name, times in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("results"))
    given = parser.parse_args()
    show = [sys.executable, "-m", "nnunet_dante.cli", "--help"]
    seconds(show)  # disk to memory
    shown = statistics.median(seconds(show) for _ in range(given.rounds))
    with tempfile.TemporaryDirectory() as folder:
        trainings = training_rows(Path(folder, "trainings"), given.rounds)
        commands = command_rows(Path(folder, "commands"), given.rounds)
    for rows in (trainings, commands):
        print("| " + " | ".join(rows[0]) + " |\n|" + "---|" * len(rows[0]))
        print("\n".join("| " + " | ".join(map(str, row.values())) + " |" for row in rows) + "\n")
    print(f"nnunet-dante --help: {shown:.2f} s")
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} thread(s)"
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "overhead.json").write_text(json.dumps(
        {"date": date.today().isoformat(), "machine": machine, "torch": torch.__version__, "rounds": given.rounds,
         "help_s": round(shown, 2), "trainings": trainings, "commands": commands}, indent=1) + "\n")


if __name__ == "__main__":
    main()
