"""The process that worker processes are forked from (`workers.py`)."""

from __future__ import annotations

import multiprocessing
import os
import socket
import sys
import threading
from multiprocessing import connection, forkserver, resource_tracker
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from qadapter.config.experiment import Experiment

OF_EVERY_STAGE = "flows.running.of_every_stage"
"""What that process imports."""
OF_COMPUTING = "flows.running.of_computing"
"""What it imports too where stages will surely compute. torch starts no thread before it computes."""


def has_workers(experiment: Experiment) -> bool:
    """Whether an experiment's stages run in processes of this machine."""
    return experiment.runner.engine == "local" and experiment.parallel > 1


def share_cores(experiment: Experiment) -> None:
    """Set how many threads torch uses in this process and in those that it starts; the user's settings take precedence.

    torch reads this once, when it is first imported.

    Where stages have more threads than there are cores, a thread that waits for another sleeps at once instead of
    keeping a core busy that a stage needs. Else it stays awake for some microseconds: to sleep after each of a thousand
    small operations, `smoke`'s pre-training took 69 ms a step instead of 49 (two threads, two idle cores). libgomp's
    own default, hundreds of microseconds, gave 47 there, and eleven times the time beside other work instead of twice.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(experiment.threads_per_stage))
    if "OMP_WAIT_POLICY" in os.environ:
        return
    threads = max(experiment.parallel * experiment.threads_per_stage, experiment.base_threads or 1)
    if threads > len(os.sched_getaffinity(0)):
        os.environ["OMP_WAIT_POLICY"] = "passive"
    else:
        os.environ.setdefault("GOMP_SPINCOUNT", "5000")


def start_forking(experiment: Experiment, *, computes: bool) -> None:
    """Share the cores, and start the process, where an experiment needs it, as a fork of this one with its imports.

    To be called after the imports, and before this process has started a thread, which a fork would not have. Where it
    has one, on other systems than Linux, and from Python 3.14 on (whose own start differs), Python itself starts it.

    Args:
        experiment: the config.
        computes: whether stages will surely compute. Then the process imports once what each worker would import later.
    """
    share_cores(experiment)
    if not has_workers(experiment):
        return
    preload = [OF_EVERY_STAGE, *([OF_COMPUTING] if computes else [])]
    forking().set_forkserver_preload(preload)
    if sys.platform == "linux" and sys.version_info < (3, 14) and threading.active_count() == 1:
        _fork_server(preload)
    else:
        forkserver.ensure_running()


def _fork_server(preload: list[str]) -> None:
    """As `forkserver.ensure_running`, but with a fork in place of a new interpreter."""
    server: Any = forkserver._forkserver
    if server._forkserver_pid is not None:
        return
    resource_tracker.ensure_running()
    # The process ends when no process is left that has the other end of this pipe: this one and all workers.
    alive, others_alive = os.pipe()
    with socket.socket(socket.AF_UNIX) as listener:
        address = connection.arbitrary_address("AF_UNIX")  # type: ignore[attr-defined]
        listener.bind(address)
        Path(address).chmod(0o600)
        listener.listen()
        sys.stdout.flush()  # else the workers would print what waits here once more
        process = os.fork()
        if process == 0:
            try:
                os.close(others_alive)
                forkserver.main(listener.detach(), alive, preload)
            finally:
                os._exit(0)
    os.close(alive)
    server._forkserver_address, server._forkserver_alive_fd = address, others_alive
    server._forkserver_pid = process


def forking() -> ForkServerContext:
    """The way to start processes that are forked from that one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([OF_EVERY_STAGE])
    return context
