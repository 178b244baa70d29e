"""The server of the page: it listens on this machine, prints the address with its token, and opens the browser."""

from __future__ import annotations

import secrets
import socket
import webbrowser
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import ConfigurationError, DanteError
from .roots import Roots

_TRIED = 20  # ports, from the one that is asked for upwards
_MISSING = 'The page needs libraries of its own: pip install "nnunet-dante[ui]"'


def make_app(roots: Roots, *, token: str, host: str = "127.0.0.1"):
    """Return the page as an ASGI application, behind its guard.

    Raises:
        DanteError: NiceGUI or NiiVue is not installed.
    """
    try:
        from fastapi import FastAPI
        from nicegui import ui
    except ImportError as error:
        raise DanteError(f"{_MISSING} ({error})") from error
    from .guard import Guard
    from .pages import add_pages

    add_pages(roots)
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    ui.run_with(app, title="nnunet-dante", dark=None, language="en-US", tailwind=False, show_welcome_message=False,
                binding_refresh_interval=None, reconnect_timeout=30,
                gzip_middleware_factory=None)  # it would compress volumes and models once more, for many seconds
    return Guard(app, token=token, host=host)


def serve(*, host: str = "127.0.0.1", port: int = 8765, roots: Sequence[str | Path] = (), browser: bool = True,
          say: Callable[[str], object] = print) -> None:
    """Serve the page until Ctrl-C. Runs that were started in it go on.

    Args:
        host: address to listen at; 0.0.0.0 lets other machines in, with the token.
        port: the first port that is tried; 0 takes any free one.
        roots: folders that the page may look into. Default: home, and nnU-Net's folders.
        browser: open the page in the browser.
        say: receives what to tell the user.

    Raises:
        ConfigurationError: a root is no folder, or no port is free.
        DanteError: the extra `ui` is not installed.
    """
    allowed, token = Roots.given(roots), secrets.token_urlsafe(24)
    app = make_app(allowed, token=token, host=host)
    import uvicorn

    listening = _listen(host, port)
    number = listening.getsockname()[1]
    shown = "127.0.0.1" if host in ("0.0.0.0", "::") else f"[{host}]" if ":" in host else host
    say(f"Open http://{shown}:{number}/?token={token}")
    say(f"The page reads and writes below {', '.join(map(str, allowed.folders))}. Ctrl-C ends the page; runs go on.")
    if host not in ("127.0.0.1", "localhost", "::1"):
        say(f"It listens at {host}: everyone in your network who knows the token can read and write these folders and "
            "start trainings as you. The connection is not encrypted; an SSH tunnel to 127.0.0.1 is safer.")
    if browser:
        webbrowser.open(f"http://{shown}:{number}/?token={token}")
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", access_log=False, server_header=False,
                                           timeout_graceful_shutdown=2))
    server.run(sockets=[listening])


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for number in range(port, port + _TRIED) if port else (0,):
        listening = socket.socket(family, socket.SOCK_STREAM)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind((host, number))
            listening.listen()  # from now on browsers wait instead of failing
            return listening
        except OSError as error:
            listening.close()
            last = error
    raise ConfigurationError(f"The page cannot listen at {host}, port {port} ({last.strerror}). Give another --port or "
                             "--host.")
