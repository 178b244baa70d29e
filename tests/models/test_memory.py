"""memory.py: nnU-Net's estimate is nnU-Net's, and what a part of a process took is measured."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from dynamic_network_architectures.architectures.unet import PlainConvUNet
from nnunetv2.experiment_planning.experiment_planners.default_experiment_planner import ExperimentPlanner
from nnunetv2.experiment_planning.experiment_planners.residual_unets.residual_encoder_unet_planners import (
    nnUNetPlannerResEncM,
)

from nnunet_dante.errors import ConfigurationError
from nnunet_dante.models import memory
from nnunet_dante.models.memory import SHARES, PeakMemory, conv_voxels, gib, memory_advice, planned_gib
from nnunet_dante.models.overrides import parse_overrides
from nnunet_dante.training import trainers


@pytest.mark.parametrize(("build", "planner"), [(tiny.plain_unet, ExperimentPlanner), (tiny.residual_unet, nnUNetPlannerResEncM)])
@pytest.mark.parametrize("dim", [2, 3])
def test_the_estimate_is_the_one_by_which_nnunet_chooses_the_batch_size(nnunet_paths, build, planner, dim):
    """nnU-Net's planner: batch_size = reference / voxels * reference_batch, for a GPU of 8 GiB."""
    dataset = tiny.write_raw_dataset(nnunet_paths["nnUNet_raw"])
    (nnunet_paths["nnUNet_preprocessed"] / dataset).mkdir()
    tiny.write_fingerprint(nnunet_paths["nnUNet_preprocessed"] / dataset, n_cases=5)
    made, network, patch = planner(dataset), build(dim), [16] * dim
    reference = getattr(made, f"UNet_reference_val_{dim}d")
    batch = reference / conv_voxels(network, patch) * getattr(made, f"UNet_reference_val_corresp_bs_{dim}d")
    assert made.UNet_reference_val_corresp_GB == 8
    assert planned_gib(network, patch, batch) == pytest.approx(8)
    assert planned_gib(network, patch, batch / 4) == pytest.approx(2)
    assert network.decoder.deep_supervision, "asking changes nothing"


def test_the_full_network_at_nnunets_default_patch_fits_the_gpu_that_it_is_made_for():
    with torch.device("meta"):
        network = PlainConvUNet(1, 6, (32, 64, 128, 256, 320, 320), torch.nn.Conv3d, 3, [1, 2, 2, 2, 2, 2], 2, 3, 2,
                                norm_op=torch.nn.InstanceNorm3d, nonlin=torch.nn.LeakyReLU)
    assert 6 < planned_gib(network, [128, 128, 128], 2) < 8


def test_a_network_of_which_nnunet_has_no_estimate_has_none():
    assert planned_gib(tiny.primus(), [16, 16, 16], 2) is None


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a part of a process")
def test_the_peak_counts_what_was_taken_since_the_start_also_after_it_is_free_again():
    first = PeakMemory(torch.device("cpu"))
    held = np.ones(64 << 20, np.uint8)
    del held
    assert first.peak_mib() > 60
    assert PeakMemory(torch.device("cpu")).peak_mib() < 60, "what an earlier part took does not count"


def test_where_the_system_forbids_it_the_peak_is_unknown_and_nothing_fails(monkeypatch, tmp_path):
    monkeypatch.setattr(memory, "_RESET", tmp_path)  # a folder, which nobody can write
    assert PeakMemory(torch.device("cpu")).peak_mib() is None


def test_on_a_gpu_too_what_an_earlier_run_left_does_not_count(monkeypatch):
    """As large as the earlier run was, the next one would seem to need."""
    gpu = SimpleNamespace(now=500 << 20, peak=900 << 20)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: vars(gpu).update(peak=gpu.now))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: gpu.now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: gpu.peak)
    taken = PeakMemory(torch.device("cuda"))
    gpu.peak = 530 << 20
    assert taken.peak_mib() == 30


@pytest.mark.parametrize(("text", "size"), [("6GiB", 6), ("6 gb", 6), ("6", 6), ("5.5G", 5.5), ("6144MiB", 6), ("512 M", 0.5)])
def test_the_memory_of_a_gpu_is_read_as_people_write_it(text, size):
    assert gib(text) == size


@pytest.mark.parametrize("text", ["", "0", "much", "-6GiB", "6TB", "nan", "6 GiB free"])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ConfigurationError, match="--memory is .* such as 6GiB"):
        gib(text)


def test_a_training_that_fits_needs_no_advice():
    assert "fits 8 GiB" in memory_advice(7.9, 8, 2)
    assert "no estimate" in memory_advice(None, 8, 2)


@pytest.mark.parametrize(("limit", "batch", "lines"), [
    (7, 2, ["--set recompute=true: about 6.5 GiB", "-tr nnUNetTrainerLoRADecoder: about 5.6 GiB",
            "-tr nnUNetTrainerLoRADecoder --set recompute=true: about 5.2 GiB"]),
    (5.3, 2, ["-tr nnUNetTrainerLoRADecoder --set recompute=true: about 5.2 GiB"]),
    (4, 2, ["--batch-size 1: about 4.0 GiB", "--batch-size 1 --set recompute=true: about 3.2 GiB",
            "--batch-size 1 -tr nnUNetTrainerLoRADecoder: about 2.8 GiB",
            "--batch-size 1 -tr nnUNetTrainerLoRADecoder --set recompute=true: about 2.6 GiB"])])
def test_the_advice_is_what_fits_with_the_largest_batch(limit, batch, lines):
    said = memory_advice(8.0, limit, batch).splitlines()
    assert f"about 8.0 GiB by nnU-Net's estimate, more than {limit:g} GiB" in said[0]
    assert [line.strip() for line in said[1:]] == lines


def test_where_nothing_fits_the_advice_says_so():
    assert "Even one patch a step with the frugal options takes 2.6 GiB" in memory_advice(8.0, 2, 2)


def test_the_options_of_the_advice_exist():
    for options in SHARES:
        for option in options:
            flag, value = option.split()
            assert hasattr(trainers, value) if flag == "-tr" else parse_overrides([value])
