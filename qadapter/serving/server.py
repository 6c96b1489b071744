"""Serve a base and its adapters with OpenAI's chat API, on this machine only by default (`qadapter serve`).

With QADAPTER_API_KEY set in the environment, every request must carry it as bearer token. On a loopback address the
server answers to the names localhost, 127.0.0.1 and ::1 only, so that no web page can reach it under a name of its own;
QADAPTER_ALLOWED_HOSTS=name,other.name allows more (behind a proxy that keeps the name, in a container), and on any
other address limits the server to those. What requests can say: docs/serving.md.
"""

from __future__ import annotations

import ipaddress
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qadapter.errors import QAdapterError

API_KEY_VARIABLE = "QADAPTER_API_KEY"
HOSTS_VARIABLE = "QADAPTER_ALLOWED_HOSTS"
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}


def serve(
    adapters: dict[str, Path],
    base: str | Path | None = None,
    *,
    dtype: str | None = None,
    quantization: str | None = None,
    revision: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    cors_origins: Sequence[str] = (),
    allow_base_mismatch: bool = False,
) -> None:
    """Load everything and answer until interrupted.

    Args:
        adapters: model name to folder.
        base: folder or hub id; what the first adapter names without it.
        dtype: of the base; as trained without it (see `ServedPolicies.load`).
        quantization: of the base: none, int8 or nf4; as trained without it.
        revision: of a base of the hub; its main branch without it.
        host, port: where to listen; port 0 takes a free one.
        cors_origins: the pages, as `https://name:port`, that may ask from a browser.
        allow_base_mismatch: whether the base may be another one than the adapters were trained on.

    Raises:
        QAdapterError: something cannot be loaded, the address is taken, or the key in the environment is empty or
            can be in no header.
    """
    import socket

    import uvicorn

    from qadapter.serving.app import create_app
    from qadapter.serving.generator import Generator
    from qadapter.serving.policies import ServedPolicies

    key = os.environ.get(API_KEY_VARIABLE)
    if key is not None and not key.strip():
        raise QAdapterError(
            f"{API_KEY_VARIABLE} is set but empty, so no token could be asked for. Give it a value, or unset it to "
            "serve without one."
        )
    if key is not None and (key != key.rstrip() or not (key.isascii() and key.isprintable())):
        raise QAdapterError(
            f"{API_KEY_VARIABLE} has characters that no request can carry, so that every token would be wrong: a line "
            "break or blank at its end (as in a secret that `echo` wrote), or others than printable ASCII. Set it "
            "without them."
        )
    for origin in cors_origins:
        if not re.fullmatch(r"https?://[^/\s*?#@]+", origin):
            raise QAdapterError(
                f"--cors-origin {origin!r} is no origin. Give scheme, name and port of the page, and nothing behind: "
                "https://chat.example or http://localhost:3000."
            )
    try:  # before the model is loaded
        listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise QAdapterError(f"{host}:{port} cannot be listened on ({error.strerror}). Give another --port.") from error
    with listener:
        policies = ServedPolicies.load(adapters, base, dtype, quantization, revision, allow_base_mismatch)
        generator = Generator(policies)
        where = f"http://{f'[{host}]' if ':' in host else host}:{listener.getsockname()[1]}"
        if not _is_loopback(host) and key is None:
            _say(f"warning: any client can use this server at {host}; set {API_KEY_VARIABLE} to require a token")
        _say(f"Serving {', '.join(policies.names)} at {where}/v1   Stop: Ctrl-C")
        _say(f"precision {policies.policy.dtype}, temperature 1 where a request names none; fields: {where}/docs")
        app = create_app(generator, key, allowed_hosts(host), cors_origins=cors_origins)
        config = uvicorn_config(app)
        try:
            uvicorn.Server(config).run(sockets=[listener])
        finally:
            generator.close()


def uvicorn_config(app: Any) -> Any:
    """uvicorn with this server's limits on connections."""
    import uvicorn

    from qadapter.serving.limits import BACKLOG, BoundedConnection

    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        http=BoundedConnection,
        ws="none",
        backlog=BACKLOG,
        timeout_keep_alive=5,
        h11_max_incomplete_event_size=32 * 1024,
        server_header=False,
    )


def allowed_hosts(host: str) -> set[str] | None:
    """The names under which a server that listens on `host` may be asked; None: any.

    They are those of `QADAPTER_ALLOWED_HOSTS`, and of this machine itself. Without the variable only a server on
    loopback is limited: on other addresses, the names that clients use are unknown here.
    """
    given = {name.strip().lower() for name in os.environ.get(HOSTS_VARIABLE, "").split(",")} - {""}
    return given | _LOOPBACK | {host.lower()} if given or _is_loopback(host) else None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
