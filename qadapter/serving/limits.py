"""Limits of a server: bytes, seconds and connections per client, checked before anything is read or parsed."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import resource
import time
from collections.abc import Collection
from typing import Any

from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from qadapter.serving.errors import RequestError, error_body

MOST_BYTES = 4 * 2**20
"""Largest body of a request in bytes."""
MOST_CONNECTIONS = 256
HEADER_SECONDS = 10.0
"""Seconds within which a connection must send the headers of a request."""
BODY_SECONDS = 30.0
WRITE_SECONDS = 60.0
"""Seconds that a client may leave an answer unread."""
BACKLOG = 64  # connections that are accepted in one turn of the event loop, before any of them can be refused
_DRAIN_SECONDS = 5.0

log = logging.getLogger(__name__)


class OnlyHosts:
    """Refuses requests to foreign host names and requests from foreign web pages.

    A web page may resolve its own name to 127.0.0.1 (DNS rebinding), so that the user's browser treats this server as
    the page's own; such requests carry the page's name. Starlette's `TrustedHostMiddleware` does the same, but without
    a message in OpenAI's format. A page can also send a simple request to this server's own name; it carries the page's
    origin.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str] | None, origins: Collection[str]) -> None:
        self._app, self._origins = app, set(origins)
        self._hosts = None if hosts is None else {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            host, origin = headers.get("host", ""), headers.get("origin")
            error = None
            if self._hosts is not None and (name := host_name(host)) not in self._hosts:
                error = error_body(
                    f"This server does not answer to the name {name[:200]!r}. Start it with QADAPTER_ALLOWED_HOSTS set "
                    "to the allowed names, separated by commas.",
                    403,
                    "host_not_allowed",
                )
            elif origin is not None and origin not in self._origins and origin != f"{scope['scheme']}://{host}":
                error = error_body(
                    f"This server does not answer to pages of {origin[:200]!r}. Start it with --cors-origin ORIGIN for "
                    "each allowed page.",
                    403,
                    "origin_not_allowed",
                )
            if error is not None:
                await _refuse(error, 403, scope, receive, send)
                return
        await self._app(scope, receive, send)


class Guard:
    """Checks the token and limits the body before the application receives the request."""

    def __init__(
        self, app: ASGIApp, api_key: str | None, most_bytes: int = MOST_BYTES, body_seconds: float = BODY_SECONDS
    ) -> None:
        self._app, self._key, self._most, self._seconds = app, api_key, most_bytes, body_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        if self._key is not None and scope["path"].startswith("/v1"):
            given = headers.get("authorization", "").encode()
            if not hmac.compare_digest(given, f"Bearer {self._key}".encode()):
                body = error_body("This server requires a bearer token.", 401, "invalid_api_key")
                await _refuse(body, 401, scope, receive, send)
                return
        length = headers.get("content-length", "0")
        if not length.isdecimal() or len(length) > 18 or int(length) > self._most:
            await _refuse(error_body(self._too_large(), 413, "request_too_large"), 413, scope, receive, send)
            return
        await self._app(scope, self._bounded(receive), send)

    def _too_large(self) -> str:
        return f"The request is larger than the limit of {self._most} bytes."

    def _bounded(self, receive: Receive) -> Receive:
        read, whole = 0, False
        deadline = time.monotonic() + self._seconds

        async def bounded() -> Message:
            nonlocal read, whole
            if whole:  # only a disconnect can follow
                return await receive()
            try:
                message = await asyncio.wait_for(receive(), max(deadline - time.monotonic(), 0.001))
            except TimeoutError:
                raise RequestError(
                    f"The body of the request did not arrive within {self._seconds:g} seconds.", 408, "request_timeout"
                ) from None
            read += len(message.get("body", b""))
            if read > self._most:
                raise RequestError(self._too_large(), 413, "request_too_large")
            whole = message["type"] != "http.request" or not message.get("more_body", False)
            return message

        return bounded


async def _refuse(body: dict[str, Any], status: int, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer without the application. Incoming data are discarded first, since otherwise the answer would be lost."""

    async def drain() -> None:
        read = 0
        while read <= MOST_BYTES:
            message = await receive()
            read += len(message.get("body", b""))
            if not message.get("more_body", False):
                return

    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(drain(), _DRAIN_SECONDS)
    await JSONResponse(body, status, headers={"Connection": "close"})(scope, receive, send)


def host_name(header: str) -> str:
    """The name or address in a `Host` header, lower case, without port, brackets and a final dot."""
    text = header.strip().lower()
    name = text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]
    return name.removesuffix(".")


class BoundedConnection(H11Protocol):
    """uvicorn's connection, closed when it sends no headers in time, leaves answers unread, or blocks other clients.

    At the limit, the connection that has been idle longest is closed for a new one, so that idle and
    half-open connections never block other clients; those that are being answered stay.
    """

    most_connections = min(MOST_CONNECTIONS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)
    header_seconds = HEADER_SECONDS
    write_seconds = WRITE_SECONDS

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has connected."""
        super().connection_made(transport)
        self._late: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None
        self._since = time.monotonic()
        self._expect_headers()
        if len(self.connections) > self.most_connections:
            idle = [one for one in self.connections if isinstance(one, BoundedConnection) and one.idle]
            (min(idle, key=lambda one: one._since) if idle else self).drop("too many connections")

    def connection_lost(self, exc: Exception | None) -> None:
        """The client, or this server, has closed the connection."""
        for timer in (self._late, self._unread):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Bytes of a request."""
        super().data_received(data)
        if self.idle:
            self._expect_headers()
        elif self._late is not None:
            self._late.cancel()
            self._late = None

    def on_response_complete(self) -> None:
        """An answer is out."""
        self._since = time.monotonic()
        super().on_response_complete()

    def pause_writing(self) -> None:
        """The client does not read."""
        super().pause_writing()
        if self._unread is None:
            self._unread = self.loop.call_later(self.write_seconds, self.drop, "answers left unread")

    def resume_writing(self) -> None:
        """The client reads again."""
        super().resume_writing()
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    @property
    def idle(self) -> bool:
        """Whether no request is being read or answered."""
        return self.cycle is None or self.cycle.response_complete

    def drop(self, why: str) -> None:
        """End the connection at once."""
        log.warning("Connections are dropped: %s", why)
        self.connections.discard(self)
        self.transport.abort()

    def _expect_headers(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(
                self.header_seconds, self.drop, f"no request within {self.header_seconds:g} seconds"
            )


class Sparing(logging.Filter):
    """Passes a few log records of each kind per period; the next one reports how many were dropped.

    Attributes:
        most: records of one kind per period.
        seconds: the period.
    """

    def __init__(self, most: int = 5, seconds: float = 60.0) -> None:
        super().__init__()
        self.most, self.seconds = most, seconds
        self._seen: dict[tuple[str, str], list[float]] = {}  # kind → start of its period, passed, dropped

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is written."""
        kind, now = (record.name, str(record.msg)[:200]), time.monotonic()
        if kind not in self._seen and len(self._seen) >= 256:
            self._seen.clear()
        state = self._seen.setdefault(kind, [now, 0, 0])
        if now - state[0] > self.seconds:
            if state[2]:
                record.msg, record.args = f"{record.getMessage()} ({state[2]:.0f} similar ones omitted)", ()
            state[:] = [now, 0, 0]
        if state[1] >= self.most:
            state[2] += 1
            return False
        state[1] += 1
        return True


def spare_the_log() -> None:
    """Limit the log lines that a client can cause."""
    sparing = Sparing()
    for name in ("uvicorn.error", "asyncio", "qadapter.serving.app", __name__):
        logger = logging.getLogger(name)
        if not any(isinstance(one, Sparing) for one in logger.filters):
            logger.addFilter(sparing)
