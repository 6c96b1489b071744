"""The Prefect task runner that runs an experiment's independent stages."""

from __future__ import annotations

from typing import Any

from prefect.task_runners import ProcessPoolTaskRunner, ThreadPoolTaskRunner

from flows.prefect_host.dead_runs import end_with_parent
from flows.prefect_host.orphans import outlive_worker
from qadapter.config.experiment import Experiment
from qadapter.files.shown import guard_logs, quiet_libraries


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
    if workers > 1:
        return ProcessPoolTaskRunner(max_workers=workers, initializer=begin_worker)
    return ThreadPoolTaskRunner(max_workers=1)


def begin_worker() -> None:
    """Set up a worker process before its first stage."""
    quiet_libraries()
    guard_logs()
    outlive_worker()
    end_with_parent()
