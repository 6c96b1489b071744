"""Starting a flow run: everything that can be refused is refused here, before there is any run to see."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

from prefect.exceptions import UpstreamTaskError
from prefect.logging import get_run_logger
from prefect.runtime import deployment, flow_run

from flows.prefect_host.dead_runs import ended_flow_runs, report_crashed
from flows.prefect_host.orphans import outlive_worker
from flows.running.runners import task_runner
from qadapter.config.experiment import Experiment, load_experiment
from qadapter.config.sources import Source
from qadapter.errors import QAdapterError
from qadapter.files.private import close_to_others, keep_private
from qadapter.files.shown import guard_logs
from qadapter.judging.plan import judged_rows
from qadapter.planning.preflight import check_experiment
from tasks.stages.context import RunContext, workspace
from tasks.stages.remote import RemoteStore
from tasks.stages.store import StageStore
from tasks.tracking.tracker import FLOW_RUN_TAG, Tracker

ALLOW_REMOTE_CODE = "QADAPTER_ALLOW_REMOTE_CODE"
"""Environment variable of a worker: `1` lets its deployments use `model.trust_remote_code`."""
_SECONDS_BETWEEN_PROGRESS = 60.0
_SECONDS_FOR_MLFLOW = 60.0  # to come back at a run's end; what is left then is delivered at the next start


@dataclass(frozen=True)
class Launch:
    """What a user asks for.

    Attributes:
        experiment_name: of the MLflow experiment.
        profile: a name in `configs/`, or a YAML file.
        data: the data folder, or None.
        overrides: dotted keys to values.
    """

    experiment_name: str
    profile: str
    data: str | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def data_folder(self) -> Path | None:
        """The data folder as an absolute path."""
        return Path(self.data).expanduser().resolve() if self.data else None

    def load(self) -> Experiment:
        """Read the config."""
        return load_experiment(self.profile, self.overrides)

    def rows_to_judge(self, experiment: Experiment) -> int:
        """Policies whose answers are judged; the judge's price is of them, and they share its budget."""
        return judged_rows(experiment)

    def fixed_sources(self, experiment: Experiment) -> dict[str, Source]:
        """The sources whose data have to be there before a run."""
        return dict(experiment.sources)

    def check(self, *, remote: bool = True) -> Experiment:
        """Read the config and look at everything that can be looked at without computing.

        Args:
            remote: ask for sources on the network too; without it only those on this machine are looked at.

        Raises:
            QAdapterError: with all that is needed to put it right.
        """
        experiment = self.load()
        _refuse_remote_code(experiment)
        experiment.launch.check(experiment.model.quantization)
        experiment.runner.check()
        RemoteStore.from_environment()
        folder = self.data_folder
        if folder is not None and not folder.is_dir():
            raise QAdapterError(f"the data folder {self.data!r} does not exist; give an existing folder")
        if experiment.needs_data and folder is None:
            raise QAdapterError(
                f"the profile {self.profile!r} needs a data folder and none was given; name one, for example "
                f"`make repro PROFILE={self.profile} DATA=path/to/folder`, or the deployment parameter "
                "data=path/to/folder"
            )
        check_workspace(workspace())
        check_experiment(
            experiment,
            folder,
            fixed=self.fixed_sources(experiment),
            rows=self.rows_to_judge(experiment),
            downloads=workspace() / ".qadapter" / "downloads",
            remote=remote,
        )
        return experiment


def _refuse_remote_code(experiment: Experiment) -> None:
    """A run of a deployment executes no code of a model repository on the word of its parameters alone.

    Whoever may start a deployment may set its parameters; whoever runs the worker sets its environment.

    Raises:
        QAdapterError: `model.trust_remote_code` is on in a run of a deployment, and the worker does not allow it.
    """
    allowed = os.environ.get(ALLOW_REMOTE_CODE) == "1"
    if experiment.model.trust_remote_code and deployment.get_id() and not allowed:
        raise QAdapterError(
            "model.trust_remote_code is on, which a deployment's parameters alone may not ask for: it runs code of "
            f"the model's repository. Set {ALLOW_REMOTE_CODE}=1 in the worker's environment, or start the run on the "
            "command line."
        )


def check_workspace(folder: Path) -> None:
    """Something can be written where results go, and other users cannot read it.

    Raises:
        QAdapterError: the disk is full or read-only, the place is no folder, or what lies there is open to other users
            and cannot be closed to them.
    """
    keep_private()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(65_536))
            file.flush()
    except OSError as error:
        raise QAdapterError(
            f"nothing can be written to the workspace {folder}: {error.strerror}. Free some space there, or name "
            "another folder with the environment variable QADAPTER_HOME."
        ) from error
    for name in (".qadapter", "mlruns"):
        close_to_others(folder / name)
    for database in folder.glob("mlflow.db*"):
        close_to_others(database)


def close_abandoned(tracker: Tracker, experiment_name: str) -> None:
    """End what nobody else will end.

    Killed processes of this machine leave MLflow runs and flow runs open; and from wherever an MLflow run is, it is
    over once Prefect says that its flow run is.
    """
    if abandoned := tracker.close_abandoned(experiment_name, ended_flow_runs):
        logging.getLogger(__name__).warning("%d runs that were left open were closed as KILLED", len(abandoned))
        flows = {flow for run in abandoned if (flow := tracker.tags(run).get(FLOW_RUN_TAG))}
        report_crashed(flows - {flow_run.get_id()})  # it may be this one, tried again: then only its first try is dead


@contextmanager
def launched(launch: Launch) -> Iterator[PrefectRun]:
    """A checked experiment, ready to run stages; its MLflow run ends FINISHED, FAILED or KILLED whatever happens."""
    outlive_worker()
    guard_logs()  # a worker's process begins with Prefect's own command
    experiment = launch.check()
    root = workspace()
    for name in ("qadapter", "tasks"):
        logging.getLogger(name).setLevel(logging.INFO)  # progress of long stages; Prefect passes it on (prefect.toml)
    # Read by torch when it is first imported, here and in every worker process.
    os.environ.setdefault("OMP_NUM_THREADS", str(experiment.threads_per_stage))
    tracker = Tracker.for_project(root)
    close_abandoned(tracker, launch.experiment_name)
    parent = tracker.start_parent(
        launch.experiment_name,
        f"{experiment.name} · {flow_run.get_name() or 'run'}",
        params=experiment.model_dump(mode="json", by_alias=True),
        tags={"stage": "parent", "profile": launch.profile, FLOW_RUN_TAG: flow_run.get_id() or ""},
    )
    # Whatever is used again is read as a whole: a power cut or a failing disk can change a file and not its size.
    store = StageStore(root / ".qadapter", verify_hashes=True)
    context = RunContext(experiment, store, tracker, parent, launch.data_folder, launch.rows_to_judge(experiment))
    try:
        with tracker.ending(parent), PrefectRun(context) as run:
            yield run
    finally:
        tracker.deliver(patience=_SECONDS_FOR_MLFLOW)


class PrefectRun:
    """Submits stages to a Prefect task runner; those whose inputs are there run side by side, `parallel` at a time."""

    def __init__(self, context: RunContext) -> None:
        self.experiment = context.experiment
        self._context = context
        self._futures: list[Any] = []
        self._completed: set[UUID] = set()
        self._runner: Any = task_runner(context.experiment)

    def __enter__(self) -> PrefectRun:
        self._runner.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._runner.__exit__(*error)

    def __call__(self, task: Any, **inputs: Any) -> Any:
        """A future of the task's result."""
        future = self._runner.submit(task, {"context": self._context, **inputs})
        self._futures.append(future)
        return future

    def of(self, experiment: Experiment) -> PrefectRun:
        """The same run with other settings: its stages join those of this one."""
        other = copy(self)
        other.experiment = experiment
        other._context = replace(self._context, experiment=experiment)
        return other

    def storing_in(self, store: StageStore) -> PrefectRun:
        """The same run with another store: what this one would find is computed again."""
        other = copy(self)
        other._context = replace(self._context, store=store)
        return other

    def settle(self) -> StagesFailedError | None:
        """Wait for every stage, saying once a minute how far it is; returns what failed, if anything did."""
        reasons = []
        told = time.monotonic()
        for place, future in enumerate(self._futures):
            try:
                future.wait()
            except UpstreamTaskError:  # a process pool says so this way that another stage's failure stopped this one
                continue
            except Exception as error:  # such as a worker process that the system killed
                reasons.append(f"{type(error).__name__}: {error}")
                continue
            if future.state.is_completed():
                self._completed.add(future.task_run_id)
            elif future.state.is_failed() or future.state.is_crashed():
                reasons.append(future.state.message)
            if time.monotonic() - told > _SECONDS_BETWEEN_PROGRESS:
                get_run_logger().info("%d of %d stages are through", place + 1, len(self._futures))
                told = time.monotonic()
        if not reasons:
            return None
        return StagesFailedError(
            f"{len(reasons)} of {len(self._futures)} stages failed (what was finished is kept):\n"
            + "\n".join(dict.fromkeys(f"  {reason}" for reason in reasons))
        )

    def finished(self, futures: Sequence[Any]) -> list[Any]:
        """After `settle`: the results of those stages that were completed."""
        return [future.result() for future in futures if future.task_run_id in self._completed]

    def result(self, future: Any) -> Any:
        """Wait for every stage and return one's result.

        A failed stage stops only those that need it; what was finished is kept for the next run.

        Raises:
            StagesFailedError: naming each stage that failed and why.
        """
        if failed := self.settle():
            raise failed
        return future.result()


class StagesFailedError(RuntimeError):
    """A stage failed while running; the flow run's log has its traceback."""
