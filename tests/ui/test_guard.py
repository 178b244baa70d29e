"""The guard of the page: without the token nothing is answered, and other sites cannot make a browser ask."""

from __future__ import annotations

import pytest

pytest.importorskip("nicegui")
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route, WebSocketRoute
from starlette.testclient import TestClient
from starlette.websockets import WebSocketDisconnect

from nnunet_dante.ui.guard import Guard

TOKEN, SOCKET = "a-secret", "ws://127.0.0.1:8765/socket"


async def _page(request):
    return PlainTextResponse("the page")


async def _socket(socket):
    await socket.accept()
    await socket.send_text("hello")
    await socket.close()


def client(*, host="127.0.0.1", address="http://127.0.0.1:8765", known=True):
    app = Starlette(routes=[Route("/{path:path}", _page, methods=["GET", "POST"]), WebSocketRoute("/socket", _socket)])
    found = TestClient(Guard(app, token=TOKEN, host=host), base_url=address)
    if known:
        assert found.get(f"/?token={TOKEN}").status_code == 200
    return found


def test_the_token_becomes_a_cookie_and_leaves_the_address():
    new = client(known=False)
    answer = new.get(f"/runs?token={TOKEN}&folder=/a b", follow_redirects=False)
    assert answer.status_code == 303 and answer.headers["location"] == "/runs?folder=%2Fa+b"
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=strict" in cookie
    assert new.get("/runs").text == "the page", "the cookie is enough from now on"


@pytest.mark.parametrize("given", ["", "?token=", "?token=wrong", f"?token={TOKEN}x", "?token=\u00e9"])
def test_without_the_token_nothing_is_answered(given):
    for path in ("/", "/niivue.js", "/_nicegui/anything", "/file/etc/passwd"):
        answer = client(known=False).get(path + given)
        assert answer.status_code == 403 and "terminal" in answer.text and "the page" not in answer.text


def test_a_wrong_or_damaged_cookie_is_none():
    for cookie in ("nnunet-dante-8765=wrong", f"nnunet-dante-1={TOKEN}", '"\u20ac;;=', "nnunet-dante-8765"):
        answer = client(known=False).get("/", headers={"cookie": cookie.encode()})
        assert answer.status_code == 403


@pytest.mark.parametrize("origin", ["http://evil.example", "null", "http://127.0.0.1:8766", "http://localhost:8765", "http://[", ""])
def test_a_foreign_origin_is_refused_for_pages_and_sockets(origin):
    known = client()
    assert known.get("/", headers={"origin": origin}).status_code == 403
    assert known.post("/", headers={"origin": origin}).status_code == 403
    with pytest.raises(WebSocketDisconnect), known.websocket_connect(SOCKET, headers={"origin": origin}):
        pass


def test_the_page_itself_may_open_sockets_and_strangers_may_not():
    with client().websocket_connect(SOCKET, headers={"origin": "http://127.0.0.1:8765"}) as socket:
        assert socket.receive_text() == "hello"
    with pytest.raises(WebSocketDisconnect), client(known=False).websocket_connect(SOCKET):
        pass


@pytest.mark.parametrize("name", ["evil.example", "evil.example:8765", "127.0.0.1.evil.example", "192.168.0.7", "", "["])
def test_other_names_of_this_machine_are_refused(name):
    assert client().get("/", headers={"host": name}).status_code == 403, "DNS rebinding"


def test_where_other_machines_may_come_in_addresses_are_known_and_names_of_strangers_are_not():
    open_one = client(host="0.0.0.0", address="http://192.168.0.7:8765")
    assert open_one.get("/").status_code == 200
    assert open_one.get("/", headers={"host": "evil.example"}).status_code == 403
    assert client(host="0.0.0.0", address="http://192.168.0.7:8765", known=False).get("/").status_code == 403


def test_the_browser_may_fetch_nothing_from_elsewhere():
    policy = client().get("/").headers["content-security-policy"]
    assert "default-src 'self'" in policy and "http" not in policy and "*" not in policy
