"""Flow runs whose process and worker both died, by a power cut or `kill -9`, so that no process reports their end.

Prefect keeps such a run in `Running` for ever, together with its slot in the deployment's concurrency limit, for which
every later run of the deployment would wait.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable, Iterable
from threading import Thread
from typing import TYPE_CHECKING, Any
from uuid import UUID

import httpx
import psutil

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

_PAGE = 200
_MESSAGE = "Its process ended without reporting. Finished stages are kept: run it again."


def close_dead_runs(client: SyncPrefectClient, *, no_worker_is_up: bool) -> list[str]:
    """Report runs of deployments as crashed whose process on this machine has ended.

    Only runs of process pools are checked, by their process id. Runs on other infrastructure, such as containers, are
    left to their worker.

    Args:
        client: client of a Prefect server whose workers all run on this machine.
        no_worker_is_up: the server was just started, so runs without a process are dead as well.

    Returns:
        The names of the reported runs.
    """
    from prefect.client.schemas.filters import (
        FlowRunFilter,
        FlowRunFilterState,
        FlowRunFilterStateType,
        WorkPoolFilter,
        WorkPoolFilterType,
    )
    from prefect.client.schemas.objects import StateType
    from prefect.states import Crashed

    processes = WorkPoolFilter(type=WorkPoolFilterType(any_=["process"]))
    local = {pool.name for pool in _all(client.read_work_pools, work_pool_filter=processes)}
    under_way = FlowRunFilterStateType(any_=[StateType.PENDING, StateType.RUNNING, StateType.CANCELLING])
    alive = FlowRunFilter(state=FlowRunFilterState(type=under_way))
    closed = []
    for run in _all(client.read_flow_runs, flow_run_filter=alive):
        pid = run.infrastructure_pid
        dead = no_worker_is_up if pid is None else pid.isdecimal() and not _runs_prefect(pid)
        if run.deployment_id and run.work_pool_name in local and dead:
            client.set_flow_run_state(run.id, Crashed(message=_MESSAGE))
            closed.append(str(run.name))
    return closed


def _all(read: Callable[..., list[Any]], **filters: Any) -> list[Any]:
    """All results of a filter; Prefect's server returns 200 at a time."""
    found: list[Any] = []
    while page := read(**filters, offset=len(found), limit=_PAGE):
        found += page
    return found


def end_with_parent() -> None:
    """End this worker process when the flow run that started it is killed; no other process would end it."""
    parent = multiprocessing.parent_process()

    def watch() -> None:
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=watch, daemon=True).start()


def report_crashed(flow_run_ids: Iterable[str]) -> None:
    """Report dead flow runs as crashed, with or without a deployment, unless they have a final state.

    Args:
        flow_run_ids: Prefect's ids; unknown ones are ignored.
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
    """The given flow runs that have ended in any state; empty if the server does not answer.

    Args:
        flow_run_ids: Prefect's ids; unknown ones, and those beyond the server's page size, are ignored.
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
    """Whether a process id is that of a running Prefect process, not of another process that reuses the id."""
    try:
        process = psutil.Process(int(pid))
        return process.status() != psutil.STATUS_ZOMBIE and any("prefect" in word for word in process.cmdline())
    except psutil.AccessDenied:
        return True
    except psutil.NoSuchProcess:
        return False
