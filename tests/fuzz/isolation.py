"""One case in a process of its own, with limits, and what it did. Linux only: it forks, and reads /proc."""

from __future__ import annotations

import faulthandler
import os
import resource
import select
import shutil
import signal
import time
import traceback
from dataclasses import dataclass
from pathlib import Path
from random import Random

from nnunet_dante.errors import DanteError

from .reader import Place, Reader

MEMORY = 1 << 30  # address space beyond what the process has before it reads
GROWTH = 256 << 20  # memory it may really fill; the samples have less than 100 kB
SECONDS = 20  # of computing
WAITED = 120  # in all: a busy machine computes slowly


@dataclass(frozen=True)
class Outcome:
    """kind: "error" (a DanteError), "read" (a correct result), or "failure"; detail says which error or failure."""

    kind: str
    detail: str


def run_case(reader: Reader, work: Path, attack: str | None, seed: str, expected: str | None) -> Outcome:
    """Make one hostile file and read it; `attack` names a crafted one, else `seed` makes random damage.

    expected: digest of what the valid file holds, for readers of formats with checksums: damage must not change it.
    """
    place = Place(samples=work / "samples", case=work / "case", out=work / "out", canary=work / "CANARY")
    before = {p.name for p in work.iterdir()} - {"case", "out"}
    for folder in (place.case, place.out):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    found = _in_child(reader, place, attack, seed, expected)
    escaped = sorted({p.name for p in work.iterdir()} - before - {"case", "out"})
    for name in escaped:
        shutil.rmtree(work / name, ignore_errors=True)
        (work / name).unlink(missing_ok=True)
    if escaped:
        return Outcome("failure", f"code ran, or a file was written outside: {escaped}")
    left = sorted(p.name for p in place.out.rglob("*")) if found.kind == "error" else sorted(
        p.name for p in place.out.rglob("*.tmp"))
    return Outcome("failure", f"an error left {left[:3]} behind") if left else found


def _in_child(reader: Reader, place: Place, attack: str | None, seed: str, expected: str | None) -> Outcome:
    out, into = os.pipe()
    pid = os.fork()
    if not pid:
        os.close(out)
        try:
            outcome = _child(reader, place, attack, seed, expected)
            os.write(into, f"{outcome.kind}\n{outcome.detail}".encode(errors="replace")[:60_000])
        finally:
            os._exit(0)
    os.close(into)
    answer, deadline = b"", time.monotonic() + WAITED
    while time.monotonic() < deadline:
        if select.select([out], [], [], 1.0)[0]:
            if not (part := os.read(out, 65_536)):
                break
            answer += part
    else:
        os.kill(pid, signal.SIGKILL)
    os.close(out)
    _, status = os.waitpid(pid, 0)
    if answer:
        return Outcome(*answer.decode().split("\n", 1))
    number = os.waitstatus_to_exitcode(status)
    slow = number in (-signal.SIGXCPU, -signal.SIGKILL)
    return Outcome("failure", f"took more than {SECONDS} s" if slow else f"crashed with exit status {number}")


def _child(reader: Reader, place: Place, attack: str | None, seed: str, expected: str | None) -> Outcome:
    faulthandler.disable()  # pytest's would print every crash
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(null, stream)
    os.chdir(place.out)
    try:
        if attack is None:
            reader.make(place, Random(seed))
        else:
            reader.attacks(place)[attack]()
    except Exception as error:  # damage that cannot even be written as a file
        return Outcome("skipped", f"{type(error).__name__}: {error}")
    limit = _status("VmSize") + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CPU, (int(sum(os.times()[:2])) + SECONDS, -1))
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    start = _status("VmRSS")
    outcome = _read(reader, place, expected if attack is None else None)
    if (growth := _status("VmHWM") - start) > GROWTH:
        return Outcome("failure", f"filled {growth >> 20} MiB ({outcome.kind}: {outcome.detail[:500]})")
    return outcome


def _read(reader: Reader, place: Place, expected: str | None) -> Outcome:
    try:
        found = reader.read(place)
    except DanteError as error:
        if out_of_memory := [e for e in _chain(error) if isinstance(e, MemoryError) or "allocate" in str(e) or "bad_alloc" in str(e)]:
            return Outcome("failure", f"asked for too much memory: {out_of_memory[0]!r} in {error}")
        return Outcome("error", f"{type(error).__name__}: {error}")
    except BaseException:
        return Outcome("failure", traceback.format_exc())
    if expected is not None and found != expected:
        return Outcome("failure", "read something else than was written")
    return Outcome("read", "")


def _chain(error: BaseException | None) -> list[BaseException]:
    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    return found


def _status(key: str) -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{key}:"))
    return int(line.split()[1]) << 10
