"""Do zero-shot Dice and gradients of a donor say whether images or labels changed? Known changes, on held-out cases.

    python benchmarks/gradient_side.py OUT      # OUT: written by benchmarks/hippocampus/prepare.py

Takes the donor OUT/donors/source and development cases of Dataset845, changes images or labels of their patches, and
measures what `nnunet-dante suggest` measures, on four times three cases. Writes results/gradient_side.json: the borders
in nnunet_dante/advise/rules.py come from it. No case of the benchmark's test sets is used.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage

RESULTS = Path(__file__).with_name("results") / "gradient_side.json"
GROUPS, CASES = 4, 3


def standardised(image: np.ndarray) -> np.ndarray:
    """Return the patch with mean 0 and standard deviation 1, as z-score normalisation would after the change."""
    return (image - image.mean()) / image.std()


def bright(image: np.ndarray) -> np.ndarray:
    return (image - image.min()) / (image.max() - image.min())


def widened(labels: np.ndarray, voxels: int) -> np.ndarray:
    return np.where(labels > 0, labels, ndimage.grey_dilation(labels, size=(2 * voxels + 1,) * 3))


def narrowed(labels: np.ndarray, voxels: int) -> np.ndarray:
    return labels * ndimage.binary_erosion(labels > 0, iterations=voxels)


def changes() -> dict[str, tuple[str, Callable]]:
    """Return name -> what changes (image or labels) and how; lengths in voxels (1 mm), noise in standard deviations."""
    noise = np.random.default_rng(0)
    images: dict[str, Callable] = {"none": lambda x: x, "inverted": lambda x: -x}
    images |= {f"blur {s}": lambda x, s=s: ndimage.gaussian_filter(x, s) for s in (0.7, 1.0, 1.5, 2.0)}
    images |= {f"noise {s}": lambda x, s=s: x + noise.normal(0, s, x.shape) for s in (0.3, 0.6, 1.0, 2.0)}
    images |= {f"gamma {g}": lambda x, g=g: bright(x) ** g for g in (0.5, 3.0)}
    images["bias field"] = lambda x: bright(x) * np.linspace(0.3, 2, len(x))[:, None, None]
    labels: dict[str, Callable] = {"swapped": lambda y: np.array([0, 2, 1])[y]}
    labels |= {f"widened {n}": lambda y, n=n: widened(y, n) for n in (1, 2)}
    labels |= {f"narrowed {n}": lambda y, n=n: narrowed(y, n) for n in (1, 2)}
    return ({name: ("image", lambda x, f=f: standardised(f(x))) for name, f in images.items()}
            | {name: ("labels", f) for name, f in labels.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out.resolve()
    os.environ |= {name: str(out / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    from nnunet_dante import open_donor
    from nnunet_dante.advise.probe import cut_patches, probe
    from nnunet_dante.advise.suggest import gradient_ratio
    from nnunet_dante.datasets.dataset import open_target
    from nnunet_dante.models.network import build_network

    torch.set_num_threads(1)
    donor, target = open_donor(out / "donors" / "source"), open_target(845)
    network, known = build_network(donor.plans, donor.dataset_json, donor.configuration), ["Anterior", "Posterior"]
    network.load_state_dict(donor.weights)
    names = sorted(target.cases)[:GROUPS * CASES]
    patches = cut_patches([target.cases[n] for n in names], donor.plans, donor.configuration, donor.dataset_json, known)
    rows = []
    for name, (part, change) in changes().items():
        changed = [replace(p, **{part: torch.from_numpy(change(getattr(p, part)[0, 0].numpy()))[None, None].to(
            getattr(p, part).dtype)}) for p in patches]
        found = [probe(network, changed[i::GROUPS], donor.dataset_json, known=known) for i in range(GROUPS)]
        rows.append({"change": name, "of": part, "dice": [round(float(np.mean([*f.dice.values()])), 3) for f in found],
                     "dice_inverted": [round(float(np.mean([*f.dice_inverted.values()])), 3) for f in found],
                     "gradient_ratio": [round(gradient_ratio(f.gradients), 2) for f in found]})
        print(rows[-1])
    RESULTS.write_text(json.dumps({"donor": donor.provenance(), "cases": names, "changes": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
