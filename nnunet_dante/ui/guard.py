"""Who may talk to the page: a token in the address, as Jupyter has it, and only requests that the page itself makes."""

from __future__ import annotations

import hmac
import ipaddress
import socket
from http.cookies import CookieError, SimpleCookie
from urllib.parse import parse_qs, urlencode, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import PlainTextResponse, RedirectResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
# The browser itself refuses whatever a page would fetch from elsewhere. The library of the page compiles its templates
# in the browser, which needs `unsafe-eval`; the viewer of volumes makes its textures and workers from blobs.
_POLICY = ("default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' "
           "'unsafe-inline'; img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self' data: blob:; "
           "worker-src 'self' blob:; frame-ancestors 'self'; base-uri 'self'; form-action 'self'; object-src 'none'")
_HEADERS = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}


class Guard:
    """Refuse every request and every socket without the token, and those that another site makes in a browser.

    The token comes once in the address and is then a cookie, which other sites cannot make the browser send.

    Args:
        app: what is guarded, all of it: pages, files and sockets.
        token: the secret.
        host: address at which the server listens.
    """

    def __init__(self, app: ASGIApp, *, token: str, host: str = _LOOPBACK[0]):
        self.app, self.token, self.host = app, token, host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer, or pass on."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
        elif refusal := self._refusal(scope, Headers(scope=scope)):
            await self._refuse(scope, receive, send, refusal)
        elif scope["type"] == "http" and scope["method"] == "GET" and self._given(scope):
            await self._remember(scope, receive, send)
        else:
            await self.app(scope, receive, _with_headers(send) if scope["type"] == "http" else send)

    def _refusal(self, scope: Scope, headers: Headers) -> str:
        """Return why a request is refused, or ""."""
        port = (scope.get("server") or ("", 0))[1]
        try:
            asked = urlsplit(f"//{headers.get('host', '')}")
            if not self._is_known(asked.hostname or ""):
                return f"This server is not called {asked.hostname!r}; open the address that nnunet-dante ui printed."
            origin = headers.get("origin")
            if origin is not None and urlsplit(origin).netloc.lower() != asked.netloc.lower():
                return f"Requests from {origin[:80]} are refused; open the page itself."
            kept = SimpleCookie(headers.get("cookie", "")).get(f"nnunet-dante-{port}")
        except (ValueError, CookieError):
            return "The request is malformed."
        if self._given(scope) or (kept is not None and hmac.compare_digest(kept.value.encode(), self.token.encode())):
            return ""
        return ("This page needs the token that nnunet-dante ui printed: open the address with ?token=... from the "
                "terminal in which the server was started.")

    def _is_known(self, name: str) -> bool:
        """Whether `name` is a name of this server: a site elsewhere can make a name of its own lead here."""
        if name in (*_LOOPBACK, self.host):
            return True
        if self.host in _LOOPBACK:
            return False
        try:
            return bool(ipaddress.ip_address(name))
        except ValueError:
            return name.lower() in {socket.gethostname().lower(), socket.getfqdn().lower()}

    def _given(self, scope: Scope) -> bool:
        """Whether the address itself holds the token."""
        values = parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [])
        return any(hmac.compare_digest(value.encode(), self.token.encode()) for value in values)

    async def _remember(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Put the token into a cookie, and out of the address, where others could read it from the screen."""
        query = parse_qs(scope["query_string"].decode("latin-1"))
        query.pop("token")
        answer = RedirectResponse(scope["path"] + (f"?{urlencode(query, doseq=True)}" if query else ""), 303)
        answer.set_cookie(f"nnunet-dante-{(scope.get('server') or ('', 0))[1]}", self.token, httponly=True,
                          samesite="strict")
        await answer(scope, receive, send)

    async def _refuse(self, scope: Scope, receive: Receive, send: Send, reason: str) -> None:
        if scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": "refused"})
        else:
            await PlainTextResponse(reason + "\n", 403, _HEADERS)(scope, receive, send)


def _with_headers(send: Send) -> Send:
    async def sent(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            for name, value in _HEADERS.items():
                headers.setdefault(name, value)
        await send(message)

    return sent
