"""A server that repeats the secret that it was sent: in a reason phrase, a redirect, an ETag. Nothing keeps it."""

from __future__ import annotations

import http.server
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from qadapter.errors import QAdapterError
from qadapter.files import shown as module
from qadapter.preferences.download import fetch

CANARY = "pa55word-of-the-test"


class _Repeats(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        token = self.path.rpartition("=")[2]
        if self.path.startswith("/reason"):
            self.send_response(404, f"no such token {token}")
        elif self.path.startswith("/moved"):
            self.send_response(302)
            self.send_header("Location", f"/reason?again={token}")
        else:
            self.send_response(200)
            self.send_header("ETag", f'"{token}"')
        self.send_header("Content-Length", "2")
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""


@pytest.fixture
def address(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(module, "_filled", {})
    monkeypatch.setenv("QADAPTER_T", CANARY)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Repeats) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize("place", ["reason", "moved"])
def test_an_error_does_not_repeat_it(address: str, place: str, tmp_path: Path) -> None:
    with pytest.raises(QAdapterError, match=r"404 no such token \$\{QADAPTER_T\}") as refused:
        fetch(f"{address}/{place}?t=${{QADAPTER_T}}", tmp_path)
    assert CANARY not in str(refused.value)


def test_the_note_of_a_download_does_not_keep_it(address: str, tmp_path: Path) -> None:
    copy = fetch(f"{address}/file.json?t=${{QADAPTER_T}}", tmp_path)
    assert copy.read_bytes() == b"{}"
    files = list(tmp_path.rglob("*"))
    assert len(files) == 2  # the copy and its note
    assert not any(CANARY in file.read_text() or CANARY in file.name for file in files)
