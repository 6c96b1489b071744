"""Worker processes for stages that run side by side (`parallel: 2`), started before there is work and kept warm.

Starting an interpreter and importing Prefect, MLflow and the tasks takes seconds, and torch, transformers, TRL and
lm-eval three times as long. Here the former is done once, in a process that the workers are forked from and that a
command starts first of all. In a workspace without any report that process imports the latter too. In others a worker
does that would otherwise wait, and only once a stage computes: a run that finds every stage never imports torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ProcessPoolExecutor
from importlib import import_module
from typing import Any

from prefect.context import refresh_global_settings_context, serialize_context
from prefect.settings import get_current_settings
from prefect.task_runners import ProcessPoolTaskRunner, _initialize_process_pool_worker

from flows.prefect_host.certificates import share_certificates
from flows.prefect_host.dead_runs import end_with_parent
from flows.prefect_host.orphans import outlive_worker
from flows.running.forking import OF_COMPUTING, forking
from qadapter.files.shown import guard_logs, quiet_libraries


class Workers(ProcessPoolExecutor):
    """A pool of processes in which a stage that ends its process fails."""

    def submit(self, call: Callable[..., Any], /, *arguments: Any, **options: Any) -> Future[Any]:
        """As the pool does, but a `SystemExit` becomes an error.

        Prefect's engine ends a process so if, for example, its server answers with an error. The futures that Prefect
        chains to this one pass on errors only, so the flow run would wait for the stage for ever.
        """
        return super().submit(_failing, call, *arguments, **options)


def _failing(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    try:
        return call(*arguments, **options)
    except SystemExit as end:
        raise RuntimeError(
            f"Prefect gave a stage up (exit code {end.code}); the run's log has the reason. Run it again: finished "
            "stages are kept."
        ) from None


class ForkedWorkers(ProcessPoolTaskRunner):
    """Prefect's pool of processes, which are forked instead of spawned."""

    _warm: set[int]
    _warming: Future[int] | None

    def __enter__(self) -> ForkedWorkers:
        """Start the pool; a worker starts with its first stage."""
        super().__enter__()
        environment = get_current_settings().to_environment_variables(exclude_unset=True) | os.environ
        # Prefect's own executor has started no process yet, and never will.
        self._executor = Workers(
            max_workers=self._max_workers,
            mp_context=forking(),
            initializer=_initialize_process_pool_worker,
            initargs=(self._subprocess_message_queue, begin_worker, (environment,)),
        )
        # A worker has the settings from its start; with each stage, reading them again would take 30 ms.
        self._cached_context, self._cached_env = {**serialize_context(), "settings_context": None}, {}
        self._warm, self._warming = set(), None
        return self

    def __exit__(self, kind: Any, error: Any, traceback: Any) -> None:
        """Wait for the stages that run. After a signal, end them: the next run resumes them where they were."""
        if kind is not None and not issubclass(kind, Exception) and self._executor is not None:
            for process in list(self._executor._processes.values()):
                process.kill()
        super().__exit__(kind, error, traceback)

    def apart(self, call: Callable[..., Any], *arguments: Any) -> Any:
        """The result of a call in a process of its own, which has the imports of the workers' parent; or its error."""
        initial = (dict(os.environ),)
        with ProcessPoolExecutor(1, mp_context=forking(), initializer=begin_worker, initargs=initial) as process:
            return process.submit(call, *arguments).result()

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
    """Import what stages need that compute, if the worker was not forked with it; returns the process's id."""
    import_module(OF_COMPUTING)
    return os.getpid()
