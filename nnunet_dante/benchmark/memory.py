"""The most memory that a part of a process took, without what was there before."""

from __future__ import annotations

import contextlib
import ctypes
import gc
from pathlib import Path

import torch

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class PeakMemory:
    """From its making on: the peak of CUDA's allocator, or of the resident memory (Linux), above the start, in MiB."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        elif _RESET.exists():
            gc.collect()
            with contextlib.suppress(OSError, AttributeError):  # another C library than glibc keeps its free memory
                ctypes.CDLL("libc.so.6").malloc_trim(0)  # else an earlier run's free memory hides what this one takes
            _RESET.write_text("5")  # proc(5): sets the high-water mark back to what is resident now
        self.start_kib = _resident_kib("VmRSS")

    def peak_mib(self) -> float | None:
        """Return the peak since the start; None where the system does not tell."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 2**20
        peak = _resident_kib("VmHWM")
        return None if peak is None or self.start_kib is None else (peak - self.start_kib) / 1024


def _resident_kib(key: str) -> int | None:
    lines = _STATUS.read_text().splitlines() if _STATUS.exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)
