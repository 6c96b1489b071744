"""What an endpoint must not be able to do, and what two runs with one file of answers must not do to each other."""

from __future__ import annotations

import contextlib
import gzip
import http.server
import json
import multiprocessing
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from qadapter.judging.answer_cache import AnswerCache
from qadapter.judging.endpoint_client import LARGEST_RESPONSE, JudgeClient, UnansweredError
from qadapter.judging.endpoint_settings import EndpointSettings

QUESTION = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]


@contextlib.contextmanager
def answering(body: bytes, headers: dict[str, str]) -> Iterator[tuple[str, list[dict[str, str]]]]:
    """A server that sends the same bytes to each request; yields its address and the headers it was sent."""
    seen: list[dict[str, str]] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            seen.append({name.lower(): value for name, value in self.headers.items()})
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(200)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name, value)
            self.end_headers()
            with contextlib.suppress(ConnectionError):
                self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1", seen
    finally:
        server.shutdown()
        server.server_close()


def ask(url: str, **changes: object) -> JudgeClient:
    """A client whose one question got no answer."""
    settings = EndpointSettings.model_validate(
        {"url": url, "model": "m", "api_key_variable": None, "retries": 0, "timeout": 20, **changes}
    )
    with contextlib.closing(JudgeClient(settings)) as client, pytest.raises(UnansweredError):
        client.ask(QUESTION, lambda _: None, "?")
    return client


def bomb(size: int) -> bytes:
    """gzip of so many spaces, without an end: one block of it, which refers to nothing before it, again and again."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    block = b" " * 2**20
    first, other = (packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH) for _ in range(2))
    return first + other * (size // len(block) - 1)


@pytest.mark.slow
def test_a_small_answer_that_unpacks_to_gigabytes_is_refused() -> None:
    """1.5 MB that would become 1.5 GB: the process grows by no more than the limits of one response."""
    body = bomb(1536 * 2**20)
    assert len(body) < 2 * 2**20
    with answering(body, {"Content-Encoding": "gzip"}) as (url, _):
        before = psutil.Process().memory_info().rss
        client = ask(url)
        grown = psutil.Process().memory_info().rss - before
    assert client.usage.last_error == f"server error: the response unpacks to more than {LARGEST_RESPONSE} bytes"
    assert grown < 100 * 2**20


@pytest.mark.parametrize(
    ("encoding", "body", "error"),
    [
        ("", b" " * (LARGEST_RESPONSE + 1), f"the response is larger than {LARGEST_RESPONSE} bytes"),
        ("gzip, gzip", gzip.compress(gzip.compress(b"{}", mtime=0)), "compressed as 'gzip, gzip'"),
        ("br", b"x", "compressed as 'br'"),
    ],
)
def test_a_response_beyond_what_was_asked_for_is_refused(encoding: str, body: bytes, error: str) -> None:
    with answering(body, {"Content-Encoding": encoding} if encoding else {}) as (url, _):
        assert error in ask(url).usage.last_error


def test_a_packed_answer_is_read() -> None:
    answer = json.dumps({"choices": [{"message": {"content": "fine"}}]}).encode()
    with answering(gzip.compress(answer), {"Content-Encoding": "gzip"}) as (url, _):
        assert ask(url).usage.last_error == "nonsense: 'fine'"


def test_nothing_of_the_environment_goes_to_the_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client library would send its own organisation, project, keys and custom headers to any server."""
    for name in ("OPENAI_API_KEY", "OPENAI_ADMIN_KEY", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.setenv(name, "of-the-user")
    monkeypatch.setenv("OPENAI_CUSTOM_HEADERS", "X-Team: of-the-user")
    monkeypatch.setenv("OPENAI_BASE_URL", "http://127.0.0.1:9/of-the-user")
    with answering(b"{}", {}) as (url, seen):
        ask(url)
        monkeypatch.setenv("QADAPTER_SOME_KEY", "sk-1")
        ask(url, api_key_variable="QADAPTER_SOME_KEY")
    assert "of-the-user" not in str(seen)
    assert ["authorization" in headers for headers in seen] == [False, False, True, True]
    assert seen[-1]["authorization"] == "Bearer sk-1"
    expected = {"host", "accept", "accept-encoding", "connection", "content-length", "content-type", "user-agent"}
    assert {*seen[0]} == expected


def write_answers(file: Path, name: str, ready: multiprocessing.synchronize.Barrier) -> None:
    cache = AnswerCache(file)
    ready.wait()
    for number in range(200):
        cache.put(f"{name}{number}", f"{name} answers {number} " + "x" * (number * 50))


@pytest.mark.slow
def test_two_processes_add_answers_to_one_file(tmp_path: Path) -> None:
    """Lines up to 10,000 characters, written at the same time: none is lost, none is torn."""
    file = tmp_path / "answers.jsonl"
    file.write_text('{"key": "torn", "te')  # a crash before
    reader = AnswerCache(file)
    context = multiprocessing.get_context("spawn")  # a fork inherits threads and locks of other tests
    ready = context.Barrier(2)
    writers = [context.Process(target=write_answers, args=(file, name, ready)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    lines = file.read_text().splitlines()
    assert lines[0] == '{"key": "torn", "te'
    rows = [json.loads(line) for line in lines[1:]]
    assert {row["key"] for row in rows} == {f"{name}{number}" for name in "ab" for number in range(200)}
    assert all(row["text"].startswith(f"{row['key'][0]} answers {row['key'][1:]} ") for row in rows)
    assert reader.get("b199") == next(row["text"] for row in rows if row["key"] == "b199")  # read after it was opened
    assert reader.get("c0") is None
    assert (file.with_name("answers.jsonl.lock").stat().st_mode & 0o777) == 0o600
