"""Starting a flow run: everything that can be refused is refused here, before there is any run to see."""

from __future__ import annotations

import logging
import os
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
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
from qadapter.errors import QAdapterError
from qadapter.evaluation.benchmarks.build import QUESTION_FIELDS
from qadapter.evaluation.benchmarks.items import read_items
from qadapter.evaluation.lm_eval.catalog import NAME, check_tasks, expand_suites, find_tasks, local_tasks, needs_data
from qadapter.files.private import close_to_others, keep_private
from qadapter.files.shown import guard_logs
from qadapter.judging.plan import judged_rows, plan_judges
from qadapter.preferences import sources
from qadapter.preferences.building import Choices
from qadapter.preferences.prepare import first_usable_pair
from qadapter.toyworld import world as toyworld
from tasks.stages.context import RunContext, resolve_path, workspace
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
        if experiment.toy_world is None:
            self._check_sources(experiment, folder, remote)
        check_tasks(experiment.evaluation.retention.tasks)
        if (pretrained := experiment.model.pretrained) and (remote or Path(pretrained).is_dir()):
            from qadapter.policy.loading import check_pretrained  # transformers takes seconds to import

            retention = experiment.evaluation.retention
            names, plain = expand_suites(retention.tasks, retention.plain_tasks)
            check_pretrained(experiment.model, [name for name in names if name not in plain])
        _check_official_data(experiment, folder)
        _check_benchmarks(experiment)
        plan_judges(experiment, self.rows_to_judge(experiment))
        return experiment

    def _check_sources(self, experiment: Experiment, folder: Path | None, remote: bool) -> None:
        """Each source is there, of a known format, and has a usable pair."""
        cache = workspace() / ".qadapter" / "downloads"
        problems = []
        for name, source in experiment.sources.items():
            sides = [(source.path, source.split)]
            if source.heldout_path or source.heldout_split:
                sides.append((source.heldout_path or source.path, source.heldout_split))
            for path, split in sides:
                try:
                    where = resolve_path(path, folder)
                    options = {"split": split, "revision": source.revision, "config_name": source.config_name}
                    away = "://" in where or where.startswith("hub:")
                    if remote or not away:
                        sources.check(where, **options)
                    if not away:
                        files = sources.locate(where, cache_dir=cache, **options)
                        first_usable_pair(files, source.domain, source.max_chars, Choices.of(source))
                except QAdapterError as error:
                    problems.append(f"  sources.{name}: {error}")
        if experiment.built_benchmarks:
            for name, path in experiment.built_benchmarks.questions.items():
                try:
                    read_items(resolve_path(path, folder), QUESTION_FIELDS)
                except QAdapterError as error:
                    problems.append(f"  built_benchmarks.questions.{name}: {error}")
        if problems:
            raise QAdapterError("the data cannot be used:\n" + "\n".join(dict.fromkeys(problems)))


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


def _check_official_data(experiment: Experiment, data: Path | None) -> None:
    """The files for lm-eval's own tasks, where the user names a folder of them.

    Raises:
        QAdapterError: there is no such folder, or a file in it is not what its task needs.
    """
    retention = experiment.evaluation.retention
    if retention.official_data is None:
        return
    folder = Path(resolve_path(retention.official_data, data))
    if not folder.is_dir():
        raise QAdapterError(
            f"evaluation.retention.official_data: {retention.official_data!r} is no folder; give the folder with the "
            "files of lm-eval's own tasks (docs/evaluation.md), or leave it out for those of the hub"
        )
    from qadapter.evaluation.lm_eval.official_files import check_files  # lm-eval takes seconds to import

    check_files(retention.tasks, folder)


def _check_benchmarks(experiment: Experiment) -> None:
    """Each of the project's own retention tasks has a benchmark that this experiment makes.

    Raises:
        QAdapterError: naming those that have none.
    """
    made = _tasks_made(experiment)
    tasks, _ = expand_suites(experiment.evaluation.retention.tasks)
    if lacking := [task for task in needs_data(find_tasks(tasks).local) if task not in made]:
        known = f"; those it makes are for {', '.join(sorted(made))}" if made else ""
        raise QAdapterError(
            f"evaluation.retention.tasks names {', '.join(lacking)}, but this experiment makes no benchmark for that"
            f"{known}. Leave it out or add to built_benchmarks."
        )


def _tasks_made(experiment: Experiment) -> set[str]:
    """The project's own tasks whose files this experiment writes."""
    preference, style = f"{NAME}_preference", f"toy_style_{NAME}"
    fixed: set[str] = set()
    names: dict[str, Iterable[str]] = {}
    if built := experiment.built_benchmarks:
        of_texts = [*built.replies, *built.questions]
        names = {template: of_texts for template in local_tasks() if NAME in template and template != style}
        names[preference] = built.preferences
    elif experiment.toy_world:
        fixed = {task for task in local_tasks() if task.startswith("toy_") and NAME not in task}
        names = {preference: toyworld.PREFERENCES, style: toyworld.DOMAIN_STYLES}
    return fixed | {template.replace(NAME, name) for template, some in names.items() for name in some}


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
