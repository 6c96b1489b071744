"""A server of this project on a free port of loopback, in a thread, for tests only."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from qadapter.serving.server import uvicorn_config


@contextmanager
def listening(app: Any, **changed: Any) -> Iterator[str]:
    """Its address, `http://127.0.0.1:PORT`, while the block runs.

    Args:
        app: of `create_app`.
        changed: attributes of the connections' class, such as `header_seconds`.
    """
    config = uvicorn_config(app)
    config.port = 0
    config.http = type("ChangedConnection", (config.http,), changed)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    deadline = time.monotonic() + 30
    while not server.started:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()
