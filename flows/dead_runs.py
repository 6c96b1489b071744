"""Flow runs whose process died with its worker, by a power cut or `kill -9`: nobody is left to report them.

Prefect keeps such a run in `Running` for ever, and with it the place it takes in its deployment's concurrency limit:
every later run of that deployment would wait behind it.
"""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import psutil


def close_dead_runs(url: str, *, no_worker_is_up: bool) -> list[str]:
    """Report runs of deployments as crashed whose process on this machine is gone.

    Args:
        url: a Prefect API whose workers all run on this machine.
        no_worker_is_up: the server was just started: runs that never got as far as having a process are dead too.

    Returns:
        Names of the runs.
    """
    alive = {"flow_runs": {"state": {"type": {"any_": ["PENDING", "RUNNING", "CANCELLING"]}}}}
    closed = []
    for run in _post(url, "/flow_runs/filter", alive):
        pid = run["infrastructure_pid"]
        dead = no_worker_is_up if pid is None else not _runs_prefect(pid)
        if run["deployment_id"] and dead:
            message = "Its process ended without a word, with its worker. Finished stages are kept: run it again."
            _post(url, f"/flow_runs/{run['id']}/set_state", {"state": {"type": "CRASHED", "message": message}})
            closed.append(str(run["name"]))
    return closed


def _runs_prefect(pid: str) -> bool:
    """Whether this is the id of a living Prefect process, and not of another one that was given the number since."""
    try:
        process = psutil.Process(int(pid))
        return process.status() != psutil.STATUS_ZOMBIE and any("prefect" in word for word in process.cmdline())
    except psutil.AccessDenied:
        return True
    except (psutil.NoSuchProcess, ValueError):
        return False


def _post(url: str, path: str, body: dict[str, Any]) -> Any:
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(url + path, json.dumps(body).encode(), headers, method="POST")
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)
