"""The Prefect server of a command: an existing one that knows the auth string, or a temporary one."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from flows.prefect_host.access import (
    AUTH_VARIABLE,
    SERVER_AUTH_VARIABLE,
    Standing,
    api_url,
    auth_string,
    not_ours,
    prefect_home,
    standing,
    wait_for_answer,
)
from flows.prefect_host.server_process import command
from qadapter.errors import QAdapterError
from qadapter.files.private import keep_private, private_folder
from qadapter.files.shown import shown

_ROOT = Path(__file__).resolve().parents[2]
_START_SECONDS = 90.0  # a first start creates the database, on two busy cores
_STOP_SECONDS = 5.0
_LOG = "temporary-server.log"
_LARGEST_LOG = 2**20  # bytes; a log above that begins anew
_LOGGER = logging.getLogger(__name__)


@contextmanager
def prefect_server() -> Iterator[None]:
    """`starting_server` for a block that needs it from its first line."""
    with starting_server() as ready:
        ready()
        yield


@contextmanager
def starting_server() -> Iterator[Callable[[], None]]:
    """Use the configured or running server within the block, or start a temporary one.

    A temporary server may still be starting when the block begins: call the yielded function before the server is
    needed. Its address is put into the environment for worker processes (`parallel: 2`). Each of them would otherwise
    start its own, after searching for that of `make serve` for a minute.

    Raises:
        QAdapterError: MLflow's server does not answer; the server that `PREFECT_API_URL` names does not answer or does
            not know the auth string; or a temporary one did not start.
    """
    keep_private()
    _wait_for_mlflow()
    home = private_folder(prefect_home(_ROOT))
    named = os.environ.get("PREFECT_API_URL")
    url = api_url(_ROOT)
    found = standing(url, home)
    if named:
        usable(url, home, found)
    elif found is Standing.FOREIGN:
        _LOGGER.warning("%s This run uses a temporary server.", not_ours(url))
    if found in (Standing.OURS, Standing.REMOTE):
        with _environment(_credentials(url, home, found)):
            yield lambda: None
        return
    with _temporary_server(home) as ready:
        yield ready


def _wait_for_mlflow() -> None:
    """Wait up to a minute for MLflow's server, if one is configured, before a flow run starts that would fail.

    Raises:
        QAdapterError: it does not answer, or refuses the request.
    """
    if not os.environ.get("MLFLOW_TRACKING_URI", "").startswith("http"):
        return  # before the imports, which take seconds
    from tasks.stages.context import workspace
    from tasks.tracking.store import MlflowStore
    from tasks.tracking.tracker import Tracker

    tracker = Tracker.for_project(workspace())
    MlflowStore(tracker.uri, tracker.artifact_root).call("search_experiments", max_results=1)


def usable(url: str, home: Path, found: Standing | None = None, *, otherwise: str = "") -> Standing:
    """Require a usable server at an address, and return its kind.

    Args:
        url: the address of the API.
        home: Prefect's home folder.
        found: the result of `standing`, if it is already known.
        otherwise: what the user can do without a server, for the message.

    Raises:
        QAdapterError: no server answers, or it does not know the auth string.
    """
    found = found or standing(url, home)
    if found is Standing.ABSENT:
        raise QAdapterError(
            f"No Prefect server answers at {shown(url)}. Start it (`make serve`), or correct or unset PREFECT_API_URL. "
            f"{otherwise}".rstrip()
        )
    if found is Standing.FOREIGN:
        raise QAdapterError(not_ours(shown(url)))
    return found


@contextmanager
def server_access(otherwise: str = "") -> Iterator[str]:
    """The address of the running server, with the auth string in the environment, for commands that only query it.

    Args:
        otherwise: what the user can do without a server, for the message.

    Raises:
        QAdapterError: as `usable` does.
    """
    url, home = api_url(_ROOT), prefect_home(_ROOT)
    with _environment(_credentials(url, home, usable(url, home, otherwise=otherwise))):
        yield url


def _credentials(url: str, home: Path, found: Standing) -> dict[str, str]:
    """The environment of clients; the generated auth string is for servers of this machine only."""
    return {"PREFECT_API_URL": url} | ({AUTH_VARIABLE: auth_string(home)} if found is Standing.OURS else {})


@contextmanager
def _temporary_server(home: Path) -> Iterator[Callable[[], None]]:
    auth = auth_string(home)
    with _started(home, auth) as (url, ready), _environment({"PREFECT_API_URL": url, AUTH_VARIABLE: auth}):
        logs = logging.getLogger("prefect.flow_runs")
        logs.addFilter(_no_link)
        try:
            yield ready
        finally:
            _drain()
            logs.removeFilter(_no_link)


def _drain() -> None:
    """Send pending logs and events, including the log of a failed run."""
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    APILogWorker.drain_all(timeout=10)
    EventsWorker.drain_all(timeout=10)


@contextmanager
def _started(home: Path, auth: str) -> Iterator[tuple[str, Callable[[], None]]]:
    """A temporary server process on a free port. The port is bound here, so that no other process can take it."""
    # Prefect's server writes a traceback for each write that it repeats; the run's own output is for its user.
    log = home / _LOG
    elsewhere = None if Path.cwd() == _ROOT else Path.cwd()
    mode = "wb" if log.is_file() and log.stat().st_size > _LARGEST_LOG else "ab"
    with socket.create_server(("127.0.0.1", 0)) as listener, log.open(mode) as said:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
        process = subprocess.Popen(
            command(parent=os.getpid(), listener=listener.fileno(), temporary=True, settings_of=elsewhere),
            env={
                **os.environ,
                "PREFECT_HOME": str(home),
                "PREFECT_API_URL": url,
                AUTH_VARIABLE: auth,
                SERVER_AUTH_VARIABLE: auth,
            },
            cwd=_ROOT,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            pass_fds=[listener.fileno()],
            start_new_session=True,  # Ctrl-C ends the run, which then still reports its state
        )

    def ready() -> None:
        if wrong := wait_for_answer(process, url, home, _START_SECONDS):
            raise QAdapterError(f"The temporary Prefect server {wrong}; its log is {log}.")

    try:
        yield url, ready
    finally:
        process.terminate()
        try:
            process.wait(timeout=_STOP_SECONDS)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextmanager
def _environment(changes: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables within the block, also for threads that send logs and events."""
    from prefect.context import refresh_global_settings_context

    before = {name: os.environ.get(name) for name in changes}
    os.environ |= changes
    refresh_global_settings_context()
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                with contextlib.suppress(KeyError):
                    del os.environ[name]
            else:
                os.environ[name] = value
        refresh_global_settings_context()


def _no_link(record: logging.LogRecord) -> bool:
    """Drop Prefect's "View at" messages: a temporary server has no pages."""
    return not record.getMessage().startswith("View at ")
