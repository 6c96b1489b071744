"""A run of stages on a Prefect task runner, inside its MLflow run."""

from __future__ import annotations

import logging
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from copy import copy
from dataclasses import replace
from typing import Any
from uuid import UUID

from prefect.exceptions import UpstreamTaskError
from prefect.runtime import flow_run

from flows.prefect_host.certificates import share_certificates
from flows.prefect_host.dead_runs import ended_flow_runs, report_crashed
from flows.prefect_host.orphans import outlive_worker
from flows.running.forking import share_cores
from flows.running.left import PREPARES, Teller, kind_of
from flows.running.run_request import RunRequest
from flows.running.runners import task_runner
from flows.running.workers import ForkedWorkers
from qadapter.config.experiment import Experiment
from qadapter.files.shown import guard_logs
from tasks.stages.context import RunContext, workspace
from tasks.stages.store import StageStore
from tasks.tracking.tracker import FLOW_RUN_TAG, Tracker

_SECONDS_TO_FIND_A_STAGE = 3.0  # a stage that takes longer computes
_SECONDS_TO_BEGIN_A_STAGE = 0.1  # once one has computed, the next that takes longer is taken to compute too
_BETWEEN_SIGNALS = 1.0  # the longest that a signal which reached another thread than the flow's waits
_SECONDS_FOR_MLFLOW = 60.0  # wait for MLflow at a run's end; later, pending writes are delivered at the next start


def close_abandoned(tracker: Tracker, experiment_name: str) -> None:
    """Close the runs of killed processes, in MLflow and in Prefect.

    Killed processes on this machine leave MLflow runs and flow runs open. An MLflow run of another machine has ended if
    Prefect reports that its flow run has ended.
    """
    if abandoned := tracker.close_abandoned(experiment_name, ended_flow_runs):
        logging.getLogger(__name__).warning("%d runs that were left open were closed as KILLED", len(abandoned))
        flows = {flow for run in abandoned if (flow := tracker.tags(run).get(FLOW_RUN_TAG))}
        report_crashed(flows - {flow_run.get_id()})  # a retry of this flow run has the same id and is still running


@contextmanager
def checked_run(request: RunRequest) -> Iterator[PrefectRun]:
    """Check a request, open its MLflow run (which always ends FINISHED, FAILED or KILLED), and yield the run."""
    outlive_worker()
    share_certificates()
    guard_logs()  # the process of a worker starts with Prefect's own command
    experiment = request.check()
    root = workspace()
    for name in ("qadapter", "tasks"):
        logging.getLogger(name).setLevel(logging.INFO)  # progress of long stages; Prefect passes it on (prefect.toml)
    share_cores(experiment)
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(root / "tensorboard"))  # where `report_to` names it
    tracker = Tracker.for_project(root)
    close_abandoned(tracker, request.experiment_name)
    parent = tracker.start_parent(
        request.experiment_name,
        f"{experiment.name} · {flow_run.get_name() or 'run'}",
        params=experiment.model_dump(mode="json", by_alias=True),
        tags={
            "stage": "parent",
            "profile": request.profile,
            FLOW_RUN_TAG: flow_run.get_id() or "",
            "mlflow.source.name": f"{flow_run.get_flow_name() or 'qadapter'} {request.profile}",
        },
    )
    # Found stages are verified byte by byte: a power cut or a failing disk can change a file but not its size.
    store = StageStore(root / ".qadapter", verify_hashes=True)
    context = RunContext(experiment, store, tracker, parent, request.data_folder, request.rows_to_judge(experiment))
    try:
        with tracker.ending(parent), PrefectRun(context) as run:
            yield run
    finally:
        tracker.deliver(patience=_SECONDS_FOR_MLFLOW)


class PrefectRun:
    """Submits stages to a Prefect task runner; up to `parallel` stages with available inputs run side by side."""

    def __init__(self, context: RunContext) -> None:
        self.experiment = context.experiment
        self._context = context
        self._futures: list[Any] = []
        self._ended: dict[UUID, threading.Event] = {}
        self._prepared: dict[str, tuple[str, Any]] = {}  # source → name and future of the task that prepares it
        self._completed: set[UUID] = set()
        self._computes = False  # whether a stage was seen that was not found
        self._runner: Any = task_runner(context.experiment)
        self._submitted: list[tuple[Experiment, str, str, Mapping[str, Any]]] = []
        self._live = {context.live}
        self._teller = Teller(
            context.live,
            context.experiment.parallel,
            name=f"{flow_run.get_flow_name() or 'run'} {context.experiment.name}",
            plan=self._plan,
        )

    def __enter__(self) -> PrefectRun:
        self._runner.__enter__()
        self._teller.start()
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self._runner.__exit__(*error)
        finally:
            self._teller.stop()
            for folder in self._live:
                shutil.rmtree(folder, ignore_errors=True)

    def __call__(self, task: Any, **inputs: Any) -> Any:
        """Submit a task; returns a future of its result."""
        name = str(task.task_run_name or task.name).format(**inputs)
        self._submitted.append((self.experiment, task.fn.__name__, name, inputs))
        self._teller.submitted(name, kind_of(task.fn.__name__, inputs))
        future = self._runner.submit(task, {"context": self._context, **inputs})
        future.add_done_callback(lambda _: self._teller.ended.add(name))
        ended = self._ended[future.task_run_id] = threading.Event()
        future.add_done_callback(lambda _: ended.set())
        self._futures.append(future)
        if task.fn.__name__ == PREPARES:
            self._prepared[str(inputs["source"])] = (name, future)
        return future

    def _plan(self) -> dict[str, float]:
        """Seconds that the plan estimates for each submitted task; those without an estimate are omitted."""
        from flows.running.stage_costs import plain, seconds_of  # reading sources takes numpy

        prepared = {}
        for source, (name, future) in list(self._prepared.items()):
            if name in self._teller.ended:
                with suppress(Exception):  # a stage that failed: `settle` says so
                    prepared[source] = future.result().path
        stages = [(experiment, task, name, plain(inputs)) for experiment, task, name, inputs in list(self._submitted)]
        if isinstance(self._runner, ForkedWorkers):  # torch is not imported beside stages that need the cores
            return dict(self._runner.apart(seconds_of, stages, self._context.data, prepared))
        return seconds_of(stages, self._context.data, prepared)

    def of(self, experiment: Experiment) -> PrefectRun:
        """The same run with other settings; it waits for the stages of both."""
        other = copy(self)
        other.experiment = experiment
        other._context = replace(self._context, experiment=experiment)
        return other

    def storing_in(self, store: StageStore) -> PrefectRun:
        """The same run with another store, in which stages of this one are not found."""
        other = copy(self)
        other._context = replace(self._context, store=store)
        self._live.add(other._context.live)
        return other

    def settle(self) -> StagesFailedError | None:
        """Wait for every stage; returns the failures, if there are any."""
        reasons = []
        for future in self._futures:
            try:
                self._wait(future)
            except UpstreamTaskError:  # raised by a process pool if another stage's failure stopped this one
                continue
            except Exception as error:  # for example a worker process killed by the system
                reasons.append(f"{type(error).__name__}: {error}")
                continue
            if future.state.is_completed():
                self._completed.add(future.task_run_id)
            elif future.state.is_failed() or future.state.is_crashed():
                reasons.append(future.state.message)
        if not reasons:
            return None
        return StagesFailedError(
            f"{len(reasons)} of {len(self._futures)} stages failed (what was finished is kept):\n"
            + "\n".join(dict.fromkeys(f"  {reason}" for reason in reasons))
        )

    def _wait(self, future: Any) -> None:
        """Wait for a stage; meanwhile a worker process that has nothing to do gets ready for computing.

        The kernel may deliver a signal to any thread, as it does where a process was stopped, and Python acts on it in
        the flow's thread alone: a wait without end would not notice it.
        """
        ended = self._ended[future.task_run_id]
        if not ended.wait(_SECONDS_TO_BEGIN_A_STAGE if self._computes else _SECONDS_TO_FIND_A_STAGE):
            self._computes = True
            if isinstance(self._runner, ForkedWorkers):
                self._runner.warm_up()
            while not ended.wait(_BETWEEN_SIGNALS):
                pass
        future.wait()

    def finished(self, futures: Sequence[Any]) -> list[Any]:
        """The results of completed stages; call it after `settle`."""
        return [future.result() for future in futures if future.task_run_id in self._completed]

    def result(self, future: Any) -> Any:
        """Wait for every stage and return one's result.

        A failed stage stops only those that need it; what was finished is kept for the next run.

        Raises:
            StagesFailedError: a stage failed; the message lists each failed stage with its reason.
        """
        if failed := self.settle():
            raise failed
        return future.result()


class StagesFailedError(RuntimeError):
    """A stage failed while running; the flow run's log has its traceback."""
