"""Flow runs whose process died with its worker, by a power cut or `kill -9`: nobody is left to report them.

Prefect keeps such a run in `Running` for ever, and with it the place it takes in its deployment's concurrency limit:
every later run of that deployment would wait behind it.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import os
import urllib.request
from collections.abc import Iterable
from threading import Thread
from typing import Any
from uuid import UUID

import httpx
import psutil

_MESSAGE = "Its process ended without a word. Finished stages are kept: run it again."


def close_dead_runs(url: str, *, no_worker_is_up: bool) -> list[str]:
    """Report runs of deployments as crashed whose process on this machine is gone.

    Only what can be judged from here is judged: runs of process pools, by the id of their process. What a container or
    another infrastructure calls its own is left to its worker.

    Args:
        url: a Prefect API whose workers all run on this machine.
        no_worker_is_up: the server was just started: runs that never got as far as having a process are dead too.

    Returns:
        Names of the runs.
    """
    alive = {"flow_runs": {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}}}
    pools = {"work_pools": {"type": {"any_": ["process"]}}}
    local = {pool["name"] for pool in _post(url, "/work_pools/filter", pools)}
    closed = []
    for run in _post(url, "/flow_runs/filter", alive):
        pid = run["infrastructure_pid"]
        dead = no_worker_is_up if pid is None else pid.isdecimal() and not _runs_prefect(pid)
        if run["deployment_id"] and run["work_pool_name"] in local and dead:
            _post(url, f"/flow_runs/{run['id']}/set_state", {"state": {"type": "CRASHED", "message": _MESSAGE}})
            closed.append(str(run["name"]))
    return closed


def end_with_parent() -> None:
    """Let this worker process end when the flow run that started it was killed: nobody else would ever end it."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=watch, daemon=True).start()


def report_crashed(flow_run_ids: Iterable[str]) -> None:
    """Report flow runs as crashed, those of no deployment too, that are known to be dead and have not ended.

    Args:
        flow_run_ids: as Prefect names them; those that this server does not know are passed over.
    """
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
    from prefect.states import Crashed

    with get_client(sync_client=True) as client:
        for name in flow_run_ids:
            with contextlib.suppress(ValueError, ObjectNotFound, PrefectHTTPStatusError, httpx.TransportError):
                run = client.read_flow_run(UUID(name))
                if run.state is None or not run.state.is_final():
                    client.set_flow_run_state(run.id, Crashed(message=_MESSAGE))


def ended_flow_runs(flow_run_ids: Iterable[str]) -> set[str]:
    """Those of some flow runs that have ended in whatever way; none where the server does not answer.

    Args:
        flow_run_ids: as Prefect names them; those that this server does not know are passed over, and what is more than
            it tells of at a time.
    """
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterId,
        FlowRunFilterState,
        FlowRunFilterStateType,
    )
    from prefect.client.schemas.objects import TERMINAL_STATES
    from prefect.exceptions import PrefectHTTPStatusError

    asked = []
    for name in flow_run_ids:
        with contextlib.suppress(ValueError):
            asked.append(UUID(name))
    state = FlowRunFilterState(type=FlowRunFilterStateType(any_=list(TERMINAL_STATES)))
    of_these = FlowRunFilter(id=FlowRunFilterId(any_=asked), state=state)
    try:
        with get_client(sync_client=True) as client:
            return {str(run.id) for run in client.read_flow_runs(flow_run_filter=of_these)}
    except (PrefectHTTPStatusError, httpx.TransportError):
        return set()


def _runs_prefect(pid: str) -> bool:
    """Whether this is the id of a living Prefect process, and not of another one that was given the number since."""
    try:
        process = psutil.Process(int(pid))
        return process.status() != psutil.STATUS_ZOMBIE and any("prefect" in word for word in process.cmdline())
    except psutil.AccessDenied:
        return True
    except psutil.NoSuchProcess:
        return False


def _post(url: str, path: str, body: dict[str, Any]) -> Any:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url + path, json.dumps(body).encode(), headers, method="POST")
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)
