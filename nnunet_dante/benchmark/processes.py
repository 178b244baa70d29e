"""The machine that runs share: processes side by side, and their CPU cores."""

from __future__ import annotations

import os
import platform
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError

if TYPE_CHECKING:
    from ..compare.results import RunResult
    from .protocol import PlannedRun


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
