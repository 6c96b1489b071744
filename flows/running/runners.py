"""The Prefect task runner that runs an experiment's independent stages."""

from __future__ import annotations

from typing import Any

from prefect.task_runners import ThreadPoolTaskRunner

from flows.running.forking import has_workers
from flows.running.workers import ForkedWorkers
from qadapter.config.experiment import Experiment


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
    return ThreadPoolTaskRunner(max_workers=1)
