"""An ASGI middleware for loopback servers: it accepts only their own host names and pages.

A page that is open in the same browser can send requests to any port of this machine. Its requests carry its origin
(`Origin`), or, where the page's own name was given the address 127.0.0.1 (DNS rebinding), that name (`Host`). Neither
Prefect's nor MLflow's server refuses both.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

from flows.prefect_host.access import PROOF_PATH, proof

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_NAMES = ("127.0.0.1", "localhost", "[::1]")
_HEADERS = [
    (b"x-frame-options", b"DENY"),  # no other page may embed this one, which would allow clickjacking
    (b"x-content-type-options", b"nosniff"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"referrer-policy", b"same-origin"),
]
_LONGEST_CHALLENGE = 128


def own_origins(port: int) -> list[str]:
    """The origins of a loopback server's own pages."""
    return [f"http://{name}:{port}" for name in _NAMES] + ([f"http://{name}" for name in _NAMES] if port == 80 else [])


class Guard:
    """Refuses requests (403) and web sockets for a foreign `Host` or from a foreign `Origin`.

    Attributes:
        app: the app that answers accepted requests.
    """

    def __init__(self, app: App, *, auth: str | None = None) -> None:
        """Wrap an app.

        Args:
            app: an ASGI app that listens on a loopback address.
            auth: the auth string of a Prefect server; it is proved at `access.PROOF_PATH`, never sent.
        """
        self.app = app
        self._auth = auth

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; the ASGI interface."""
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        port = int(scope["server"][1])
        own = {origin.encode() for origin in own_origins(port)}
        hosts = [value.lower() for name, value in scope["headers"] if name == b"host"]
        origins = [value.lower() for name, value in scope["headers"] if name == b"origin"]
        if len(hosts) != 1 or b"http://" + hosts[0] not in own:
            await self._refuse(scope, send, "This server does not answer under that Host name.")
        elif any(origin not in own for origin in origins):
            await self._refuse(scope, send, "This server takes no requests from pages of another origin.")
        elif scope["type"] == "http" and self._auth and scope["path"] == PROOF_PATH:
            await self._prove(scope, send, self._auth, port)
        else:
            await self.app(scope, receive, _with_headers(send) if scope["type"] == "http" else send)

    async def _prove(self, scope: Scope, send: Send, auth: str, port: int) -> None:
        given = parse_qs(scope["query_string"].decode("latin-1")).get("challenge", [])
        if len(given) != 1 or len(given[0]) > _LONGEST_CHALLENGE:
            await _answer(send, 400, "One challenge is expected.")
        else:
            await _answer(send, 200, proof(auth, given[0], port))

    async def _refuse(self, scope: Scope, send: Send, why: str) -> None:
        if scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008, "reason": why})  # before it is accepted: HTTP 403
        else:
            await _answer(send, 403, why)


def _with_headers(send: Send) -> Send:
    async def sending(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            names = {name for name, _ in _HEADERS}
            kept = [(name, value) for name, value in message.get("headers", ()) if name.lower() not in names]
            message = {**message, "headers": [*kept, *_HEADERS]}
        await send(message)

    return sending


async def _answer(send: Send, status: int, text: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(text)).encode()), *_HEADERS]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": text.encode()})
