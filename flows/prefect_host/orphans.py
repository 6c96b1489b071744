"""A flow run that outlives its worker: started through a pipe, it goes on when nobody reads its output any more."""

from __future__ import annotations

import os
import select
import stat
from threading import Thread

_OUTPUTS = (1, 2)  # standard output and error
STARTED_BY_A_WORKER = "PREFECT__FLOW_RUN_ID"
"""Prefect's workers set this variable for the processes of their flow runs."""


def outlive_worker() -> None:
    """Let this process go on when the worker that reads its output was killed.

    Prefect's worker passes a run's output on through a pipe. When it dies, the next line of the log would end the run
    (rich, which Prefect logs with, leaves the process when its pipe breaks). What is logged still goes to Prefect's
    server. Only for runs of a worker: `make repro | head` ends as every command does.
    """
    if STARTED_BY_A_WORKER not in os.environ or not hasattr(select, "poll"):
        return
    for number in _OUTPUTS:
        if stat.S_ISFIFO(os.fstat(number).st_mode):
            Thread(target=_watch, args=(number,), daemon=True).start()


def _watch(number: int) -> None:
    """Wait until a pipe's other end is closed; then write into nothing instead."""
    poll = select.poll()
    poll.register(number, 0)  # POLLERR is always reported: the reader is gone
    poll.poll()
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, number)
    os.close(nothing)
