"""Starting a flow run: everything that can be refused is refused here, before there is any run to see."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect.futures import wait
from prefect.runtime import flow_run
from prefect.task_runners import ProcessPoolTaskRunner, ThreadPoolTaskRunner

from qadapter.errors import QAdapterError
from qadapter.evaluation.benchmarks import read_items
from qadapter.evaluation.built_benchmarks import QUESTION_FIELDS
from qadapter.evaluation.task_catalog import NAME, check_tasks, expand_suites, find_tasks, local_tasks, needs_data
from qadapter.experiment import Experiment, load_experiment
from qadapter.preferences import sources
from qadapter.preferences.prepare import first_usable_pair
from tasks.context import RunContext, resolve_path, workspace
from tasks.stage import StageStore
from tasks.tracking import Tracker


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

    def check(self, *, remote: bool = True) -> Experiment:
        """Read the config and look at everything that can be looked at without computing.

        Args:
            remote: ask for sources on the network too; without it only those on this machine are looked at.

        Raises:
            QAdapterError: with all that is needed to put it right.
        """
        experiment = load_experiment(self.profile, self.overrides)
        folder = self.data_folder
        if folder is not None and not folder.is_dir():
            raise QAdapterError(f"the data folder {self.data!r} does not exist; give an existing folder")
        if experiment.needs_data and folder is None:
            raise QAdapterError(
                f"the profile {self.profile!r} needs a data folder and none was given; name one, for example "
                f"`make repro PROFILE={self.profile} DATA=path/to/folder`, or the deployment parameter "
                "data=path/to/folder"
            )
        if experiment.toy_world is None:
            self._check_sources(experiment, folder, remote)
        check_tasks(experiment.evaluation.retention.tasks)
        _check_benchmarks(experiment)
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
                        first_usable_pair(files, domain=source.domain, max_chars=source.max_chars)
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


def _check_benchmarks(experiment: Experiment) -> None:
    """Each of the project's own retention tasks has a benchmark that this experiment makes.

    Raises:
        QAdapterError: naming those that have none.
    """
    made: set[str] = set()
    if built := experiment.built_benchmarks:
        names = [*built.replies, *built.questions]
        made = {task.replace(NAME, name) for task in local_tasks() if NAME in task for name in names}
    elif experiment.toy_world:
        made = {task for task in local_tasks() if task.startswith("toy_")}
    tasks, _ = expand_suites(experiment.evaluation.retention.tasks)
    if lacking := [task for task in needs_data(find_tasks(tasks).local) if task not in made]:
        known = f"; those it makes are for {', '.join(sorted(made))}" if made else ""
        raise QAdapterError(
            f"evaluation.retention.tasks names {', '.join(lacking)}, but this experiment makes no benchmark for that"
            f"{known}. Leave it out or add to built_benchmarks."
        )


@contextmanager
def launched(launch: Launch) -> Iterator[PrefectRun]:
    """A checked experiment, ready to run stages; its MLflow run ends FINISHED, FAILED or KILLED whatever happens."""
    experiment = launch.check()
    root = workspace()
    for name in ("qadapter", "tasks"):
        logging.getLogger(name).setLevel(logging.INFO)  # progress of long stages; Prefect passes it on (prefect.toml)
    # Read by torch when it is first imported, here and in every worker process.
    os.environ.setdefault("OMP_NUM_THREADS", str(experiment.threads_per_stage))
    tracker = Tracker.for_project(root)
    if abandoned := tracker.close_abandoned(launch.experiment_name):
        logging.getLogger(__name__).warning("%d runs of a killed process were closed as KILLED", len(abandoned))
    parent = tracker.start_parent(
        launch.experiment_name,
        f"{experiment.name} · {flow_run.get_name() or 'run'}",
        params=experiment.model_dump(mode="json", by_alias=True),
        tags={"stage": "parent", "profile": launch.profile, "prefect.flow_run_id": flow_run.get_id() or ""},
    )
    context = RunContext(experiment, StageStore(root / ".qadapter"), tracker, parent, launch.data_folder)
    with tracker.ending(parent), PrefectRun(context) as run:
        yield run


class PrefectRun:
    """Submits stages to a Prefect task runner; those whose inputs are there run side by side, `parallel` at a time.

    One at a time they run in a thread of this process. Several at a time get a process each: torch's random state
    belongs to the whole process, and two trainings in one would disturb each other's.
    """

    def __init__(self, context: RunContext) -> None:
        self.experiment = context.experiment
        self._context = context
        self._futures: list[Any] = []
        workers = context.experiment.parallel
        self._runner: Any = ThreadPoolTaskRunner(max_workers=1)
        if workers > 1:
            self._runner = ProcessPoolTaskRunner(max_workers=workers)

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

    def result(self, future: Any) -> Any:
        """Wait for every stage and return one's result.

        A failed stage stops only those that need it; what was finished is kept for the next run.

        Raises:
            StagesFailedError: naming each stage that failed and why.
        """
        wait(self._futures)
        failed = [f.state for f in self._futures if f.state.is_failed() or f.state.is_crashed()]
        if failed:
            reasons = "\n".join(dict.fromkeys(f"  {state.message}" for state in failed))
            raise StagesFailedError(
                f"{len(failed)} of {len(self._futures)} stages failed (what was finished is kept):\n{reasons}"
            )
        return future.result()


class StagesFailedError(RuntimeError):
    """A stage failed while running; the flow run's log has its traceback."""
