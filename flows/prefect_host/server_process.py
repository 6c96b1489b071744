"""A Prefect server as this project runs it: `python -m flows.prefect_host.server_process --port 4200 --parent PID`.

Prefect's own app behind `guard.Guard` and `repeating.Repeating`, with the auth string, its own origins only, private
files, and a life that ends with the process that started it. `prefect server start` has no check of `Host`, and
outlives its parent.
"""

from __future__ import annotations

import argparse
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Thread

from flows.prefect_host.access import SERVER_AUTH_VARIABLE
from flows.prefect_host.guard import Guard, own_origins
from flows.prefect_host.repeating import Repeating
from qadapter.files.imports import importing
from qadapter.files.private import keep_private

SECONDS_TO_END = 5.0
"""Seconds that a server has for an orderly shutdown after its parent has ended; then it exits at once."""

_LOOK_AGAIN_SECONDS = 0.25
_NAME = "flows.prefect_host.server_process"


def command(
    *,
    parent: int,
    host: str = "127.0.0.1",
    port: int | None = None,
    listener: int | None = None,
    temporary: bool = False,
    settings_of: Path | None = None,
) -> list[str]:
    """The command line of a server.

    Args:
        parent: id of the process that starts the server; the server ends with it.
        host, port: the address to listen on; or
        listener: file descriptor of an inherited listening socket.
        temporary: without pages and schedules, like Prefect's own temporary server.
        settings_of: the folder whose Prefect settings count, before those of the project folder.
    """
    where = ["--host", host, "--port", str(port)] if listener is None else ["--listener", str(listener)]
    further = [*(["--temporary"] if temporary else []), *(["--settings-of", str(settings_of)] if settings_of else [])]
    return [sys.executable, "-m", _NAME, *where, "--parent", str(parent), *further]


def end_with(parent: int, stop: Callable[[], None]) -> None:
    """Stop when the parent process ends, even if it is killed.

    Args:
        parent: its process id.
        stop: requests the end of this process; after `SECONDS_TO_END` it exits in any case.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_LOOK_AGAIN_SECONDS)
        stop()
        time.sleep(SECONDS_TO_END)
        os._exit(1)

    Thread(target=watch, daemon=True).start()


def main(arguments: list[str] | None = None) -> int:
    """Serve until stopped, or until the parent has ended."""
    parser = argparse.ArgumentParser(prog="python -m flows.prefect_host.server_process", description=__doc__)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--port", type=int, help="port to listen on")
    where.add_argument("--listener", type=int, help="number of an inherited socket that listens already")
    parser.add_argument("--host", default="127.0.0.1", choices=["127.0.0.1", "::1"], help="(default: %(default)s)")
    parser.add_argument("--parent", type=int, required=True, help="id of the process that it ends with")
    parser.add_argument("--temporary", action="store_true", help="no pages, no schedules")
    parser.add_argument("--settings-of", help="folder whose Prefect settings count")
    given = parser.parse_args(arguments)
    auth = os.environ.get(SERVER_AUTH_VARIABLE)
    if not auth:
        parser.error(f"{SERVER_AUTH_VARIABLE} is not set; no Prefect server is started without an auth string.")
    keep_private()
    if given.settings_of:
        _take_settings_of(given.settings_of)
    try:
        listener = _listener(given)
    except OSError as error:
        parser.error(f"{given.host}:{given.port} cannot be listened on ({error.strerror}).")
    port = int(listener.getsockname()[1])
    os.environ["PREFECT_SERVER_CORS_ALLOWED_ORIGINS"] = ",".join(own_origins(port))
    if given.temporary:
        os.environ |= {"PREFECT__SERVER_EPHEMERAL": "1", "PREFECT_SERVER_UI_ENABLED": "0"}
    _serve(listener, auth, given)
    return 0


def _take_settings_of(folder: str) -> None:
    """Put the settings that Prefect finds in a folder into the environment, where they win over this folder's.

    The process that starts a server could do so too, but would have to import Prefect first, which takes a second.
    """
    here = Path.cwd()
    os.chdir(folder)
    _read_again()
    from prefect.settings import get_current_settings

    os.environ |= get_current_settings().to_environment_variables(exclude_unset=True)
    os.chdir(here)


def _read_again() -> None:
    """Let Prefect read its settings again, if it has: it does so when it is first imported."""
    if "prefect.context" in sys.modules:
        from prefect.context import refresh_global_settings_context

        refresh_global_settings_context()


def _listener(given: argparse.Namespace) -> socket.socket:
    if given.listener is not None:
        return socket.socket(fileno=given.listener)
    family = socket.AF_INET6 if ":" in given.host else socket.AF_INET
    return socket.create_server((given.host, given.port), family=family)


def _serve(listener: socket.socket, auth: str, given: argparse.Namespace) -> None:
    with importing():
        import uvicorn

        _read_again()
        from prefect.server.api.server import create_app
        from prefect.settings import get_current_settings

    settings = get_current_settings().server
    app = create_app(final=True, ephemeral=given.temporary)
    config = uvicorn.Config(
        Guard(Repeating(app), auth=auth),
        lifespan="on",
        log_level="error" if given.temporary else settings.logging_level.lower(),
        timeout_keep_alive=settings.api.keepalive_timeout,
        timeout_graceful_shutdown=int(SECONDS_TO_END),
        ws_ping_interval=settings.api.websocket_ping_interval,
        ws_ping_timeout=settings.api.websocket_ping_timeout,
    )
    server = uvicorn.Server(config)

    def stop() -> None:
        server.should_exit = True

    end_with(given.parent, stop)
    server.run(sockets=[listener])


if __name__ == "__main__":
    sys.exit(main())
