"""What a federation is worth: local training, federated adapters and weights, Dafne's merges, and pooled training.

    python benchmarks/federation.py ROOT --donor DONOR --dataset DATASET --rounds 10 --epochs 5

ROOT holds nnU-Net's three folders with DATASET in nnUNet_raw, such as the hippocampi of benchmarks/hippocampus that the
donor has not seen. Its cases are divided among three sites that differ in acquisition: "plain" as they are, "scanner"
with a bias field and noise, and "half", which draws the first label only (its other labels are completed by the donor).
Cases with consecutive ids may be of one person, and stay together. Every site trains the same number of steps in every
arm; pooled training has the cases and the steps of all three. The Dice is that of nnU-Net's prediction on each site's
test cases, which no arm trains on.

ROOT/federation/federation.json holds all numbers; arms that are in it are not run again. After each arm, the tables of
all arms so far are written to RESULTS/report.md, with their numbers in RESULTS/federation.json.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import nibabel
import numpy as np
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE / "hippocampus"), str(HERE.parent / "tests")]
import tiny  # noqa: E402
from prepare import runs_of_ids, take  # noqa: E402

SITES = ("plain", "scanner", "half")
NUMBERS = {"plain": 861, "scanner": 863, "half": 865, "pooled": 867}
ADAPTERS, FROZEN, WEIGHTS, POOLED = "federated adapters", "federated adapters, frozen A", "federated weights", "pooled"
ARMS: dict[str, dict[str, Any]] = {
    **{f"local {site}": {"method": "LoRA", "sites": (site,)} for site in SITES},
    ADAPTERS: {"method": "LoRA", "sites": SITES},
    FROZEN: {"method": "LoRA", "sites": SITES, "averaging": "frozen"},
    WEIGHTS: {"method": "FineTune", "sites": SITES},
    "Dafne's halves": {"method": "FineTune", "sites": SITES, "halves": True},
    POOLED: {"method": "LoRA", "sites": (POOLED,)}}
DEFAULT = {"features": (32, 64, 128, 256, 320, 320), "blocks": 2}  # of nnU-Net's 3d_fullres with six stages
Scores = dict[str, dict[str, list[float]]]  # site -> label -> Dice of each test case


def acquired(image: np.ndarray, site: str, rng: np.random.Generator) -> np.ndarray:
    """Return an image as the site's scanner would see it."""
    if site != "scanner":
        return image
    ramp = sum(np.linspace(-1, 1, n).reshape([-1 if a == axis else 1 for a in range(3)]) * rng.uniform(-0.4, 0.4)
               for axis, n in enumerate(image.shape))
    return image * np.exp(ramp) + rng.normal(0, 0.1 * image.std(), image.shape)


def divided(cases: list[str], train: int, test: int) -> Iterator[tuple[str, bool, str]]:
    """Yield (site, whether it is a test case, case): whole groups of consecutive ids, so many cases for each site."""
    needed = len(SITES) * (train + test)
    if len(cases) < needed:
        raise SystemExit(f"The data set has {len(cases)} cases, {needed} are needed; lower --train or --test.")
    groups = runs_of_ids(cases)
    for site in SITES:
        for is_test, count in ((False, train), (True, test)):
            taken, groups = take(groups, count)
            yield from ((site, is_test, case) for case in taken)


def write_sites(root: Path, dataset: str, train: int, test: int) -> dict[str, str]:
    """Divide the data set; return site -> name, and "pooled" with all training cases. Test cases are in imagesTs."""
    raw = root / "nnUNet_raw"
    source, rng = raw / dataset, np.random.default_rng(0)
    content = json.loads((source / "dataset.json").read_text())
    cases = sorted(file.name.removesuffix(".nii.gz") for file in (source / "labelsTr").glob("*.nii.gz"))
    names = {site: f"Dataset{number}_Federation{site.capitalize()}" for site, number in NUMBERS.items()}
    for name in names.values():
        shutil.rmtree(raw / name, ignore_errors=True)
        for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
            (raw / name / part).mkdir(parents=True)
    for site, is_test, case in divided(cases, train, test):
        image, mask = (nibabel.load(source / file) for file in (f"imagesTr/{case}_0000.nii.gz",
                                                                f"labelsTr/{case}.nii.gz"))
        seen = acquired(np.asarray(image.dataobj, np.float32), site, rng).astype(np.float32)
        drawn = np.asarray(mask.dataobj).astype(np.uint8)
        for name in {names[site]} if is_test else {names[site], names[POOLED]}:
            part = "Ts" if is_test else "Tr"
            kept = drawn * (drawn <= 1) if site == "half" and name == names[site] and not is_test else drawn
            nibabel.save(nibabel.Nifti1Image(seen, image.affine), raw / name / f"images{part}" / f"{case}_0000.nii.gz")
            nibabel.save(nibabel.Nifti1Image(kept, mask.affine), raw / name / f"labels{part}" / f"{case}.nii.gz")
    for site, name in names.items():
        labels = {key: value for key, value in content["labels"].items() if site != "half" or value <= 1}
        (raw / name / "dataset.json").write_text(json.dumps(
            content | {"labels": labels, "numTraining": len(list((raw / name / "labelsTr").iterdir()))}))
    return names


def predicted_dice(model: Path, root: Path, names: Mapping[str, str]) -> Scores:
    """Return the Dice of a model folder on the test cases of each site."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    predictor = nnUNetPredictor(use_mirroring=False, perform_everything_on_device=False, device=torch.device("cpu"),
                                allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), ("all",), "checkpoint_final.pth")
    labels = {k: v for k, v in json.loads((model / "dataset.json").read_text())["labels"].items() if v}
    reader, dice = predictor.plans_manager.image_reader_writer_class(), {}
    for site in SITES:
        scores: dict[str, list[float]] = {label: [] for label in labels}
        for file in sorted((root / "nnUNet_raw" / names[site] / "labelsTs").iterdir()):
            image, properties = reader.read_images(
                [str(file.parents[1] / "imagesTs" / file.name.replace(".nii.gz", "_0000.nii.gz"))])
            mask = predictor.predict_single_npy_array(image, properties)
            truth = reader.read_seg(str(file))[0][0]
            for label, value in labels.items():
                one, other = mask == value, truth == value
                scores[label].append(float(2 * (one & other).sum() / max(1, one.sum() + other.sum())))
        dice[site] = scores
    return dice


def federate(folder: Path, names: Mapping[str, str], sites: tuple[str, ...], *, halves: bool = False) -> Path:
    """Run all rounds in this process; return the model folder. halves: merge as Dafne, one upload at a time."""
    from nnunet_dante.federation.aggregate import Update
    from nnunet_dante.federation.coordinator import Coordinator
    from nnunet_dante.federation.join import join_federation
    from nnunet_dante.federation.site import train_round

    preprocessed = Path(os.environ["nnUNet_preprocessed"])  # noqa: SIM112
    joined = {site: join_federation(folder, names[site], site=site, device="cpu", num_processes=1) for site in sites}
    coordinator = Coordinator(folder, min_sites=1, max_length=0)
    every = frozenset(coordinator.settings.foreground)
    while coordinator.round < coordinator.settings.rounds:
        sent = coordinator.to_send(coordinator.round - 1 if coordinator.round else None)
        trained = {site: train_round(preprocessed / made.dataset, coordinator.round, sent, coordinator.state_sha256)
                   for site, made in joined.items()}
        merged = coordinator.expected
        for site in joined if halves else ():
            merged = {name: (merged[name] + tensor) / 2 for name, tensor in trained[site].tensors.items()}
        for site, made in joined.items():
            reason = coordinator.receive(
                Update(site=site, cases=made.facts.cases, tensors=merged if halves else trained[site].tensors,
                       draws=every if halves or len(joined) == 1 else frozenset(made.facts.draws)),
                dice_before=trained[site].dice_before, dice_after=trained[site].dice_after,
                bytes_down=sum(tensor.nbytes for tensor in sent.values()))
            assert reason is None, reason
        coordinator.close_round()
    return coordinator.write_result({})


def default_mib(method: str, averaging: str) -> float:
    """Return the MiB that a site sends per round with nnU-Net's default network, as the mean of two rounds."""
    from nnunet_dante.federation.aggregate import trained_in
    from nnunet_dante.federation.state import trained_tensors
    from nnunet_dante.methods import FineTune, LoRA

    network, adapting = tiny.plain_unet(**DEFAULT), {"LoRA": LoRA, "FineTune": FineTune}[method]()
    adapting.adapt(network)
    tensors = trained_tensors(network, adapting.plan(network))
    sent = [sum(tensors[name].nbytes for name in trained_in(tensors, averaging, round_)) for round_ in (0, 1)]
    return mean(sent) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--donor", type=Path, required=True)
    parser.add_argument("--dataset", required=True)
    for name, default in (("rounds", 10), ("epochs", 5), ("iterations", 6), ("train", 8), ("test", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--lr", type=float, default=1e-3, help="Learning rate of all arms.")
    parser.add_argument("--results", type=Path, default=HERE / "results" / "federation", help="Where the tables go.")
    asked = parser.parse_args()
    root = asked.root.resolve()
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[name] = str(root / name)
    os.environ |= {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "nnUNet_compile": "f"}
    out = root / "federation"
    out.mkdir(exist_ok=True)
    names, file = write_sites(root, asked.dataset, asked.train, asked.test), out / "federation.json"
    told: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"arms": {}}
    shown_settings = ("dataset", "rounds", "epochs", "iterations", "lr", "train", "test")
    told["settings"] = {key: getattr(asked, key) for key in shown_settings}
    for arm, options in ARMS.items():
        if arm not in told["arms"]:
            told["arms"][arm] = run(arm, asked, root, names, **options)
            told["donor"] = told.get("donor") or predicted_dice(out / folder_of(arm) / "model", root, names)
            file.write_text(json.dumps(told, indent=1))
            print(arm, f"{told['arms'][arm]['seconds']:.0f} s", shown(told["arms"][arm]["dice"], SITES), flush=True)
        asked.results.mkdir(parents=True, exist_ok=True)
        (asked.results / "federation.json").write_text(json.dumps(told, indent=1))
        (asked.results / "report.md").write_text(report(told))


def folder_of(arm: str) -> str:
    """Return the name of an arm's folder, which is also the name of its Flower app."""
    return "".join(c if c.isalnum() else "-" for c in arm)


def run(arm: str, asked: argparse.Namespace, root: Path, names: Mapping[str, str], *, method: str,
        sites: tuple[str, ...], averaging: str = "alternating", halves: bool = False) -> dict[str, Any]:
    """Run one arm; return its scores, seconds, bytes and rounds."""
    from nnunet_dante.federation.create import new_federation

    began, folder = time.time(), root / "federation" / folder_of(arm)
    shutil.rmtree(folder, ignore_errors=True)
    steps = asked.iterations * (len(SITES) if sites == (POOLED,) else 1)
    new_federation(folder, asked.donor, method=method, averaging=averaging, rounds=asked.rounds, epochs=asked.epochs,
                   overrides={"iterations": steps, "val_iterations": 2, "lr": asked.lr})
    model = federate(folder, names, sites, halves=halves)
    rounds = json.loads((folder / "run" / "history.json").read_text())["rounds"]
    return {"dice": predicted_dice(model, root, names), "seconds": time.time() - began, "rounds": rounds,
            "default_mib": default_mib(method, averaging)}


def shown(dice: Scores, sites: tuple[str, ...]) -> list[str]:
    """Return the mean Dice by site and label, and the mean of all."""
    means = [mean(values) for site in sites for values in dice[site].values()]
    return [f"{value:.3f}" for value in [*means, mean(means)]]


def paired(one: Scores, other: Scores) -> str:
    """Return the mean difference of the test cases' Dice, with its standard error."""
    differences = [mean(pair) for site in SITES for pair in zip(*(
        [a - b for a, b in zip(values, other[site][label])] for label, values in one[site].items()))]
    error = stdev(differences) / len(differences) ** 0.5
    return f"{mean(differences):+.4f} (standard error {error:.4f}, {len(differences)} test cases)"


def report(told: Mapping[str, Any]) -> str:
    """Return the tables of the arms that have been run as Markdown."""
    arms, labels = told["arms"], list(told["donor"][SITES[0]])
    together = [arm for arm in arms if not arm.startswith("local ")]
    dice = {"donor, not trained": told["donor"]}
    if all(f"local {site}" in arms for site in SITES):
        dice["local only"] = {site: arms[f"local {site}"]["dice"][site] for site in SITES}
    dice |= {arm: arms[arm]["dice"] for arm in together}
    history = [[arm, *(f"{mean(v for site in entry['sites'].values() for v in site['dice_before'].values()):.3f}"
                       for entry in arms[arm]["rounds"])] for arm in together]
    compared = [f"- {ADAPTERS} minus {name}: {paired(dice[ADAPTERS], other)}"
                for name, other in dice.items() if ADAPTERS in dice and name != ADAPTERS]
    return "\n".join([
        "# Three sites: local, federated, Dafne's merges, pooled", "",
        "Settings: " + ", ".join(f"{key} {value}" for key, value in told["settings"].items()) + ".", "",
        "Dice of nnU-Net's prediction, mean of the test cases of each site:", "",
        *table(["training", *(f"{site}, {label}" for site in SITES for label in labels), "mean"],
               [[name, *shown(scores, SITES)] for name, scores in dice.items()]), "",
        "Difference by test case:", "", *compared, "",
        "Pseudo Dice of validation patches before each round, mean of sites and labels:", "",
        *table(["training", *(str(i + 1) for i in range(told["settings"]["rounds"]))], history), "",
        "MiB that a site sends per round: measured with this network, and computed for nnU-Net's default network of "
        "six stages:", "", *table(["training", "here", "share", "default network", "share"], traffic(arms)), ""])


def traffic(arms: Mapping[str, Any]) -> list[list[str]]:
    """Return the rows on what a site sends, with the share of what it sends of all weights."""
    sent = {arm: (mean(site["bytes_up"] for entry in arms[arm]["rounds"] for site in entry["sites"].values()) / 2**20,
                  arms[arm]["default_mib"]) for arm in (ADAPTERS, FROZEN, WEIGHTS) if arm in arms}
    return [[arm, *(cell for mib, whole in zip(sent[arm], sent[WEIGHTS]) for cell in
                    (f"{mib:.3f}", f"1 / {whole / mib:.1f}"))] for arm in sent if WEIGHTS in sent]


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Return the lines of a Markdown table."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows)]


if __name__ == "__main__":
    main()
