"""Every trainer of few numbers: exact resume, and an adapter that is applied and removed bit for bit."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from running import build, keep_checkpoint, prepare, train, weights

from nnunet_dante.adapters.adapter import apply, info, remove
from nnunet_dante.adapters.file import read_adapter
from nnunet_dante.methods import LoRA, ParameterEfficient
from nnunet_dante.models.checkpoint import load_checkpoint_safely
from nnunet_dante.training import trainers


class nnUNetTrainerAllOptions(trainers.DanteMixin, trainers.nnUNetTrainer):  # noqa: N801
    """Every option of LoRA at once."""

    method = LoRA(factorisation="flat", rank_stabilised=True, dropout=0.5, lr_ratio=0.25, ranks={"encoder.*": 1},
                  targets=("encoder.*", "decoder.stages.1*"))


class nnUNetTrainerFullDecoder(trainers.DanteMixin, trainers.nnUNetTrainer):  # noqa: N801
    """LoRA on the encoder, the decoder in full."""

    method = LoRA(full_decoder=True)


TRAINERS = [*(cls for cls in trainers.TRAINERS.values() if isinstance(cls.method, ParameterEfficient)),
            nnUNetTrainerAllOptions, nnUNetTrainerFullDecoder]


def same(a: dict, b: dict) -> bool:
    return list(a) == list(b) and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("cls", TRAINERS)
def test_resume_apply_and_remove_are_exact(prepared, monkeypatch, tmp_path, cls):
    monkeypatch.setattr(cls, "on_epoch_end", keep_checkpoint(cls.on_epoch_end))
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(0)
    whole = train(cls, prepared)
    folder = Path(whole.output_folder)
    start = prepared.preprocessed / "nnUNetDantePlans_3d_fullres_start.pth"
    final = weights(folder / "checkpoint_final.pth")
    assert not same(final, weights(start))

    apply(start, folder / "adapter.safetensors", tmp_path / "merged.pth")
    assert same(weights(tmp_path / "merged.pth"), final)
    for source in (folder / "checkpoint_final.pth", tmp_path / "merged.pth"):
        remove(source, tmp_path / "removed.pth")
        assert same(weights(tmp_path / "removed.pth"), weights(start))
    assert type(cls.method).__name__ in info(folder / "adapter.safetensors")
    kept, numbers = read_adapter(folder / "adapter.safetensors")
    assert sum(t.numel() for t in numbers.values()) == whole.audit.trainable
    options = load_checkpoint_safely(folder / "checkpoint_final.pth")["dante"]["options"]
    assert kept["options"] == json.loads(json.dumps(options))

    (folder / "kept.pth").rename(folder / "checkpoint_latest.pth")
    (folder / "checkpoint_final.pth").unlink()
    resumed = build(cls, prepared, resume=True)
    assert resumed.current_epoch == 1
    resumed.run_training()
    assert same(weights(folder / "checkpoint_final.pth"), final)
    assert resumed.logger.get_value("train_losses", None) == whole.logger.get_value("train_losses", None)


@pytest.mark.slow
def test_running_statistics_of_batch_norms_are_part_of_the_adapter(tmp_path, monkeypatch):
    plain = tiny.plans

    def with_batch_norm(*arguments, **options):
        plans = plain(*arguments, **options)
        for dim, name in ((2, "2d"), (3, "3d_fullres"), (3, "3d_lowres")):
            network = plans["configurations"][name]["architecture"]["arch_kwargs"]
            network["norm_op"] = f"torch.nn.modules.batchnorm.BatchNorm{dim}d"
        return plans

    monkeypatch.setattr(tiny, "plans", with_batch_norm)
    ready = prepare(tmp_path).activate(monkeypatch)
    trainer = train(trainers.nnUNetTrainerNormAffine, ready)
    folder, start = Path(trainer.output_folder), ready.preprocessed / "nnUNetDantePlans_3d_fullres_start.pth"
    final = weights(folder / "checkpoint_final.pth")
    moved = [k for k in final if k.endswith("running_mean") and not torch.equal(final[k], weights(start)[k])]
    assert moved
    apply(start, folder / "adapter.safetensors", tmp_path / "merged.pth")
    assert same(weights(tmp_path / "merged.pth"), final)
    remove(tmp_path / "merged.pth", tmp_path / "removed.pth")
    assert same(weights(tmp_path / "removed.pth"), weights(start))
