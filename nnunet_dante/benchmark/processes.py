"""The machine that runs share: processes side by side, their CPU cores, and the memory that a run takes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import platform
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import ConfigurationError

if TYPE_CHECKING:
    from ..compare.results import RunResult
    from .protocol import PlannedRun

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def execute_all(execute: Callable[[Any], RunResult], made: Sequence[Any],
                jobs: int) -> Iterator[tuple[RunResult, PlannedRun]]:
    """Yield the result and run of each job as they come, `jobs` at a time.

    Each process loads nnU-Net once and takes one run after the other.

    Args:
        execute: `worker.execute`.
        made: a `worker.Job` for each run.
        jobs: number of processes.

    Raises:
        ConfigurationError: a process was killed from outside.
    """
    if not made:
        return
    workers = min(jobs, len(made))
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        try:
            futures = {pool.submit(execute, job): job.run for job in made}
            for future in as_completed(futures):
                yield future.result(), futures[future]
        except BrokenProcessPool as error:
            raise ConfigurationError("a process of the protocol was killed, most often because memory ran out. What is "
                                     "done is saved: run the same command again, with fewer --jobs.") from error
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def end_with_parent() -> None:
    """End this process when its parent is killed; otherwise it would wait for work for ever and keep its memory."""
    def wait() -> None:
        if (parent := parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def processor_name() -> str:
    """Return what the system calls the CPU: times of two machines compare only if this is the same."""
    info = Path("/proc/cpuinfo")  # Linux; platform.processor() is empty there
    lines = info.read_text().splitlines() if info.is_file() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
                platform.processor() or platform.machine())


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
