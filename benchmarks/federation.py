"""What a federation is worth: local training, federated adapters and weights, Dafne's merges, and pooled training.

    python benchmarks/federation.py ROOT --donor DONOR --dataset DATASET --rounds 10 --epochs 5

ROOT holds nnU-Net's three folders with DATASET in nnUNet_raw, such as the hippocampi of benchmarks/hippocampus. Its
cases are divided among three sites that differ in acquisition: "plain" as they are, "scanner" with a bias field and
noise, and "half", which draws the first label only (its other labels are completed by the donor). Every arm trains the
same number of steps at each site. The Dice is that of nnU-Net's prediction on each site's test cases, which no arm
trains on. federation.json in ROOT/federation holds all numbers; arms that are in it are not run again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import nibabel
import numpy as np
import torch

SITES = ("plain", "scanner", "half")
NUMBERS = {"plain": 861, "scanner": 863, "half": 865, "pooled": 867}


def acquired(image: np.ndarray, site: str, rng: np.random.Generator) -> np.ndarray:
    """Return an image as the site's scanner would see it."""
    if site != "scanner":
        return image
    ramp = sum(np.linspace(-1, 1, n).reshape([-1 if a == axis else 1 for a in range(3)]) * rng.uniform(-0.4, 0.4)
               for axis, n in enumerate(image.shape))
    return image * np.exp(ramp) + rng.normal(0, 0.1 * image.std(), image.shape)


def write_sites(root: Path, dataset: str, train: int, test: int) -> dict[str, str]:
    """Divide the data set; return site -> name, and "pooled" with all training cases. Test cases are in imagesTs."""
    raw = root / "nnUNet_raw"
    source, rng = raw / dataset, np.random.default_rng(0)
    content = json.loads((source / "dataset.json").read_text())
    cases = sorted(file.name.removesuffix(".nii.gz") for file in (source / "labelsTr").glob("*.nii.gz"))
    needed = len(SITES) * (train + test)
    if len(cases) < needed:
        raise SystemExit(f"{dataset} has {len(cases)} cases, {needed} are needed; lower --train or --test.")
    names = {site: f"Dataset{number}_Federation{site.capitalize()}" for site, number in NUMBERS.items()}
    for name in names.values():
        shutil.rmtree(raw / name, ignore_errors=True)
        for part in ("imagesTr", "labelsTr", "imagesTs", "labelsTs"):
            (raw / name / part).mkdir(parents=True)
    for i, case in enumerate(cases[:needed]):
        site, is_test = SITES[i % len(SITES)], i // len(SITES) >= train
        image, mask = (nibabel.load(source / file) for file in (f"imagesTr/{case}_0000.nii.gz",
                                                                f"labelsTr/{case}.nii.gz"))
        seen = acquired(np.asarray(image.dataobj, np.float32), site, rng).astype(np.float32)
        drawn = np.asarray(mask.dataobj).astype(np.uint8)
        for name in {names[site]} if is_test else {names[site], names["pooled"]}:
            part = "Ts" if is_test else "Tr"
            kept = drawn * (drawn <= 1) if site == "half" and name == names[site] and not is_test else drawn
            nibabel.save(nibabel.Nifti1Image(seen, image.affine), raw / name / f"images{part}" / f"{case}_0000.nii.gz")
            nibabel.save(nibabel.Nifti1Image(kept, mask.affine), raw / name / f"labels{part}" / f"{case}.nii.gz")
    for site, name in names.items():
        labels = {key: value for key, value in content["labels"].items() if site != "half" or value <= 1}
        (raw / name / "dataset.json").write_text(json.dumps(
            content | {"labels": labels, "numTraining": len(list((raw / name / "labelsTr").iterdir()))}))
    return names


def predicted_dice(model: Path, root: Path, names: dict[str, str]) -> dict[str, dict[str, float]]:
    """Return site -> label -> mean Dice of a model folder on the site's test cases."""
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
        dice[site] = {label: float(np.mean(values)) for label, values in scores.items()}
    return dice


def federate(folder: Path, names: dict[str, str], sites: tuple[str, ...], *, halves: bool = False) -> Path:
    """Run all rounds in this process; return the model folder. halves: merge as Dafne, one upload at a time."""
    from nnunet_dante.federation.aggregate import Update
    from nnunet_dante.federation.coordinator import Coordinator
    from nnunet_dante.federation.join import join_federation
    from nnunet_dante.federation.site import train_round

    preprocessed = Path(os.environ["nnUNet_preprocessed"])  # noqa: SIM112
    joined = {site: join_federation(folder, names[site], site=site, device="cpu", num_processes=1) for site in sites}
    coordinator = Coordinator(folder, min_sites=1, max_length=0)
    while coordinator.round < coordinator.settings.rounds:
        trained = {}
        for site, made in joined.items():
            trained[site] = train_round(preprocessed / made.dataset, coordinator.round, coordinator.to_send(None),
                                        coordinator.state_sha256)
        merged = coordinator.expected
        for site in joined if halves else ():
            merged = {name: (merged[name] + tensor) / 2 for name, tensor in trained[site].tensors.items()}
        for site, made in joined.items():
            reason = coordinator.receive(
                Update(site=site, cases=made.facts.cases, tensors=merged if halves else trained[site].tensors,
                       draws=frozenset(coordinator.settings.foreground if halves else made.facts.draws)),
                dice_before=trained[site].dice_before, dice_after=trained[site].dice_after)
            assert reason is None, reason
        coordinator.close_round()
    return coordinator.write_result({})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--donor", type=Path, required=True)
    parser.add_argument("--dataset", required=True)
    for name, default in (("rounds", 10), ("epochs", 5), ("iterations", 6), ("train", 8), ("test", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--arms", default="", help="Only these, with commas.")
    asked = parser.parse_args()
    root = asked.root.resolve()
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ[name] = str(root / name)
    os.environ |= {"nnUNet_n_proc_DA": "0", "nnUNet_def_n_proc": "1", "nnUNet_compile": "f"}
    from nnunet_dante.federation.create import new_federation

    out = root / "federation"
    out.mkdir(exist_ok=True)
    names = write_sites(root, asked.dataset, asked.train, asked.test)
    file = out / "federation.json"
    results = json.loads(file.read_text()) if file.is_file() else {}

    def run(arm: str, method: str, sites: tuple[str, ...], **options) -> None:
        if arm in results or (asked.arms and arm not in asked.arms.split(",")):
            return
        began, halves = time.time(), options.pop("halves", False)
        shutil.rmtree(out / arm, ignore_errors=True)
        new_federation(out / arm, asked.donor, method=method, rounds=asked.rounds, epochs=asked.epochs, **options,
                       overrides={"iterations": asked.iterations, "val_iterations": 2, "lr": 0.01})
        model = federate(out / arm, names, sites, halves=halves)
        history = json.loads((out / arm / "run" / "history.json").read_text())["rounds"]
        results[arm] = {"dice": predicted_dice(model, root, names), "seconds": time.time() - began, "rounds": history}
        file.write_text(json.dumps(results, indent=1))
        print(arm, results[arm]["dice"], flush=True)

    arms: list[Callable[[], None]] = [lambda site=site: run(f"local {site}", "LoRA", (site,)) for site in SITES]
    arms += [lambda: run("federated adapters", "LoRA", SITES),
             lambda: run("federated adapters, frozen A", "LoRA", SITES, averaging="frozen"),
             lambda: run("federated weights", "FineTune", SITES),
             lambda: run("Dafne's halves", "FineTune", SITES, halves=True),
             lambda: run("pooled", "LoRA", ("pooled",))]
    for arm in arms:
        arm()


if __name__ == "__main__":
    main()
