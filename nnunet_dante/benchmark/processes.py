"""Runs side by side in processes that load nnU-Net once and take one run after the other."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from typing import TYPE_CHECKING, Any

from ..errors import ConfigurationError

if TYPE_CHECKING:
    from ..compare.results import RunResult
    from .protocol import PlannedRun


def execute_all(made: Sequence[Any], jobs: int) -> Iterator[tuple[RunResult, PlannedRun]]:
    """Yield the result and run of each `worker.Job` as they come, `jobs` at a time.

    Raises:
        ConfigurationError: a process was killed from outside.
    """
    if not made:
        return
    from .worker import execute

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
    """Let this process end when its parent was killed; it would wait for work for ever, with gigabytes in its hands."""
    def wait() -> None:
        if (parent := parent_process()) is not None:
            parent.join()
            os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
