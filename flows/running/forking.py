"""The process that worker processes are forked from (`workers.py`); a command starts it before it imports anything."""

from __future__ import annotations

import multiprocessing
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

from qadapter.config.experiment import Experiment

OF_EVERY_STAGE = "flows.running.of_every_stage"
"""What that process imports. Not torch, whose threads do not survive a fork."""


def has_workers(experiment: Experiment) -> bool:
    """Whether an experiment's stages run in processes of this machine."""
    return experiment.runner.engine == "local" and experiment.parallel > 1


def start_forking(experiment: Experiment) -> None:
    """Start the process, where an experiment needs it; it imports while this one goes on."""
    if has_workers(experiment):
        forking()
        forkserver.ensure_running()


def forking() -> ForkServerContext:
    """The way to start processes that are forked from that one."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([OF_EVERY_STAGE])
    return context
