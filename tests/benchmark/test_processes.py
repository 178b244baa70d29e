from __future__ import annotations

import os
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from nnunet_dante.benchmark.processes import PeakMemory

PARENT = """
import os, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from nnunet_dante.benchmark.processes import end_with_parent
if __name__ == "__main__":
    with ProcessPoolExecutor(1, mp_context=get_context("spawn"), initializer=end_with_parent) as pool:
        print(pool.submit(os.getpid).result(), flush=True)
        time.sleep(60)
"""


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_workers_end_when_the_command_is_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(PARENT)
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as parent:
        worker = int(parent.stdout.readline())
        assert alive(worker)
        parent.kill()
    deadline = time.monotonic() + 30
    while alive(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not alive(worker)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells the peak of a part of a process")
def test_the_peak_counts_what_was_taken_since_the_start_also_after_it_is_free_again():
    first = PeakMemory(torch.device("cpu"))
    held = np.ones(64 << 20, np.uint8)
    del held
    assert first.peak_mib() > 60
    assert PeakMemory(torch.device("cpu")).peak_mib() < 60, "what an earlier part took does not count"


def test_on_a_gpu_too_what_an_earlier_run_left_does_not_count(monkeypatch):
    """As large as the earlier run was, the next one would seem to need."""
    gpu = SimpleNamespace(now=500 << 20, peak=900 << 20)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda _: vars(gpu).update(peak=gpu.now))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: gpu.now)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: gpu.peak)
    memory = PeakMemory(torch.device("cuda"))
    gpu.peak = 530 << 20
    assert memory.peak_mib() == 30
