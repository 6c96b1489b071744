"""The Prefect task runner that runs an experiment's independent stages."""

from __future__ import annotations

import ctypes
import threading
from typing import Any

from prefect.task_runners import ThreadPoolTaskRunner

from flows.running.forking import has_workers
from flows.running.workers import ForkedWorkers
from qadapter.config.experiment import Experiment

_SECONDS_TO_CLEAN_UP = 15.0  # before a stage is interrupted once more, because something may have swallowed the first


class InterruptibleThread(ThreadPoolTaskRunner[Any]):
    """One stage at a time in a thread of this process, which a signal ends too."""

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        """Wait for the stage that runs. After a signal, interrupt it: the next run resumes it where it was."""
        if kind is not None and not issubclass(kind, Exception) and self._executor is not None:
            threads = list(self._executor._threads)
            self._executor.shutdown(wait=False, cancel_futures=True)
            self.logger.info("Stopping: the running stage ends after its present step; the next run goes on there.")
            for thread in threads:
                while thread.is_alive():
                    _interrupt(thread)
                    thread.join(_SECONDS_TO_CLEAN_UP)
        super().__exit__(kind, error, traceback)


def _interrupt(thread: threading.Thread) -> None:
    """Raise KeyboardInterrupt in a thread as soon as it executes Python; Python itself does so in the main one only."""
    ident = ctypes.c_ulong(thread.ident or 0)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ident, ctypes.py_object(KeyboardInterrupt))


def task_runner(experiment: Experiment) -> Any:
    """A task runner, not started.

    On this machine, one stage at a time runs in a thread of this process. Several at a time get a process each: torch's
    random state belongs to the whole process, and two trainings in one would disturb each other's.

    Args:
        experiment: with an installed `runner` (`RunnerSettings.check`).
    """
    workers, settings = experiment.parallel, experiment.runner
    if settings.engine == "dask":
        from prefect_dask import DaskTaskRunner

        if settings.address:
            return DaskTaskRunner(address=settings.address)
        return DaskTaskRunner(cluster_kwargs={"n_workers": workers, "threads_per_worker": 1, "dashboard_address": None})
    if settings.engine == "ray":
        from prefect_ray import RayTaskRunner

        if settings.address:
            return RayTaskRunner(address=settings.address)
        return RayTaskRunner(init_kwargs={"num_cpus": workers, "include_dashboard": False})
    if has_workers(experiment):
        return ForkedWorkers(max_workers=workers)
    return InterruptibleThread(max_workers=1)
