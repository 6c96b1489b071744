"""Let a flow run outlive its worker: it continues when the pipe that takes its output is closed."""

from __future__ import annotations

import os
import select
import stat
from threading import Thread

_OUTPUTS = (1, 2)  # standard output and error
STARTED_BY_A_WORKER = "PREFECT__FLOW_RUN_ID"
"""Prefect's workers set this variable for the processes of their flow runs."""


def outlive_worker() -> None:
    """Let this process continue when the worker that reads its output is killed.

    Prefect's worker reads a run's output from a pipe. When the worker dies, the next log line would end the run: rich,
    which Prefect logs with, exits when its pipe breaks. Log records still reach Prefect's server. This applies only to
    runs of a worker: `make repro | head` ends like every command.
    """
    if STARTED_BY_A_WORKER not in os.environ or not hasattr(select, "poll"):
        return
    for number in _OUTPUTS:
        if stat.S_ISFIFO(os.fstat(number).st_mode):
            Thread(target=_watch, args=(number,), daemon=True).start()


def _watch(number: int) -> None:
    """Wait until the other end of a pipe is closed, then discard the output."""
    poll = select.poll()
    poll.register(number, 0)  # POLLERR is always reported: the reader is gone
    poll.poll()
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, number)
    os.close(nothing)
