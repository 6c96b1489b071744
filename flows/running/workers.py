"""Worker processes for stages that run side by side (`parallel: 2`), started before there is work and kept warm.

Starting an interpreter and importing Prefect, MLflow and the tasks takes seconds, and torch, transformers, TRL and
lm-eval three times as long. Here the former is done once, in a process that the workers are forked from and that a
command starts first of all; the latter by a worker that would otherwise wait, and only once a stage computes: a run
that finds every stage never imports torch.
"""

from __future__ import annotations

import gc
import os
from collections.abc import Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from importlib import import_module
from typing import Any

from prefect.context import refresh_global_settings_context
from prefect.task_runners import ProcessPoolTaskRunner, _initialize_process_pool_worker

from flows.prefect_host.certificates import share_certificates
from flows.prefect_host.dead_runs import end_with_parent
from flows.prefect_host.orphans import outlive_worker
from flows.running.forking import forking
from qadapter.files.shown import guard_logs, quiet_libraries

OF_COMPUTING = (
    "qadapter.training.pretraining",
    "qadapter.training.supervised",
    "qadapter.training.adapt",
    "qadapter.training.trainer",
    "qadapter.evaluation.measure",
    "trl.trainer.dpo_trainer",
    "qadapter.report.build",
)
"""What stages import when they compute, in the order in which an experiment comes to need it."""


class ForkedWorkers(ProcessPoolTaskRunner):
    """Prefect's pool of processes, which are forked instead of spawned."""

    _warm: set[int]
    _warming: Future[int] | None

    def __enter__(self) -> ForkedWorkers:
        """Start the pool; a worker starts with its first stage."""
        super().__enter__()
        # Prefect's own executor has started no process yet, and never will.
        self._executor = ProcessPoolExecutor(
            max_workers=self._max_workers,
            mp_context=forking(),
            initializer=_initialize_process_pool_worker,
            initargs=(self._subprocess_message_queue, begin_worker, (dict(os.environ),)),
        )
        self._warm, self._warming = set(), None
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        """Wait for the stages that run. After a signal, end them: the next run resumes them where they were."""
        if kind is not None and not issubclass(kind, Exception) and self._executor is not None:
            for process in list(self._executor._processes.values()):
                process.kill()
        super().__exit__(kind, error, traceback)

    def warm_up(self) -> None:
        """Let the next worker that has nothing else to do import what computing takes; nothing once all have."""
        if self._executor is None or len(self._warm) >= self._max_workers:
            return
        if self._warming is None or self._warming.done():
            self._warming = self._executor.submit(import_for_computing)
            self._warming.add_done_callback(self._note)

    def _note(self, done: Future[int]) -> None:
        if not done.cancelled() and done.exception() is None:
            self._warm.add(done.result())


def begin_worker(environment: Mapping[str, str]) -> None:
    """What a worker process does first.

    Args:
        environment: of the flow run's process, which may have changed since the process was started that this one was
            forked from.
    """
    os.environ.clear()
    os.environ.update(environment)
    refresh_global_settings_context()
    share_certificates()
    quiet_libraries()
    guard_logs()
    outlive_worker()
    end_with_parent()


def import_for_computing() -> int:
    """Import what stages need that compute; returns the process's id."""
    for name in OF_COMPUTING:
        import_module(name)
    gc.freeze()  # every training and evaluation begins and ends with a collection: it need not look at modules again
    return os.getpid()
