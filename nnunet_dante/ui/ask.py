"""Let other processes do what reads foreign files or needs torch, and keep them for the next question.

So the server stays small, a file that makes a library crash does not end it, and a question that takes long does not
stop the page. The functions are those of `work`; their arguments and answers are JSON values.
"""

from __future__ import annotations

import asyncio
import json
import sys
from asyncio.subprocess import PIPE, Process
from contextlib import suppress
from typing import Any

from ..errors import DanteError

_KEPT_SECONDS = 120.0  # importing torch and nnU-Net takes seconds, and half a GiB of memory
_LONGEST_ANSWER = 1 << 28  # bytes
_waiting: list[Process] = []


async def ask(name: str, *arguments: Any) -> Any:
    """Return the answer of a function of `work`.

    Raises:
        DanteError: what the function raised, or that its process ended without an answer.
    """
    process = await _process()
    assert process.stdin is not None and process.stdout is not None
    try:
        process.stdin.write(json.dumps([name, arguments]).encode() + b"\n")
        await process.stdin.drain()
        content = json.loads(await process.stdout.readline())
    except (ValueError, OSError):
        await process.wait()
        raise DanteError(f"The process that was asked to {name.replace('_', ' ')} ended without an answer (exit code "
                         f"{process.returncode}). If memory is short, close other programs; then try again.") from None
    except BaseException:  # the page was closed
        process.kill()
        raise
    _waiting.append(process)
    asyncio.get_running_loop().call_later(_KEPT_SECONDS, _end, process)
    if "error" in content:
        raise DanteError(content["error"])
    return content["answer"]


async def _process() -> Process:
    while _waiting:
        process = _waiting.pop()
        if process.returncode is None:
            return process
    return await asyncio.create_subprocess_exec(sys.executable, "-m", "nnunet_dante.ui.work", stdin=PIPE, stdout=PIPE,
                                                stderr=asyncio.subprocess.DEVNULL, limit=_LONGEST_ANSWER)


def _end(process: Process) -> None:
    """End a process that nobody has asked since; it ends with the server, too, since its input ends."""
    if process in _waiting:
        _waiting.remove(process)
        with suppress(ProcessLookupError):
            process.kill()
