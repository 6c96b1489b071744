"""A real browser without a window: what a page's scripts may do, the browser decides."""

from __future__ import annotations

import html
import http.server
import re
import shutil
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

_NAMES = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


def browser() -> str:
    """The browser that is installed; skips where there is none."""
    for name in _NAMES:
        if path := shutil.which(name):
            return path
    pytest.skip(f"no browser is installed; this test needs one of {', '.join(_NAMES)}")


def opened(url: str, profile: Path, *, names: str = "") -> str:
    """Open a page, let its scripts and requests end, and return what it shows: the text of its `<pre>` or body.

    Args:
        url: of the page.
        profile: folder for the browser's own files.
        names: rules for names, as `MAP evil.test 127.0.0.1`.
    """
    command = [browser(), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    command += [f"--user-data-dir={profile}", "--virtual-time-budget=20000", "--dump-dom"]
    command += [f"--host-resolver-rules={names}"] if names else []
    done = subprocess.run([*command, url], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr[-2000:]
    text = re.sub(r"(?s)<(script|style).*?</\1>", "", done.stdout)
    found = re.search(r"(?s)<pre[^>]*>(.*?)</pre>", text)
    return html.unescape(found[1] if found else re.sub(r"<[^>]*>", " ", text)).strip()


@contextmanager
def page_of_another_origin(text: str) -> Iterator[str]:
    """A web server on another port, with one page; yields its address."""

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
