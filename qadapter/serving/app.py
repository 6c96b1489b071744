"""The HTTP side: OpenAI's routes over a `Generator`."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import threading
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect

from qadapter.serving.errors import RequestError, error_body
from qadapter.serving.generator import BusyError, Generator, Reply
from qadapter.serving.limits import MOST_BYTES, Guard, OnlyHosts, spare_the_log
from qadapter.serving.protocol import Prepared, prepare, read_request
from qadapter.serving.reference import chat_description, describe, page

log = logging.getLogger(__name__)
_LOOK_SECONDS = 0.2  # interval of checking whether a client is still connected


class ClientGoneError(Exception):
    """The client no longer waits for the answer."""


def create_app(
    generator: Generator,
    api_key: str | None = None,
    hosts: Collection[str] | None = None,
    *,
    cors_origins: Collection[str] = (),
    most_bytes: int = MOST_BYTES,
) -> FastAPI:
    """The server's application.

    Args:
        generator: generates the replies.
        api_key: bearer token that every request below `/v1` must have; None: no token is required.
        hosts: accepted names and addresses (the `Host` of a request, without port); None: any.
        cors_origins: origins of pages, as `https://name:port`, that may send requests from a browser.
        most_bytes: largest body of a request in bytes.
    """
    spare_the_log()
    app = FastAPI(title="Q-Adapter", docs_url=None, redoc_url=None, openapi_url="/openapi.json")
    describe(app)
    app.add_middleware(Guard, api_key=api_key, most_bytes=most_bytes)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            max_age=600,
        )
    app.add_middleware(OnlyHosts, hosts=hosts, origins=cors_origins)  # the outermost

    @app.get("/health", summary="Whether the server runs")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        policy = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}
        return HTMLResponse(page(app.openapi()), headers=policy)

    @app.get("/v1/models", summary="The adapters, and the base")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name) for name in generator.policies.names]}

    @app.get("/v1/models/{name:path}", summary="One of them")
    async def model(name: str) -> dict[str, Any]:
        if name not in generator.policies.names:
            raise RequestError(f"There is no model {name[:200]!r}.", 404, "model_not_found", "model")
        return _model(name)

    @app.post("/v1/chat/completions", summary="A reply to a conversation", openapi_extra=chat_description())
    async def chat(request: Request) -> Response:
        try:
            body = await request.body()
        except ClientDisconnect:
            return Response(status_code=499)
        asked = await asyncio.to_thread(read_request, body)
        prepared = await asyncio.to_thread(prepare, asked, generator)
        answer = _Answer(generator, prepared, request)
        if asked.stream:
            events = _events(prepared, answer, asked.stream_options.include_usage)
            return StreamingResponse(events, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        try:
            async for _ in answer.pieces():
                pass
        except ClientGoneError:
            return Response(status_code=499)
        return JSONResponse(prepared.completion(answer.replies))

    _speak_openai(app)
    return app


class _Answer:
    """A request in progress in the generator, as seen from the event loop."""

    def __init__(self, generator: Generator, prepared: Prepared, request: Request) -> None:
        self._request = request
        self._queue: asyncio.Queue[tuple[int, str] | Literal["done", "gone"]] = asyncio.Queue()
        self._cancelled = threading.Event()
        self._loop = asyncio.get_running_loop()
        self.replies: Sequence[Reply] = []
        try:  # before the status is sent
            self._work = generator.submit(
                prepared.turns,
                prepared.prompt,
                prepared.sampling,
                on_text=lambda number, text: self._put((number, text)),
                cancelled=self._cancelled,
                tokenizer=prepared.tokenizer,
            )
        except BusyError as error:
            raise RequestError(
                "Too many requests are waiting for this server's model. Try again later.", 429, "server_busy"
            ) from error
        self._work.add_done_callback(lambda _: self._put("done"))

    def _put(self, item: tuple[int, str] | Literal["done", "gone"]) -> None:
        with contextlib.suppress(RuntimeError):  # the server was stopped in the meantime, and its loop is closed
            self._loop.call_soon_threadsafe(self._queue.put_nowait, item)

    async def pieces(self) -> AsyncIterator[tuple[int, str]]:
        """Yield the number of a choice and its next piece of text; `replies` is set after the last one.

        If the caller leaves this iterator early, generation stops.

        Raises:
            ClientGoneError: the client closed its connection.
        """

        async def watch() -> None:
            while not await self._request.is_disconnected():
                await asyncio.sleep(_LOOK_SECONDS)
            self._queue.put_nowait("gone")

        watcher = asyncio.create_task(watch())
        try:
            while (item := await self._queue.get()) != "done":
                if item == "gone":
                    raise ClientGoneError
                yield item
        finally:
            self._cancelled.set()
            watcher.cancel()
        self.replies = self._work.result()


async def _events(prepared: Prepared, answer: _Answer, count: bool) -> AsyncIterator[str]:
    """The answer as server-sent events."""
    for number in range(len(prepared.turns)):
        yield _event(prepared.first_chunk(number))
    try:
        async for number, text in answer.pieces():
            yield _event(prepared.text_chunk(number, text))
    except ClientGoneError:
        return
    except Exception:  # the status was already sent, so the stream has to report the error
        log.exception("A streamed request failed")
        yield _event(error_body("The server failed while answering.", 500))
        return
    for number, reply in enumerate(answer.replies):
        yield _event(prepared.last_chunk(number, reply))
    if count:
        yield _event(prepared.usage_chunk(answer.replies))
    yield "data: [DONE]\n\n"


def _event(content: dict[str, Any]) -> str:
    return f"data: {json.dumps(content, ensure_ascii=False)}\n\n"


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "qadapter"}


def _speak_openai(app: FastAPI) -> None:
    """Return every error in OpenAI's format."""

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        # The rest of a body that was too long or too slow is not read.
        headers = {"Connection": "close"} if error.status in (408, 413) else {}
        return JSONResponse(error.body(), error.status, headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"][1:])
        return JSONResponse(error_body(f"{where or 'body'}: {first['msg']}", 400, param=where or None), 400)

    @app.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> Response:
        return JSONResponse(error_body(str(error.detail), error.status_code), error.status_code)

    @app.exception_handler(Exception)
    async def failed(_: Request, __: Exception) -> Response:
        return JSONResponse(error_body("The server failed while answering.", 500), 500)
