"""The memory of a training: how much nnU-Net expects it to take, and how much it took."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import ConfigurationError

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Of nnU-Net's planners (ExperimentPlanner and nnUNetPlannerResEncM): a training with this batch size, whose network has
# feature maps of so many voxels in all, fits a GPU with 8 GiB.
_REFERENCE_GIB, _REFERENCE_BATCH = 8, {2: 12, 3: 2}
_REFERENCE_VOXELS = {"PlainConvUNet": {2: 85_000_000, 3: 560_000_000},
                     "ResidualEncoderUNet": {2: 135_000_000, 3: 680_000_000}}

SHARES: dict[tuple[str, ...], float] = {
    (): 1.0, ("--set recompute=true",): 0.81, ("-tr nnUNetTrainerLoRADecoder",): 0.70,
    ("-tr nnUNetTrainerLoRADecoder", "--set recompute=true"): 0.65}
"""Options of `nnunet-dante transfer` -> memory as a share of full fine-tuning's, as measured (docs/cost.md)."""


def conv_voxels(network: Any, patch_size: Sequence[int]) -> int:
    """Return the voxels of all feature maps of a U-Net, as nnU-Net's planner counts them: without deep supervision."""
    before = network.decoder.deep_supervision
    network.decoder.deep_supervision = False
    try:
        return int(network.compute_conv_feature_map_size(list(patch_size)))
    finally:
        network.decoder.deep_supervision = before


def planned_gib(network: nn.Module, patch_size: Sequence[int], batch_size: int) -> float | None:
    """Return the GPU memory of a training in GiB, as nnU-Net's planner estimates it when it chooses patch and batch.

    It grows with the voxels of all feature maps and with the batch size. The estimate is that of nnU-Net's default
    training, which trains every weight in mixed precision; methods that train few weights need less.

    Args:
        network: as `build_network` returns it; it may lie on the meta device.
        patch_size: in voxels, along each axis.
        batch_size: patches per step.

    Returns:
        None for networks of which nnU-Net has no estimate, such as Primus.
    """
    reference = _REFERENCE_VOXELS.get(type(network).__name__, {}).get(len(patch_size))
    if reference is None:
        return None
    share = conv_voxels(network, patch_size) / reference * batch_size / _REFERENCE_BATCH[len(patch_size)]
    return _REFERENCE_GIB * share


def gib(text: str) -> float:
    """Return a size such as "6GiB", "6 GB", "6" (GiB) or "6144MiB" in GiB.

    Raises:
        ConfigurationError: the text is no such size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?(G|M)?(?:i?B)?", text.strip(), re.IGNORECASE)
    if not found or not (size := float(found[1])):
        raise ConfigurationError(f"--memory is {text!r}; give the memory of a GPU, such as 6GiB.")
    return size / 1024 if (found[2] or "").upper() == "M" else size


def memory_advice(planned: float | None, limit: float, batch_size: int) -> str:
    """Return whether a training fits a GPU, and if not, which options of `nnunet-dante transfer` make it smaller.

    The options that change the training least come first; a smaller batch only where they are not enough.

    Args:
        planned: what `planned_gib` returned for this batch size, in GiB.
        limit: memory of the GPU in GiB.
        batch_size: patches per step.
    """
    if planned is None:
        return "nnU-Net has no estimate of the memory that this network takes. Measure a training (`nvidia-smi`)."
    if planned <= limit:
        return (f"A training takes about {planned:.1f} GiB by nnU-Net's estimate, and so fits {limit:g} GiB "
                f"if PyTorch itself finds room beside it.")
    head = f"A training takes about {planned:.1f} GiB by nnU-Net's estimate, more than {limit:g} GiB. "
    for size in range(batch_size, 0, -1):
        fitting = {options: planned * size / batch_size * share for options, share in SHARES.items()
                   if planned * size / batch_size * share <= limit}
        if fitting:
            batch = [f"--batch-size {size}"] if size < batch_size else []
            return head + "It fits with any of these options of `nnunet-dante transfer`:" + "".join(
                f"\n  {' '.join([*batch, *options])}: about {taken:.1f} GiB" for options, taken in fitting.items())
    least = planned / batch_size * min(SHARES.values())
    return head + (f"Even one patch a step with the frugal options takes {least:.1f} GiB: choose a donor with smaller "
                   "patches, or train with -device cpu.")


class PeakMemory:
    """The most memory that a part of a process takes, above what was in use when the part began.

    Make one where the part begins, and ask for `peak_mib` where it ends. On a GPU, this is the memory that CUDA's
    allocator handed out; on a CPU, the resident memory (Linux only).
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.start: float | None = None
        gc.collect()
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.start = torch.cuda.memory_allocated(device) / 2**20
        elif _RESET.exists():
            with contextlib.suppress(OSError, AttributeError):  # another C library than glibc keeps its free memory
                ctypes.CDLL("libc.so.6").malloc_trim(0)  # else an earlier run's free memory hides what this one takes
            with contextlib.suppress(OSError):  # some containers forbid it; the peak is then unknown
                _RESET.write_text("5")  # proc(5): sets the high-water mark back to what is resident now
                self.start = _resident_mib("VmRSS")

    def peak_mib(self) -> float | None:
        """Return the peak since the start in MiB; None where the system does not tell."""
        peak = torch.cuda.max_memory_allocated(self.device) / 2**20 if self.device.type == "cuda" else \
            _resident_mib("VmHWM")
        return None if peak is None or self.start is None else peak - self.start


def _resident_mib(key: str) -> float | None:
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:")), None)
