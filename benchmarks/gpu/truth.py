"""Dice of a network of nnU-Net's own size on the hippocampus protocol, beside the small one's of few-shot.md.

    python benchmarks/gpu/truth.py WORK --step source|merged|methods|table --data TASK04 --device cuda [--tiny]

`source` and `merged` pretrain the two donors with stock nnU-Net, 50 epochs each with the network that it plans.
`methods` fine-tunes them on the protocol's three shifts with 1, 4 and all cases. `table` writes the results so far into
WORK/truth.json and prints them. Stopped at any moment, the same call goes on. --tiny: synthetic images, the small
network, one epoch for a donor, one shift, one step for a method.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
from pathlib import Path

import nibabel
import numpy as np

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent / "hippocampus"))

import prepare  # noqa: E402

from nnunet_dante.adaptation.steps import Steps  # noqa: E402
from nnunet_dante.compare.results import read_results, write_results  # noqa: E402

PROTOCOL = """
name = "truth"
shots = {shots}
seeds = [0]
methods = [
    {{name = "scratch", trainer = "nnUNetTrainerFromScratch"}},
    {{name = "full", trainer = "nnUNetTrainerFineTune"}},
    {{name = "decoder", trainer = "nnUNetTrainerDecoderOnly"}},
    {{name = "LoRA", trainer = "nnUNetTrainerLoRA"}},
    {{name = "GU", trainer = "nnUNetTrainerGradualUnfreezing"}},
]

[training]
epochs = {epochs}
iterations = {iterations}
val_iterations = 2
"""
SHIFTS = {"source": (("acquisition shift", 843, False), ("virtual scanner", 844, True)),
          "merged": (("task shift", 843, False),)}
NUMBERS = {"source": 841, "merged": 842}


def synthetic(folder: Path, cases: int = 96) -> Path:
    """Write a stand-in for Task04: two boxes in noise. Every third case is uint8, and so of the target acquisition."""
    draw = np.random.default_rng(0)
    for kind in ("imagesTr", "labelsTr"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    for number in range(cases):
        truth = np.zeros((36, 48, 36), np.uint8)
        truth[8:26, 8:24, 8:26], truth[8:26, 24:40, 8:26] = 1, 2
        image = 60 * truth + draw.normal(80, 10, truth.shape)
        kind = np.uint8 if number % 3 == 0 else np.float32
        name = f"hippocampus_{2 * number:03d}.nii.gz"  # no two neighbours: each is a group of its own
        nibabel.save(nibabel.Nifti1Image(image.clip(0, 255).astype(kind), np.eye(4)), folder / "imagesTr" / name)
        nibabel.save(nibabel.Nifti1Image(truth, np.eye(4)), folder / "labelsTr" / name)
    return folder


def protocol(work: Path, tiny: bool) -> Path:
    """Write the protocol for the donors that are there."""
    numbers = {"shots": [1], "epochs": 1, "iterations": 1} if tiny else {
        "shots": '[1, 4, "all"]', "epochs": 10, "iterations": 25}
    text = PROTOCOL.format(**numbers)
    for donor in SHIFTS:
        for name, dataset, simulated in SHIFTS[donor][:1] if tiny else SHIFTS[donor]:
            if (work / "donors" / donor).is_dir():
                text += (f'\n[[experiments]]\nname = "{name}"\ndataset = {dataset}\ndonor = "donors/{donor}"\n'
                         f"simulated = {str(simulated).lower()}\n")
    file = work / "truth.toml"
    file.write_text(text)
    return file


def run(work: Path, step: str, data: Path, device: str, tiny: bool) -> None:
    """Do one step. What earlier steps wrote into `work` is not written again."""
    steps = Steps(work, total=3)
    if not (work / "test_844.json").exists():  # the last file that is written
        prepare.write_data(steps, data, (841, 842, 843, 844), reader="NibabelIO")
    if step == "methods":
        jobs = "1" if tiny else "4"
        folders = {name: str(work / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
        # Without torch.compile: it takes a minute per network, and a training here half of that.
        subprocess.run([sys.executable, "-m", "nnunet_dante.cli", "benchmark", protocol(work, tiny), "-o",
                        work / "truth", "--jobs", jobs], check=True,
                       env=os.environ | folders | {"nnUNet_compile": "f", "nnUNet_def_n_proc": "1"})
        return
    own = {"plans": prepare.PLANS, "trainer": "nnUNetTrainer_1epoch", "epochs": 1} if tiny else {
        "plans": "nnUNetPlans", "trainer": "nnUNetTrainer_50epochs", "epochs": 50, "processes": 8}
    steps.announce(f"Pretrain the donor {step}")
    prepare.train_donor(steps, NUMBERS[step], prepare.divided(data)[1], device=device, **own)


def table(work: Path) -> str:
    """Return mean Dice on the test cases by experiment, method and number of cases."""
    results = [r for r in read_results(work / "truth") if not r.error]
    shots = sorted({r.shots for r in results if r.shots})
    lines = ["| experiment | method | " + " | ".join(f"K={k}" for k in shots) + " |", "|---|---|" + "---|" * len(shots)]
    for experiment, method in sorted({(r.experiment, r.method) for r in results}):
        cells = []
        for k in shots:
            dice = [s["dice"] for r in results if (r.experiment, r.method) == (experiment, method)
                    and (r.shots == k or not r.shots) for case in r.cases.values() for s in case.values()]
            cells.append(f"{statistics.mean(dice):.3f}" if dice else "")
        lines.append(f"| {experiment} | {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("--data", type=Path, help="Task04_Hippocampus of the Medical Segmentation Decathlon")
    parser.add_argument("--step", choices=("source", "merged", "methods", "table"), required=True)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    work = given.work.resolve()
    if given.step == "table":
        write_results(read_results(work / "truth"), work / "truth.json")
        print(table(work))
        return
    data = given.data
    if given.tiny and not (data := work / "synthetic").exists():
        synthetic(data)
    run(work, given.step, data, given.device, given.tiny)


if __name__ == "__main__":
    main()
