"""The HTTP side: OpenAI's routes over a `Generator`."""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import logging
import threading
from collections.abc import AsyncIterator, Collection, Sequence
from typing import Any, Literal

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from qadapter.serving.generator import Generator, Reply
from qadapter.serving.protocol import ChatRequest, Prepared, RequestError, error_body, prepare

log = logging.getLogger(__name__)
_LOOK_SECONDS = 0.2  # how often it is looked whether a client is still there


class ClientGoneError(Exception):
    """Nobody waits for the answer any more."""


class _OnlyHosts:
    """Refuses requests whose `Host` is not one of some names, whatever they ask for.

    A web page may give its own name the address 127.0.0.1 (DNS rebinding), and then the user's browser takes this
    server for the page's own; the requests still carry the page's name. Starlette's `TrustedHostMiddleware` does the
    same without saying, in OpenAI's form, what to do.
    """

    def __init__(self, app: ASGIApp, hosts: Collection[str]) -> None:
        self._app, self._hosts = app, {host.lower() for host in hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or (name := host_name(Headers(scope=scope).get("host", ""))) in self._hosts:
            await self._app(scope, receive, send)
            return
        message = (
            f"This server does not answer to the name {name[:200]!r}. Start it with QADAPTER_ALLOWED_HOSTS set to the "
            "names, separated by commas, under which it may be asked."
        )
        await JSONResponse(error_body(message, 403, "host_not_allowed"), 403)(scope, receive, send)


def host_name(header: str) -> str:
    """The name or address in a `Host` header, lower case, without port, brackets and a final dot."""
    text = header.strip().lower()
    name = text[1:].partition("]")[0] if text.startswith("[") else text.partition(":")[0]
    return name.removesuffix(".")


def create_app(generator: Generator, api_key: str | None = None, hosts: Collection[str] | None = None) -> FastAPI:
    """The server's application.

    Args:
        generator: what answers.
        api_key: bearer token that every request below `/v1` must carry; None: none is asked for.
        hosts: names and addresses under which it may be asked (the `Host` of a request, without port); None: any.
    """
    app = FastAPI(title="Q-Adapter", docs_url=None, redoc_url=None, openapi_url=None)
    if hosts is not None:
        app.add_middleware(_OnlyHosts, hosts=hosts)

    async def authorise(request: Request) -> None:
        given = request.headers.get("authorization", "").encode()
        if api_key is not None and not hmac.compare_digest(given, f"Bearer {api_key}".encode()):
            raise RequestError("This server asks for a bearer token.", 401, "invalid_api_key")

    allowed = [Depends(authorise)]

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models", dependencies=allowed)
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model(name) for name in generator.policies.names]}

    @app.get("/v1/models/{name:path}", dependencies=allowed)
    async def model(name: str) -> dict[str, Any]:
        if name not in generator.policies.names:
            raise RequestError(f"There is no model {name!r}.", 404, "model_not_found", "model")
        return _model(name)

    @app.post("/v1/chat/completions", dependencies=allowed)
    async def chat(body: ChatRequest, request: Request) -> Response:
        prepared = await asyncio.to_thread(prepare, body, generator)
        answer = _Answer(generator, prepared, request)
        if body.stream:
            events = _events(prepared, answer, body.stream_options.include_usage)
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
    """One request under way in the generator, as the event loop sees it."""

    def __init__(self, generator: Generator, prepared: Prepared, request: Request) -> None:
        self._generator, self._prepared, self._request = generator, prepared, request
        self.replies: Sequence[Reply] = []

    async def pieces(self) -> AsyncIterator[tuple[int, str]]:
        """Number of the choice and its next piece of text; `replies` is filled behind the last one.

        The generator is told to stop when this iterator is left early.

        Raises:
            ClientGoneError: the client closed its connection.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[tuple[int, str] | Literal["done", "gone"]] = asyncio.Queue()
        cancelled = threading.Event()

        def put(item: tuple[int, str] | Literal["done"]) -> None:
            with contextlib.suppress(RuntimeError):  # the server was stopped meanwhile: its loop is closed
                loop.call_soon_threadsafe(queue.put_nowait, item)

        async def watch() -> None:
            while not await self._request.is_disconnected():
                await asyncio.sleep(_LOOK_SECONDS)
            queue.put_nowait("gone")

        prepared = self._prepared
        work = self._generator.submit(
            prepared.turns,
            prepared.prompt,
            prepared.sampling,
            on_text=lambda number, text: put((number, text)),
            cancelled=cancelled,
        )
        work.add_done_callback(lambda _: put("done"))
        watcher = asyncio.create_task(watch())
        try:
            while (item := await queue.get()) != "done":
                if item == "gone":
                    raise ClientGoneError
                yield item
        finally:
            cancelled.set()
            watcher.cancel()
        self.replies = work.result()


async def _events(prepared: Prepared, answer: _Answer, count: bool) -> AsyncIterator[str]:
    """The answer as server-sent events."""
    for number in range(len(prepared.turns)):
        yield _event(prepared.first_chunk(number))
    try:
        async for number, text in answer.pieces():
            yield _event(prepared.text_chunk(number, text))
    except ClientGoneError:
        return
    except Exception:  # the status was sent long ago: the stream itself has to say it
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
    """Every error as OpenAI's body, whoever raised it."""

    @app.exception_handler(RequestError)
    async def refused(_: Request, error: RequestError) -> Response:
        return JSONResponse(error.body(), error.status)

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
