"""Requests that a busy SQLite refuses are repeated by the server, in milliseconds, before the client waits seconds."""

from __future__ import annotations

import asyncio
from collections.abc import MutableMapping
from typing import Any

import httpx
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse

from flows.prefect_host import repeating
from flows.prefect_host.repeating import Repeating


class LockedError(Exception):
    """As SQLite's, when another connection has written since this one has read."""


class Busy:
    """An app that answers the first requests as Prefect's does where SQLite is busy, and keeps what it was sent."""

    def __init__(self, times: int) -> None:
        self.bodies: list[bytes] = []
        self.app = FastAPI()

        @self.app.exception_handler(Exception)
        async def unavailable(_: Request, error: Exception) -> JSONResponse:
            status = 503 if isinstance(error, LockedError) else 500
            return JSONResponse({"exception_message": "Service Unavailable"}, status, {"x-busy": "yes"})

        @self.app.post("/take")
        async def take(request: Request) -> JSONResponse:
            self.bodies.append(await request.body())
            if len(self.bodies) <= times:
                raise LockedError
            return JSONResponse({"taken": len(self.bodies[-1])}, 201)

        @self.app.post("/fail")
        async def fail(_: Request) -> None:
            self.bodies.append(b"")
            raise ValueError


def answer(app: Any, content: Any, method: str = "POST", path: str = "/take") -> httpx.Response:
    async def ask() -> httpx.Response:
        transport = httpx.ASGITransport(Repeating(app), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://server") as client:
            return await client.request(method, path, content=content)

    return asyncio.run(ask())


@pytest.fixture(autouse=True)
def pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five further attempts, without waiting."""
    monkeypatch.setattr(repeating, "_PAUSES", (0.0,) * 5)


def test_a_busy_database_is_asked_again_with_the_same_body() -> None:
    busy = Busy(times=3)
    found = answer(busy.app, b"x" * 1000)
    assert (found.status_code, found.json()) == (201, {"taken": 1000})
    assert "x-busy" not in found.headers
    assert busy.bodies == [b"x" * 1000] * 4


def test_a_database_that_stays_busy_is_reported() -> None:
    busy = Busy(times=100)
    found = answer(busy.app, b"x")
    assert (found.status_code, found.json()) == (503, {"exception_message": "Service Unavailable"})
    assert len(busy.bodies) == 6


def test_any_other_answer_is_given_at_once() -> None:
    busy = Busy(times=0)
    assert answer(busy.app, b"", "GET").status_code == 405
    assert answer(busy.app, b"").status_code == 201
    assert busy.bodies == [b""]
    assert answer(busy.app, b"", path="/fail").status_code == 500
    assert len(busy.bodies) == 2


def test_a_body_too_large_to_keep_is_passed_on_once() -> None:
    async def parts() -> Any:
        yield b"of unknown length"

    for body in (b"x" * (2**20 + 1), parts()):
        busy = Busy(times=1)
        assert answer(busy.app, body).status_code == 503
        assert len(busy.bodies) == 1


def test_a_client_that_has_gone_is_not_waited_for() -> None:
    heard: list[str] = []

    async def app(_: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        heard.append((await receive())["type"])
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def gone() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def sent(_: MutableMapping[str, Any]) -> None:
        return None

    scope = {"type": "http", "headers": [(b"content-length", b"9")]}
    asyncio.run(Repeating(app)(scope, gone, sent))
    assert heard == ["http.disconnect"]
