"""The server: where it listens, and what it says."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from nnunet_dante.errors import ConfigurationError, DanteError
from nnunet_dante.ui import server
from nnunet_dante.ui.roots import Roots


def test_without_the_extra_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "nicegui", None)
    with pytest.raises(DanteError, match=r'pip install "nnunet-dante\[ui\]"'):
        server.make_app(Roots((tmp_path,)), token="x")


def test_a_taken_port_is_left_to_its_owner():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        taken = other.getsockname()[1]
        with server._listen("127.0.0.1", taken) as found:
            assert taken < found.getsockname()[1] < taken + server._TRIED
    with pytest.raises(ConfigurationError, match="cannot listen at 203.0.113.1"):
        server._listen("203.0.113.1", 8765)


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_it_says_where_it_is_and_who_can_come_in(tmp_path, monkeypatch, host):
    uvicorn = pytest.importorskip("uvicorn")
    monkeypatch.setattr(uvicorn.Server, "run", lambda self, sockets: [s.close() for s in sockets])
    monkeypatch.setattr(server, "make_app", lambda *_, **__: None)
    opened, said = [], []
    monkeypatch.setattr(server.webbrowser, "open", opened.append)
    server.serve(host=host, port=0, roots=[tmp_path], say=said.append)
    assert said[0] == f"Open {opened[0]}" and opened[0].startswith("http://127.0.0.1:")
    assert len(opened[0].partition("token=")[2]) >= 32
    assert ("not encrypted" in said[-1]) == (host == "0.0.0.0")


def test_the_server_itself_imports_no_torch(tmp_path):
    pytest.importorskip("nicegui")
    code = ("import sys; from pathlib import Path; from nnunet_dante.ui.roots import Roots; from nnunet_dante.ui.server import make_app\n"
            "make_app(Roots((Path(sys.argv[1]),)), token='x'); print('torch' in sys.modules, 'nnunetv2' in sys.modules)")
    said = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True, env=os.environ)
    assert said.stdout.split() == ["False", "False"]
