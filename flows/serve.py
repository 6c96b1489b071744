"""`make serve`: one command that brings up all that `prefect deployment run` needs on this machine, and takes it down.

A deployment's run is executed only while a server and a worker are up. This starts a server if none answers at the
configured address, creates the work pool, deploys everything in `prefect.yaml`, starts a worker and waits.
"""

from __future__ import annotations

import argparse
import contextlib
import http.client
import os
import signal
import subprocess
import sys
import time
import tomllib
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import IO
from urllib.parse import urlsplit

import psutil
import yaml

from flows.dead_runs import close_dead_runs
from qadapter.errors import QAdapterError

PROJECT_ROOT = Path(__file__).resolve().parents[1]
_LOOPBACK = {"127.0.0.1", "localhost", "::1"}
_START_SECONDS = 180  # a first start creates the database; a busy laptop takes its time
_STOP_SECONDS = 20
_WORKER_SECONDS = 10  # one that is killed sooner than this would be killed again


_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _StopRequest(BaseException):
    """Somebody asked this command to end (Ctrl-C, TERM or HUP)."""


def api_url(root: Path) -> str:
    """Address of the Prefect API: `PREFECT_API_URL`, else the one in the project's `prefect.toml`.

    Raises:
        QAdapterError: neither names one.
    """
    configured = os.environ.get("PREFECT_API_URL")
    if not configured:
        with (root / "prefect.toml").open("rb") as stream:
            configured = tomllib.load(stream).get("api", {}).get("url")
    if not configured:
        raise QAdapterError(
            "No Prefect API is configured: PREFECT_API_URL is not set and prefect.toml has no [api] url. "
            "Set one, for example http://127.0.0.1:4200/api."
        )
    return str(configured).rstrip("/")


def answers(url: str, path: str = "/health") -> bool:
    """Whether a GET below the API's address succeeds within a few seconds."""
    try:
        with urllib.request.urlopen(url + path, timeout=5) as response:  # the address is the user's own setting
            return bool(response.status == 200)
    except (urllib.error.URLError, http.client.HTTPException, OSError):
        return False


def serve(root: Path, *, limit: int = 1) -> None:
    """Bring server, work pool, deployments and worker up; return when stopped, with everything down again.

    A server that was already running is used, and left running. A worker that is killed is started again.

    Args:
        root: the project folder; `prefect.yaml` and `prefect.toml` lie there, Prefect's database below it.
        limit: how many flow runs the worker executes at the same time. More than one on a laptop makes all slow.

    Raises:
        QAdapterError: a part did not start or died; the message says where its log is.
    """
    url = api_url(root)
    environment = {"DO_NOT_TRACK": "1", "PREFECT_HOME": str(root / ".prefect")} | os.environ | {"PREFECT_API_URL": url}
    home = Path(environment["PREFECT_HOME"]).expanduser().absolute()
    home.mkdir(parents=True, exist_ok=True)
    pool = _pool_name(root)
    children: dict[str, subprocess.Popen[bytes]] = {}
    with _stopping_on_signals(), _stopping(children):
        if answers(url):
            _say(f"Prefect server: using the one that answers at {url}")
        else:
            log = home / "server.log"
            _say(f"Prefect server: starting at {url} (log: {log})")
            with log.open("ab") as stream:
                children["server"] = _prefect(root, environment, *_server_command(url), output=stream)
            _wait_for_server(url, children["server"], log)
        if urlsplit(url).hostname in _LOOPBACK and (dead := close_dead_runs(url, no_worker_is_up="server" in children)):
            _say(f"Reported as crashed, because their process is gone: {', '.join(dead)}")
        if not answers(url, f"/work_pools/{pool}"):
            _run(root, environment, "work-pool", "create", pool, "--type", "process")
        _run(root, environment, "--no-prompt", "deploy", "--all")
        # The worker's output is the runs' own log: it belongs on the screen.
        worker = ("worker", "start", "--pool", pool, "--limit", str(limit))
        children["worker"], started = _prefect(root, environment, *worker), time.monotonic()
        _say(_next_steps(root, url))
        while True:
            while all(child.poll() is None for child in children.values()):
                time.sleep(0.5)
            name, child = next((name, child) for name, child in children.items() if child.poll() is not None)
            if name != "worker" or child.returncode >= 0 or time.monotonic() - started < _WORKER_SECONDS:
                break
            # Killed (by the system, for memory, or by hand). Its flow runs are processes of their own and go on.
            _say(f"The Prefect worker was killed (signal {-child.returncode}) and is started again.")
            children["worker"], started = _prefect(root, environment, *worker), time.monotonic()
        where = home / "server.log" if name == "server" else "Its output above"
        raise QAdapterError(f"The Prefect {name} ended by itself with code {child.returncode}. {where} says why.")


def _pool_name(root: Path) -> str:
    deployments = yaml.safe_load((root / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    return str(deployments[0]["work_pool"]["name"])


def _server_command(url: str) -> list[str]:
    parts = urlsplit(url)
    if parts.hostname not in _LOOPBACK:
        raise QAdapterError(
            f"No Prefect server answers at {url}, and one is started on this machine's loopback address only. "
            "Start it there, or unset PREFECT_API_URL."
        )
    return ["server", "start", "--host", parts.hostname, "--port", str(parts.port or 4200)]


def _prefect(
    root: Path, environment: dict[str, str], *arguments: str, output: int | IO[bytes] | None = None
) -> subprocess.Popen[bytes]:
    """Start Prefect's command line, in a process group of its own so that Ctrl-C reaches it through us, in order."""
    return subprocess.Popen(
        [sys.executable, "-m", "prefect", *arguments],
        cwd=root,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=None if output is None else subprocess.STDOUT,
        start_new_session=True,
    )


def _run(root: Path, environment: dict[str, str], *arguments: str) -> None:
    """Run one command to its end; its output is shown only if it fails."""
    child = _prefect(root, environment, *arguments, output=subprocess.PIPE)
    try:
        output, _ = child.communicate()
    except BaseException:
        _stop(child)
        raise
    if child.returncode:
        text = output.decode(errors="replace").strip()
        raise QAdapterError(f"`prefect {' '.join(arguments)}` failed with code {child.returncode}:\n{text}")


def _wait_for_server(url: str, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + _START_SECONDS
    while not answers(url):
        if server.poll() is not None:
            raise QAdapterError(f"The Prefect server did not start (code {server.returncode}). {log} says why.")
        if time.monotonic() > deadline:
            raise QAdapterError(f"The Prefect server did not answer at {url} within {_START_SECONDS} s. See {log}.")
        time.sleep(0.5)


def _next_steps(root: Path, url: str) -> str:
    deployments = yaml.safe_load((root / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    flows = [str(deployment["entrypoint"]).rpartition(":")[2].replace("_", "-") for deployment in deployments]
    commands = "\n".join(
        f"  prefect deployment run {flow}/{deployment['name']}"
        for flow, deployment in zip(flows, deployments, strict=True)
    )
    return (
        f"\nReady. In another terminal, with the environment active (. .venv/bin/activate) and from this folder:\n"
        f"{commands}\nRuns: {url.removesuffix('/api')}   Stop: Ctrl-C here\n"
    )


@contextlib.contextmanager
def _stopping_on_signals() -> Iterator[None]:
    """Turn the first Ctrl-C, TERM or HUP into an orderly end; further ones are ignored while that is under way."""

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
    """End all children when the block is left, the worker before the server that it reports to."""
    try:
        yield
    finally:
        _ignore_signals()
        for name in reversed(list(children)):
            _say(f"Stopping the {name} ...")
            _stop(children[name])


def _stop(child: subprocess.Popen[bytes]) -> None:
    """End a child and all it started, within twice `_STOP_SECONDS`.

    What it started goes first: a flow run that gets TERM while its worker and server still live reports that it was
    stopped. A worker that is stopped first leaves it `Running` in the database for ever.
    """
    with contextlib.suppress(psutil.NoSuchProcess):
        process = psutil.Process(child.pid)
        _end(process.children(recursive=True))
        _end([process, *process.children(recursive=True)])
    child.wait()


def _end(processes: list[psutil.Process]) -> None:
    """TERM for each, KILL for those that are still there after a while."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(processes, timeout=_STOP_SECONDS)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - this is a command


def main(arguments: Sequence[str] | None = None) -> int:
    """Read the command line and serve.

    Returns:
        The exit code: 0 after Ctrl-C, 1 if something could not start.
    """
    parser = argparse.ArgumentParser(prog="python -m flows.serve", description=__doc__)
    parser.add_argument("--limit", type=int, default=1, metavar="N", help="flow runs at the same time (default: 1)")
    options = parser.parse_args(arguments)
    try:
        serve(PROJECT_ROOT, limit=options.limit)
    except QAdapterError as error:
        print(f"error: {error}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
