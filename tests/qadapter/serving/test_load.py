"""The server attacked over loopback: what a client can cost it in bytes, seconds, connections and lines of log."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import httpx
import psutil
import pytest

from qadapter.serving.app import create_app
from qadapter.serving.errors import RequestError
from qadapter.serving.generator import Generator
from qadapter.serving.limits import MOST_BYTES, Sparing
from qadapter.serving.policies import ServedPolicies
from qadapter.serving.protocol import prepare, read_request
from tests.qadapter.serving.test_serving import save_adapters
from tests.support.listening import listening

KEY = "not-a-secret"
AUTH = {"Authorization": f"Bearer {KEY}"}
MOST = 24


@pytest.fixture(scope="module")
def generator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Generator]:
    root = tmp_path_factory.mktemp("load")
    save_adapters(root)
    made = Generator(ServedPolicies.load({"residual": root / "residual"}, root / "base"))
    yield made
    made.close()


@pytest.fixture(scope="module")
def url(generator: Generator) -> Iterator[str]:
    limits: dict[str, Any] = {"most_connections": MOST, "header_seconds": 1.0}
    with listening(create_app(generator, KEY), **limits) as address:
        yield address


def place(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").split(":")
    return host, int(port)


def asked(url: str) -> httpx.Response:
    body = {"model": "base", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1}
    return httpx.post(f"{url}/v1/chat/completions", json=body, headers=AUTH, timeout=20)


def send(url: str, size: int, **headers: str) -> tuple[int, float]:
    """Bytes that the server took of a body without an end, or of `size`, and its status."""
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {url.removeprefix('http://')}\r\n{lines}\r\n".encode()
    sent, answer, chunk = 0, b"", b"x" * 65536
    chunked = "Transfer-Encoding" in headers
    piece = b"%x\r\n%s\r\n" % (len(chunk), chunk) if chunked else chunk
    with socket.create_connection(place(url), timeout=10) as connection:
        connection.sendall(head)
        try:
            while sent < size:
                connection.sendall(piece)
                sent += len(chunk)
        except OSError:  # it has closed the connection
            pass
        try:
            answer = connection.recv(65536)
        except OSError:
            return sent, 0
    return sent, int(answer.split(b" ")[1]) if answer else 0


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Content-Length": str(300 * 2**20)}, 401),
        ({"Content-Length": str(300 * 2**20), **AUTH}, 413),
        ({"Transfer-Encoding": "chunked"}, 401),
        ({"Transfer-Encoding": "chunked", **AUTH}, 413),
        ({"Content-Length": "9" * 17, **AUTH}, 413),
    ],
)
def test_300_mib_are_neither_read_nor_held(headers: dict[str, str], status: int, url: str) -> None:
    process = psutil.Process()
    before = process.memory_info().rss
    started = time.monotonic()
    sent, seen = send(url, 300 * 2**20, **headers)
    assert time.monotonic() - started < 10
    assert process.memory_info().rss - before < 64 * 2**20
    assert sent < 64 * 2**20  # what the sockets hold, and what is thrown away
    assert seen in (status, 0)  # 0: the connection was closed before the answer could be read
    assert asked(url).status_code == 200


def test_a_refused_client_can_read_why(url: str) -> None:
    for headers, status, size in (({}, 401, MOST_BYTES // 2), (AUTH, 413, MOST_BYTES + 1)):
        answer = httpx.post(f"{url}/v1/chat/completions", content=b"x" * size, headers=headers)
        assert (answer.status_code, answer.headers["connection"]) == (status, "close")
        assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_a_long_prompt_is_refused_before_it_is_tokenised(url: str) -> None:
    body = {"model": "base", "messages": [{"role": "user", "content": "x y " * 900_000}]}
    started = time.monotonic()
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, headers=AUTH, timeout=20)
    assert time.monotonic() - started < 2
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert "3600000 characters" in answer.json()["error"]["message"]


def test_stop_texts_are_bounded(url: str) -> None:
    body = {"model": "base", "messages": [{"role": "user", "content": "a"}]}
    for stop in ("x" * 2**20, ["x" * 999] * 17, [""]):
        started = time.monotonic()
        answer = httpx.post(f"{url}/v1/chat/completions", json={**body, "stop": stop}, headers=AUTH, timeout=20)
        assert answer.status_code == 400
        assert "stop" in answer.json()["error"]["message"]
        assert time.monotonic() - started < 2


def test_half_open_connections_do_not_keep_others_out(url: str, caplog: pytest.LogCaptureFixture) -> None:
    with ExitStack() as held:
        for number in range(6 * MOST):
            one = held.enter_context(socket.create_connection(place(url), timeout=10))
            one.sendall(b"" if number % 2 else b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nX-")
        assert asked(url).status_code == 200
    assert len(caplog.records) <= 10  # of 120 that were dropped
    assert "Connections are dropped" in caplog.text


def test_headers_and_bodies_that_never_end_are_ended(generator: Generator) -> None:
    app = create_app(generator, KEY)
    with listening(app, header_seconds=0.5) as url:
        started = time.monotonic()
        with socket.create_connection(place(url), timeout=10) as slow:
            slow.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n")
            assert slow.recv(100) == b""
        assert 0.3 < time.monotonic() - started < 5
        with socket.create_connection(place(url), timeout=10) as again:  # the second request of a connection too
            again.sendall(b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
            answer = b""
            while b"ok" not in answer:
                answer += again.recv(1000)
            again.sendall(b"GET /hea")
            assert again.recv(100) == b""
        assert asked(url).status_code == 200


def test_a_body_that_never_ends_is_answered(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    from qadapter.serving import limits

    monkeypatch.setattr(limits.Guard.__init__, "__defaults__", (MOST_BYTES, 0.5))
    with listening(create_app(generator, KEY)) as url, socket.create_connection(place(url), timeout=10) as slow:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        slow.sendall(f"{head}Content-Length: 100\r\n\r\n{{".encode())
        answer = b""
        while piece := slow.recv(4096):  # until it closes
            answer += piece
    assert b"408" in answer.split(b"\r\n")[0]
    assert b"did not arrive within 0.5 seconds" in answer


def test_a_queue_that_is_full_says_so(generator: Generator, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = 0
    while generator._waiting.acquire(blocking=False):
        taken += 1
    try:
        answer = asked(url)
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "server_busy")
    finally:
        for _ in range(taken):
            generator._waiting.release()
    assert asked(url).status_code == 200


def test_the_log_says_how_much_it_left_out() -> None:
    sparing = Sparing(most=2, seconds=0.2)
    records = [logging.LogRecord("a", logging.WARNING, "f", 1, "bad %s", (i,), None) for i in range(100)]
    assert [sparing.filter(record) for record in records[:99]] == [True, True] + [False] * 97
    time.sleep(0.25)
    assert sparing.filter(records[99])
    assert records[99].getMessage() == "bad 99 (97 similar ones omitted)"


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"[" * 100_000,
        b'{"model": "base", "messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"model": "base", "messages": [{"role": "user", "content": "a"}], "temperature": NaN}',
        b'{"model": "base", "messages": [{"role": "user", "content": "a"}], "seed": ' + b"9" * 10_000 + b"}",
        b'{"model": "base", "messages": [{"role": "user", "content": "a"}], "max_tokens": 1e400}',
        b"\xff\xfe{}",
        b'{"model": "base", "messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"x": '
        + b"[" * 5000,
    ],
)
def test_malformed_bodies_are_refused(body: bytes, generator: Generator) -> None:
    with pytest.raises(RequestError) as caught:
        prepare(read_request(body), generator)
    assert caught.value.status == 400
