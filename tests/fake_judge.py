"""An OpenAI-compatible endpoint on this machine whose answers a test decides; for tests only."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# One answer of the server: a status, a body, and seconds to wait before it.
Answer = tuple[int, object, float]


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
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        try:
            self.send_response(status if self.path == "/v1/chat/completions" else 418)
            self.send_header("Content-Length", str(len(data)))
            if self.server.retry_after:
                self.send_header("Retry-After", self.server.retry_after)
            self.end_headers()
            self.wfile.write(data)
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
