"""Federations of tiny networks: donor, sites with data sets of their own, all in nnU-Net folders of a test."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from running import threads_for_pools

LENGTH = {"iterations": 2, "val_iterations": 1, "rank": 2, "alpha": 4.0}
LABELS = {"background": 0, "organ": 1, "lesion": 2}


@dataclass
class Sites:
    """root: of nnU-Net's three folders. folder: of the federation. datasets: site -> name of its prepared data set."""

    root: Path
    folder: Path
    datasets: dict[str, str] = field(default_factory=dict)

    def preprocessed(self, site: str) -> Path:
        return self.root / "nnUNet_preprocessed" / self.datasets[site]


def activate(root: Path, patch) -> None:
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (root / name).mkdir(parents=True, exist_ok=True)
        patch.setenv(name, str(root / name))


def found(root: Path, *, donor_options=None, **options) -> Sites:
    """Write a donor and a federation of it; `options`: of new_federation."""
    from nnunet_dante.federation.create import new_federation

    donor = tiny.write_model_folder(root / "nnUNet_results", **(donor_options or {}))
    length = {**LENGTH, **options.pop("overrides", {})}
    new_federation(root / "federation", donor, **({"rounds": 2, "epochs": 1, "overrides": length} | options))
    return Sites(root, root / "federation")


def join(sites: Sites, site: str, number: int, *, fold=None, **options) -> None:
    """Write a raw data set and join the federation with it; `options`: of tiny.write_raw_dataset."""
    from nnunet_dante.federation.join import join_federation

    name = tiny.write_raw_dataset(sites.root / "nnUNet_raw", dataset_id=number, name=site.capitalize(),
                                  **({"labels": LABELS, "seed": number} | options))
    tiny.write_fingerprint(sites.root / "nnUNet_preprocessed" / name, n_cases=options.get("n_cases", 5))
    joined = join_federation(sites.folder, name, site=site, device="cpu", num_processes=1, fold=fold)
    sites.datasets[site] = joined.dataset


def made(root: Path, *names: str, same: bool = False, **options) -> Sites:
    """Return a federation with these sites; `same`: all have equal data."""
    with pytest.MonkeyPatch.context() as patch:
        threads_for_pools(patch)
        activate(root, patch)
        sites = found(root, **options)
        for i, name in enumerate(names):
            join(sites, name, 910 + 2 * i, **({"seed": 1} if same else {}))
    return sites


def seed() -> None:
    for function in (random.seed, np.random.seed, torch.manual_seed):
        function(0)
