"""A whole federation on this machine: a SuperLink and SuperNodes as processes that talk over 127.0.0.1.

With it, a founder tries a federation before it goes to the sites; federation.py and the tests use it.
"""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path

from nnunet_dante.errors import FederationError

_START_S = 90.0  # a process imports for seconds, on a busy machine for many
_QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "PYTHONUNBUFFERED": "1"}
_NO_INSTALL = "--disable-runtime-dependency-installation"  # Flower would run `uv sync`, which downloads


def free_port() -> int:
    """Return a port of 127.0.0.1 that nothing uses."""
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


class Loopback:
    """Processes of Flower on this machine, and their logs.

    Example: `with Loopback(Path("work")) as flower: flower.start_link(); flower.start_node("a", "Dataset901_A")`, then
    `flower.run(folder)`. All processes end with the block.

    Args:
        home: folder for logs and Flower's own files.
        environment: further environment variables of the processes, such as nnUNet_raw.
        link_options, node_options: of flower-superlink and flower-supernode instead of --insecure, for TLS.
        certificate: PEM file of the authority that signed the server's certificate, for `flwr run`.
    """

    def __init__(self, home: Path, *, environment: Mapping[str, str] | None = None,
                 link_options: Sequence[str] = ("--insecure",), node_options: Sequence[str] = ("--insecure",),
                 certificate: Path | None = None):
        self.home = home.resolve()
        self.link_options, self.node_options, self.certificate = link_options, node_options, certificate
        self.environment = {**os.environ, **_QUIET, **(environment or {}), "FLWR_HOME": str(self.home / "flwr"),
                            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])}
        self.port = free_port()
        self.processes: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> Loopback:
        (self.home / "flwr").mkdir(parents=True, exist_ok=True)
        secure = f'root-certificates = "{self.certificate}"' if self.certificate else "insecure = true"
        (self.home / "flwr" / "config.toml").write_text(
            f'[superlink]\ndefault = "loopback"\n\n[superlink.loopback]\naddress = "127.0.0.1:{self.port}"\n{secure}\n')
        return self

    def __exit__(self, *_: object) -> None:
        for name in list(self.processes):
            self.stop(name)

    def start_link(self) -> None:
        """Start the SuperLink, and wait until it listens."""
        self._start("superlink", ["flower-superlink", *self.link_options, "--host", "127.0.0.1", "--port",
                                  str(self.port), _NO_INSTALL])
        until = time.monotonic() + _START_S
        while time.monotonic() < until and self.processes["superlink"].poll() is None:
            with suppress(OSError), closing(socket.create_connection(("127.0.0.1", self.port), timeout=1)):
                return
            time.sleep(0.3)
        raise FederationError(f"flower-superlink did not start: {self.log('superlink')[-500:]}")

    def start_node(self, name: str, dataset: str) -> None:
        """Start the SuperNode of a site whose data set has joined the federation."""
        self._start(name, ["flower-supernode", *self.node_options, "--superlink", f"127.0.0.1:{self.port}", "--port",
                           str(free_port()), "--node-config", f'dataset="{dataset}"'])

    def run(self, folder: Path, *, seconds: float, settings: Mapping[str, float] | None = None) -> str:
        """Run the federation in `folder`, and return what the server said.

        settings: of the server, in place of those in pyproject.toml.

        Raises:
            FederationError: it does not end within `seconds`, or ends without a result.
        """
        config = " ".join(f"{key}={value}" for key, value in (settings or {}).items())
        command = ["flwr", "run", str(folder), "loopback", "--stream", *(["--run-config", config] if config else [])]
        self._start("run", command)
        try:
            self.processes.pop("run").wait(seconds)
        except subprocess.TimeoutExpired:
            raise FederationError(f"the federation did not end within {seconds:.0f} s; logs: {self.home}") from None
        said = self.log("run")
        if "finished: " not in said:
            raise FederationError(f"the federation has no result; logs: {self.home}. The server said: {said[-800:]}")
        return said

    def _start(self, name: str, command: Sequence[str]) -> None:
        with (self.home / f"{name}.log").open("ab") as log:
            log.write(f"$ {shlex.join(command)}\n".encode())
            log.flush()
            self.processes[name] = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT,
                                                    stdin=subprocess.DEVNULL, env=self.environment, cwd=self.home,
                                                    start_new_session=True)

    def log(self, name: str) -> str:
        """Return the log of a process."""
        file = self.home / f"{name}.log"
        return file.read_text(errors="replace") if file.is_file() else ""

    def stop(self, name: str, *, kill: bool = False) -> None:
        """End a process and those that it has started; kill: without any warning."""
        process = self.processes.pop(name)
        for number in (signal.SIGKILL,) if kill else (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
