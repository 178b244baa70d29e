"""One process at a time works in the folder of an adaptation, and others can find and stop it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest

from nnunet_dante.adaptation.running import claimed, process_in, stop
from nnunet_dante.errors import ConfigurationError

_WORK = """
import sys, time
from pathlib import Path
from nnunet_dante.adaptation.running import claimed
try:
    with claimed(Path(sys.argv[1])):
        print("begun", flush=True)
        time.sleep(60)
except KeyboardInterrupt:
    print("ended in order", flush=True)
"""


@pytest.fixture
def other(tmp_path):
    """Another process that works in tmp_path."""
    process = subprocess.Popen([sys.executable, "-c", _WORK, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "begun\n"
    yield process
    process.kill()
    process.wait()


def test_a_free_folder_is_free(tmp_path):
    assert process_in(tmp_path) is None
    with claimed(tmp_path):
        assert process_in(tmp_path) == os.getpid()
    assert process_in(tmp_path) is None
    stop(tmp_path)


def test_a_second_process_is_refused(tmp_path, other):
    assert process_in(tmp_path) == other.pid
    with pytest.raises(ConfigurationError, match="Another process is adapting"), claimed(tmp_path):
        pass


def test_it_is_stopped_as_with_ctrl_c(tmp_path, other):
    stop(tmp_path)
    assert other.stdout.read() == "ended in order\n" and process_in(tmp_path) is None


def test_a_killed_process_leaves_the_folder_free(tmp_path, other):
    other.send_signal(signal.SIGKILL)
    other.wait()
    assert process_in(tmp_path) is None
    with claimed(tmp_path):
        pass


def test_looking_disturbs_nobody(tmp_path):
    """Whoever looks holds the lock for an instant, in which a run that begins must wait instead of failing."""
    code = ("import sys, time; from pathlib import Path\nfrom nnunet_dante.adaptation.running import process_in\n"
            "print('begun', flush=True); end = time.monotonic() + 3\n"
            "while time.monotonic() < end: process_in(Path(sys.argv[1]))")
    (tmp_path / "adapt.lock").touch()
    looking = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert looking.stdout.readline() == "begun\n"
    for _ in range(5):
        with claimed(tmp_path):
            time.sleep(0.01)
    looking.kill()
    looking.wait()


def test_pools_of_processes_end_as_ever(tmp_path):
    """Pools end their workers by SIGTERM; with a handler of ours in them, some never ended."""
    before = signal.getsignal(signal.SIGTERM)
    with claimed(tmp_path):
        assert signal.getsignal(signal.SIGTERM) is before is signal.SIG_DFL
