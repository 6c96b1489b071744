"""An OpenAI-compatible endpoint on this machine whose answers a test decides; for tests only."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# One answer of the server: a status, a body, and seconds to wait before it.
Answer = tuple[int, object, float]


@dataclass(frozen=True)
class Sent:
    """A body with more said about how it is sent.

    Attributes:
        content: the body.
        headers: further headers.
        trickled: the last so many bytes of the whole response are sent one by one, `pause` seconds between them.
    """

    content: object
    headers: dict[str, str] = field(default_factory=dict)
    trickled: int = 0
    pause: float = 0.05


class FakeJudge(ThreadingHTTPServer):
    """An OpenAI-compatible endpoint whose answers a test decides."""

    def __init__(self, answer: Callable[[str, str, int], str | Answer]) -> None:
        self.answer = answer
        self.retry_after: str | None = None
        self.requests: list[dict] = []
        self.keys: list[str | None] = []
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), FakeJudgeHandler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"


class FakeJudgeHandler(BaseHTTPRequestHandler):
    server: FakeJudge
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.requests.append(body)
            self.server.keys.append(self.headers.get("Authorization"))
            number = len(self.server.requests)
        asked = body["messages"][1]["content"]
        first, second = (re.search(rf"<reply {x}>\n(.*?)\n</reply {x}>", asked, re.S).group(1) for x in "AB")
        answer = self.server.answer(first, second, number)
        if isinstance(answer, str):
            message = {"choices": [{"message": {"content": answer}}]}
            answer = (200, {**message, "usage": {"prompt_tokens": 100, "completion_tokens": 10}}, 0.0)
        status, content, delay = answer
        time.sleep(delay)
        sent = content if isinstance(content, Sent) else Sent(content)
        data = sent.content.encode() if isinstance(sent.content, str) else json.dumps(sent.content).encode()
        headers = {"Content-Length": str(len(data)), **sent.headers}
        if self.server.retry_after:
            headers["Retry-After"] = self.server.retry_after
        status = status if self.path == "/v1/chat/completions" else 418
        lines = [f"HTTP/1.1 {status} ?", *(f"{name}: {value}" for name, value in headers.items())]
        response = "\r\n".join(lines).encode() + b"\r\n\r\n" + data
        at_once = len(response) - sent.trickled
        try:
            self.wfile.write(response[:at_once])
            for byte in response[at_once:]:
                time.sleep(sent.pause)
                self.wfile.write(bytes([byte]))
        except (BrokenPipeError, ConnectionResetError):
            pass  # the client gave up waiting

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def serving(answer: Callable[[str, str, int], str | Answer]) -> Iterator[FakeJudge]:
    """A server that is up inside the block; `answer` gets both replies and the request's number."""
    server = FakeJudge(answer)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


def longer(first: str, second: str, _: int) -> str:
    """An answer for which the longer reply is the better one."""
    return "Longer is better. " + ("[[A]]" if len(first) > len(second) else "[[B]]")
