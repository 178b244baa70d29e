"""Building and running trainers as nnU-Net's command does, in this process."""

from __future__ import annotations

import json

import torch


def build(trainer, prepared, *, plans=None, configuration="3d_fullres", fold=0, resume=False, pretrained=None):
    """Return the trainer, with checkpoint or pretrained weights loaded as `nnUNetv2_train` loads them."""
    from nnunetv2.run.run_training import maybe_load_checkpoint
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

    folder = prepared.preprocessed
    plans = plans or json.loads((folder / "nnUNetDantePlans.json").read_text())
    cls = nnUNetTrainer if trainer == "nnUNetTrainer" else trainer
    built = cls(plans=plans | {"continue_training": resume}, configuration=configuration, fold=fold,
                dataset_json=json.loads((folder / "dataset.json").read_text()), device=torch.device("cpu"))
    maybe_load_checkpoint(built, resume, False, str(pretrained) if pretrained else None)
    return built


def train(trainer, prepared, **options):
    """Return the trainer after its whole training."""
    built = build(trainer, prepared, **options)
    built.run_training()
    return built
