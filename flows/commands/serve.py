"""`qadapter up` (`make serve`): everything that `prefect deployment run` needs on this machine, until Ctrl-C.

Runs of deployments need a server and a worker. This command starts a server if none answers at the configured address,
creates the work pool, deploys everything in `prefect.yaml`, starts a worker and waits. An existing server is used only
if it knows this project's auth string (`flows/prefect_host/access.py`).
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import IO, TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import psutil
import typer
import yaml

from flows.prefect_host import server_process, worker_process
from flows.prefect_host.access import (
    AUTH_FILE,
    AUTH_VARIABLE,
    SERVER_AUTH_VARIABLE,
    Standing,
    api_url,
    auth_string,
    is_loopback,
    not_ours,
    prefect_home,
    standing,
    wait_for_answer,
)
from qadapter.command.app import CommandFailedError
from qadapter.errors import QAdapterError
from qadapter.files.artifacts import read_json, write_json
from qadapter.files.private import close_to_others, keep_private, private_folder

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

PROJECT_ROOT = Path(__file__).resolve().parents[2]
_START_SECONDS = 180  # the first start creates the database, which takes long on a busy laptop
_STOP_SECONDS = 20
_QUICK_DEATH_SECONDS = 10  # a process killed sooner than this is not started again


_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _StopRequest(BaseException):
    """A request to end this command (Ctrl-C, TERM or HUP)."""


class PartError(RuntimeError):
    """A server or worker did not start or died; the message gives the path of its log."""


def serve(root: Path, *, limit: int = 1) -> None:
    """Start server, work pool, deployments and worker; when stopped, end them and return.

    A server that was already running is used if it knows the auth string, and keeps running. A server or worker started
    here is restarted if it is killed, and ends with this process, even if that is killed.

    Args:
        root: the project folder, with `prefect.yaml`, `prefect.toml` and, below it, Prefect's database.
        limit: number of flow runs that the worker executes at the same time. On a laptop, more than one slows all down.

    Raises:
        QAdapterError: a server cannot be started at the configured address, or does not know the auth string.
        PartError: a part did not start or died.
    """
    url = api_url(root)
    keep_private()
    home = private_folder(prefect_home(root))
    close_to_others(home, thorough=True)
    found, auth = standing(url, home), auth_string(home)
    if found is Standing.FOREIGN:
        raise QAdapterError(not_ours(url))
    if found is Standing.ABSENT:
        host, port = _address(url)
    own = {
        "DO_NOT_TRACK": "1",
        # The worker asks the server beside it for work; Prefect's 10 s are meant for a server that many share.
        "PREFECT_WORKER_QUERY_SECONDS": "2",
    }
    environment = own | os.environ | {"PREFECT_API_URL": url, "PREFECT_HOME": str(home)}
    if is_loopback(url):
        environment[AUTH_VARIABLE] = auth
    pool = _pool_name(root)
    log = home / "server.log"
    children: dict[str, subprocess.Popen[bytes]] = {}
    started: dict[str, float] = {}

    def start_server() -> None:
        words = server_process.command(parent=os.getpid(), host=host, port=port)
        with log.open("ab") as stream:
            children["server"] = _start(root, environment | {SERVER_AUTH_VARIABLE: auth}, words, output=stream)
        started["server"] = time.monotonic()
        if wrong := wait_for_answer(children["server"], url, home, _START_SECONDS):
            raise PartError(f"The Prefect server {wrong}. See {log}.")

    def start_worker() -> None:
        # The worker's output is the runs' own log: it belongs on the screen.
        words = worker_process.command("worker", "start", "--pool", pool, "--limit", str(limit), parent=os.getpid())
        children["worker"] = _start(root, environment, words)
        started["worker"] = time.monotonic()

    start = {"server": start_server, "worker": start_worker}
    with _stopping_on_signals(), _stopping(children):
        if found is Standing.ABSENT:
            _say(f"Prefect server: starting at {url} (log: {log})")
            start_server()
        else:
            _say(f"Prefect server: using the one that answers at {url}")
        with _client(url, environment.get(AUTH_VARIABLE)) as client:
            _close_dead_runs(client, url, no_worker_is_up="server" in children)
            if not _has_pool(client, pool):
                _run(root, environment, "work-pool", "create", pool, "--type", "process")
            _deploy(root, environment, client, home)
        start_worker()
        _say(_next_steps(root, url, home))
        while True:
            while all(child.poll() is None for child in children.values()):
                time.sleep(0.5)
            name, child = next((name, child) for name, child in children.items() if child.poll() is not None)
            if child.returncode >= 0 or time.monotonic() - started[name] < _QUICK_DEATH_SECONDS:
                break
            # Killed by the system (out of memory) or by hand. Flow runs are separate processes and continue without
            # their worker; without a server they wait for the next one.
            _say(f"The Prefect {name} was killed (signal {-child.returncode}) and is started again.")
            start[name]()
        where = log if name == "server" else "Its output above"
        raise PartError(f"The Prefect {name} ended unexpectedly with code {child.returncode}. {where} shows why.")


def _client(url: str, auth: str | None) -> SyncPrefectClient:
    """Prefect's client for the server at an address. A key for a server on another machine is the user's setting."""
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_API_KEY

    return SyncPrefectClient(url, auth_string=auth or PREFECT_API_AUTH_STRING.value(), api_key=PREFECT_API_KEY.value())


def _has_pool(client: SyncPrefectClient, pool: str) -> bool:
    from prefect.exceptions import ObjectNotFound

    try:
        client.read_work_pool(pool)
    except ObjectNotFound:
        return False
    return True


def _close_dead_runs(client: SyncPrefectClient, url: str, *, no_worker_is_up: bool) -> None:
    """Report runs as crashed whose process on this machine has ended."""
    from flows.prefect_host.dead_runs import close_dead_runs

    if is_loopback(url) and (dead := close_dead_runs(client, no_worker_is_up=no_worker_is_up)):
        _say(f"Reported as crashed, because their process has ended: {', '.join(dead)}")


def _deploy(root: Path, environment: dict[str, str], client: SyncPrefectClient, home: Path) -> None:
    """Deploy everything in `prefect.yaml`. Schedules stay active or paused as they are on the server."""
    plan = _plan(root)
    note = home / "deployed-schedules.json"
    written = {_name(entry, schedule): _is_active(schedule) for entry, schedule in _schedules(plan)}
    deployed = read_json(note) if note.exists() else written
    on_server = {
        _name(entry, schedule["schedule"] | {"slug": schedule["slug"]}): _is_active(schedule)
        for entry, schedule in _schedules({"deployments": _deployed(client)})
    }
    for name in keep_schedules(plan, on_server, deployed):
        _say(f"Schedule of {name}: stays {'active' if on_server[name] else 'paused'}, unlike in prefect.yaml")
    # Written to a file before the deployment, since changes afterwards would be lost if the command were killed.
    merged = home / "deployed.yaml"
    merged.write_text(yaml.safe_dump(plan, allow_unicode=True, sort_keys=False), encoding="utf-8")
    _run(root, environment, "--no-prompt", "deploy", "--all", "--prefect-file", str(merged))
    write_json(note, written)


def keep_schedules(plan: dict[str, Any], on_server: Mapping[str, bool], deployed: Mapping[str, bool]) -> list[str]:
    """Set a plan's schedules active or paused like those on the server.

    Args:
        plan: the content of `prefect.yaml`; changed in place.
        on_server: schedule → whether it is active on the server. A schedule that it lacks starts as in the file.
        deployed: schedule → whether it was active in the file at the last deployment. If the file has changed since, it
            takes precedence.

    Returns:
        The schedules whose state now differs from the file.
    """
    kept = []
    for entry, schedule in _schedules(plan):
        name, written = _name(entry, schedule), _is_active(schedule)
        if deployed.get(name, written) == written and on_server.get(name, written) != written:
            schedule["active"] = on_server[name]
            kept.append(name)
    return kept


def _deployed(client: SyncPrefectClient) -> Any:
    """The deployments on a server, in the server's format."""
    return client.request("POST", "/deployments/filter", json={}).raise_for_status().json()


def _schedules(plan: Mapping[str, Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """All (deployment, schedule) pairs, in the file's or the server's format."""
    return [(entry, schedule) for entry in plan["deployments"] for schedule in entry.get("schedules") or []]


def _name(deployment: Mapping[str, Any], schedule: Mapping[str, Any]) -> str:
    """The identity of a schedule in the file and on the server: its deployment, and when it starts runs."""
    when = next((schedule[key] for key in ("slug", "cron", "rrule", "interval") if schedule.get(key)), "")
    flow = str(deployment["entrypoint"]).rpartition(":")[2].replace("_", "-")
    return f"{flow}/{deployment['name']} ({f'{when:g}' if isinstance(when, float | int) else when})"


def _is_active(schedule: Mapping[str, Any]) -> bool:
    return schedule.get("active") is not False  # Prefect's default is active


def _plan(root: Path) -> dict[str, Any]:
    return dict(yaml.safe_load((root / "prefect.yaml").read_text(encoding="utf-8")))


def _pool_name(root: Path) -> str:
    return str(_plan(root)["deployments"][0]["work_pool"]["name"])


def _address(url: str) -> tuple[str, int]:
    """Host and port for a server to be started at an address.

    Raises:
        QAdapterError: it is not on this machine's loopback interface, or not an address.
    """
    if not is_loopback(url):
        raise QAdapterError(
            f"No Prefect server answers at {url}, and this command starts one on a loopback address only. "
            "Start it there, or unset PREFECT_API_URL."
        )
    try:
        parts = urlsplit(url)
        port = parts.port or 80
    except ValueError as error:
        raise QAdapterError(f"PREFECT_API_URL: {url} is not the address of a server ({error}).") from error
    if parts.scheme != "http" or parts.path.rstrip("/") != "/api":
        raise QAdapterError(
            f"No Prefect server answers at {url}, and this command starts one only at addresses of the form "
            "http://127.0.0.1:4200/api. Correct PREFECT_API_URL."
        )
    return ("::1" if parts.hostname == "::1" else "127.0.0.1"), port


def _start(
    root: Path, environment: dict[str, str], words: Sequence[str], *, output: int | IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    """Start a process in its own process group, so that Ctrl-C ends the processes in our order."""
    return subprocess.Popen(
        words,
        cwd=root,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=True,
    )


def _run(root: Path, environment: dict[str, str], *arguments: str) -> None:
    """Run one command to its end; its output is shown only if it fails."""
    words = worker_process.command(*arguments, parent=os.getpid())
    child = _start(root, environment, words, output=subprocess.PIPE)
    try:
        output, _ = child.communicate()
    except BaseException:
        _stop(child)
        raise
    if child.returncode:
        text = output.decode(errors="replace").strip()
        raise PartError(f"`prefect {' '.join(arguments)}` failed with code {child.returncode}:\n{text}")


def _next_steps(root: Path, url: str, home: Path) -> str:
    deployments = _plan(root)["deployments"]
    flows = [str(deployment["entrypoint"]).rpartition(":")[2].replace("_", "-") for deployment in deployments]
    commands = "\n".join(
        f"  prefect deployment run {flow}/{deployment['name']}"
        for flow, deployment in zip(flows, deployments, strict=True)
    )
    password = "" if AUTH_VARIABLE in os.environ else f" (its password is the line in {home / AUTH_FILE})"
    return (
        f"\nReady. In another terminal, with the environment active (. .venv/bin/activate) and from this folder:\n"
        f"{commands}\nRuns: {url.removesuffix('/api')}{password}   Stop: Ctrl-C here\n"
    )


@contextlib.contextmanager
def _stopping_on_signals() -> Iterator[None]:
    """Turn the first Ctrl-C, TERM or HUP into an orderly shutdown, and ignore further ones during it."""

    def stop(_number: int, _frame: FrameType | None) -> None:
        _ignore_signals()
        raise _StopRequest

    before = {kind: signal.signal(kind, stop) for kind in _STOP_SIGNALS}
    try:
        yield
    except _StopRequest:
        pass
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)


def _ignore_signals() -> None:
    for kind in _STOP_SIGNALS:
        signal.signal(kind, signal.SIG_IGN)


@contextlib.contextmanager
def _stopping(children: dict[str, subprocess.Popen[bytes]]) -> Iterator[None]:
    """End all children at the end of the block: the worker first, then the server that it reports to."""
    try:
        yield
    finally:
        _ignore_signals()
        for name in reversed(list(children)):
            _say(f"Stopping the {name} ...")
            _stop(children[name])


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End a child and its descendants within twice `_STOP_SECONDS`.

    Descendants are ended first: a flow run that receives TERM while its worker and server still run can report that it
    was stopped. If the worker ended first, the run would stay `Running` in the database for ever.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(child.pid)
        _end(process.children(recursive=True))
        _end([process, *process.children(recursive=True)])
    child.wait()


def _end(processes: list[psutil.Process]) -> None:
    """Send TERM to each process, and KILL to those that do not end in time."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=_STOP_SECONDS)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - this is a command


def up(
    limit: Annotated[int, typer.Option(min=1, metavar="N", help="flow runs at the same time")] = 1,
) -> None:
    """Serve until Ctrl-C.

    Raises:
        QAdapterError: what the user asks for is refused.
        CommandFailedError: a part did not start or died.
    """
    try:
        serve(PROJECT_ROOT, limit=limit)
    except PartError as error:
        raise CommandFailedError(str(error)) from error
