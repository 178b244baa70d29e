"""Which process works in the folder of an adaptation: at most one, and other programs can find it and stop it."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import ConfigurationError
from ..files import write_text_atomically

RECORD, _LOCK, _PROCESS = "adapt.json", "adapt.lock", "adapt.pid"
OWN_FILES = (_LOCK, _PROCESS)
_PATIENCE = 2.0  # seconds; whoever looks whether a folder is free holds its lock for an instant
_TO_END = 20.0  # seconds that a process has to end its commands
# Not SIGTERM: pools of processes end their workers by it, and a worker that inherits a handler in Python may never end.
_STOP = getattr(signal, "SIGUSR1", signal.SIGTERM)  # Windows has no other


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Hold the folder of an adaptation; the system gives it back when the process ends, in whatever way.

    While it is held, the signal of `stop` ends the work as Ctrl-C does, so that running commands end, too.

    Raises:
        ConfigurationError: another process works in the folder.
    """
    lock = FileLock(out / _LOCK)
    try:
        lock.acquire(timeout=_PATIENCE)
    except Timeout:
        raise ConfigurationError(f"Another process is adapting a network in {out}. Wait until it ends, or stop it, or "
                                 "give another folder with -o.") from None
    except NotImplementedError:  # a file system without locks
        yield
        return
    try:
        write_text_atomically(str(os.getpid()), out / _PROCESS)
        with _stoppable():
            yield
    finally:
        lock.release()


@contextmanager
def _stoppable() -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only that one may set signals
        yield
        return
    before = signal.signal(_STOP, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(_STOP, before)


def process_in(out: Path) -> int | None:
    """Return the number of the process that works in `out`, or None if there is none."""
    if not (out / _LOCK).exists():
        return None
    lock = FileLock(out / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        with suppress(OSError, ValueError):
            return int((out / _PROCESS).read_text())
        return None  # it has begun this instant
    except (OSError, NotImplementedError):
        return None
    lock.release()
    return None


def stop(out: Path) -> None:
    """End the process that works in `out`, and wait for its end; what is finished stays.

    Raises:
        ConfigurationError: the process belongs to another user, or does not end.
    """
    if (number := process_in(out)) is None:
        return
    try:
        os.kill(number, _STOP)
        end = time.monotonic() + _TO_END
        while process_in(out) == number:
            if time.monotonic() > end:
                raise ConfigurationError(f"Process {number}, which works in {out}, does not end. End it by hand.")
            time.sleep(0.1)
    except PermissionError:
        raise ConfigurationError(f"Process {number}, which works in {out}, belongs to another user.") from None
