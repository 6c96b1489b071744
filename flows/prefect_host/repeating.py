"""An ASGI middleware that repeats requests which Prefect's server could not answer because SQLite was busy.

Some of its transactions read first and write then. SQLite refuses such a write at once, without waiting, if another
connection has written in between, and the server answers 503. Prefect's client repeats the request after two seconds,
four, and so on. A stage that asks for a place under the limit `accelerator` would wait that long before it begins.
Here the request is repeated within milliseconds; only if that does not help, the client gets the 503.
"""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

from flows.prefect_host.guard import App, Receive, Scope, Send

_BUSY = 503
_PAUSES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.4)  # seconds before each further attempt
_LARGEST_BODY = 2**20  # bytes; a larger one is not kept, since the app has not checked yet who sends it


class Repeating:
    """Repeats requests that were answered with 503: nothing of them was written.

    Attributes:
        app: the app that answers.
    """

    def __init__(self, app: App) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; the ASGI interface."""
        if scope["type"] != "http" or _length(scope) > _LARGEST_BODY:
            await self.app(scope, receive, send)
            return
        body = await _body(receive)
        for pause in _PAUSES:
            attempt = _Attempt(body, receive, send)
            try:
                await self.app(dict(scope), attempt.receive, attempt.send)
            except Exception:  # Prefect's app answers with 503 and then raises what happened, for the server's log
                if not attempt.was_busy:
                    raise
            if not attempt.was_busy:
                return
            await asyncio.sleep(pause)
        await self.app(scope, _Attempt(body, receive, send).receive, send)


class _Attempt:
    """The channels of one attempt; it drops an answer with 503."""

    def __init__(self, body: bytes | None, receive: Receive, send: Send) -> None:
        self._body, self._receive, self._send = body, receive, send
        self._read = self.was_busy = False

    async def receive(self) -> MutableMapping[str, Any]:
        """The whole body, then what happens to the connection."""
        if self._read or self._body is None:
            return await self._receive()
        self._read = True
        return {"type": "http.request", "body": self._body, "more_body": False}

    async def send(self, message: MutableMapping[str, Any]) -> None:
        """Send the answer, unless it is one that is not given."""
        if message["type"] == "http.response.start" and message["status"] == _BUSY:
            self.was_busy = True
        if not self.was_busy:
            await self._send(message)


def _length(scope: Scope) -> float:
    """Bytes of a request's body; infinite if the client does not say."""
    headers = dict(scope["headers"])
    if b"transfer-encoding" in headers:
        return float("inf")
    return int(headers.get(b"content-length", b"0"))


async def _body(receive: Receive) -> bytes | None:
    """The body of a request; None if the client has gone."""
    parts = []
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return None
        parts.append(message.get("body", b""))
        if not message.get("more_body", False):
            return b"".join(parts)
