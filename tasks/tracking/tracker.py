"""Runs in MLflow. Every call has an explicit run id, so threads and processes cannot mix up runs.

Calls wait for an unavailable server (`store.py`); if it stays unavailable, writes are queued (`outbox.py`).
"""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import subprocess
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from qadapter.errors import QAdapterError
from qadapter.files.process_tags import ProcessTag
from qadapter.files.shown import shown
from tasks.tracking.names import flatten, mlflow_name
from tasks.tracking.outbox import TICKET, TICKET_TAG, Outbox
from tasks.tracking.store import (
    KIND_TAG,
    MAX_DATASET_DIGEST_SIZE,
    MAX_METRICS_PER_BATCH,
    MAX_TAG_VAL_LENGTH,
    MODEL_TRAINING,
    SQLITE,
    MlflowStore,
    RefusedError,
    first_use,
)
from tasks.tracking.view import view_tags

_LOGGER = logging.getLogger(__name__)
PROJECT_ROOT = Path(__file__).resolve().parents[2]
_NAMES_PER_BATCH = 100  # params, and as many tags
_PATIENCE = 60.0  # seconds
_PROCESS_TAG = "qadapter.process"
_PARENT_TAG = "mlflow.parentRunId"
FLOW_RUN_TAG = "prefect.flow_run_id"
"""Tag of a parent run: the Prefect id of its flow run."""

Row = Mapping[str, float]
LONGEST_TAG: int = MAX_TAG_VAL_LENGTH
"""Characters of the longest value of a tag."""
DIGEST_LENGTH: int = MAX_DATASET_DIGEST_SIZE
"""Characters of a data set's digest that MLflow keeps."""


def tracking_uri(project_root: Path) -> str:
    """The URI of the MLflow store: `MLFLOW_TRACKING_URI`, or MLflow's default file as an absolute path.

    `mlflow ui` in the project root opens the default.
    """
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{SQLITE}{project_root.resolve().as_posix()}/mlflow.db"


@dataclass(frozen=True)
class Tracker:
    """Writes runs to one MLflow store. It holds only two strings, so it can be passed to any thread or process.

    Attributes:
        uri: MLflow's tracking URI.
        artifact_root: folder of a local store's artifacts; ignored for a server, which has its own.
    """

    uri: str
    artifact_root: str

    @classmethod
    def for_project(cls, project_root: Path) -> Tracker:
        """The tracker of a project folder: its `mlflow.db` and `mlruns/`, or the store at `MLFLOW_TRACKING_URI`."""
        return cls(tracking_uri(project_root), str(project_root.resolve() / "mlruns"))

    # ---- runs

    def start_parent(
        self,
        experiment: str,
        run_name: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> str:
        """Start the parent run of a flow run, creating the experiment if needed.

        Returns:
            The run's id.

        Raises:
            AwayError: MLflow does not answer. The flow run does not start, since the address may be wrong.
        """
        self.deliver()
        experiment_id = self.experiment_id(experiment)
        self._show_view(experiment_id)
        run = self._store.call("create_run", experiment_id, tags=self._tags(tags), run_name=run_name)
        return self._with_params(str(run.info.run_id), params)

    def _show_view(self, experiment_id: str) -> None:
        """Give the experiment the view of `tasks.tracking.view`, if it does not have it."""
        known = self._store.call("get_experiment", experiment_id).tags
        for name, value in view_tags(experiment_id, known).items():
            self._store.call("set_experiment_tag", experiment_id, name, value)

    def start_child(
        self,
        parent_run_id: str,
        run_name: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> str:
        """Start a child run of another run, in the same experiment.

        Returns:
            The run's id; while MLflow is unavailable, a ticket that all methods of this class accept instead.
        """
        ticket = f"{TICKET}{uuid.uuid4().hex}"
        run_id = self._outbox.record(
            "start",
            ticket,
            parent=parent_run_id,
            name=run_name,
            time=_now(),
            tags=self._tags({**(tags or {}), TICKET_TAG: ticket}),
        )
        return self._with_params(run_id or ticket, params)

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        """End a run as FINISHED, FAILED or KILLED."""
        self._outbox.record("finish", run_id, status=status, time=_now())

    @contextlib.contextmanager
    def child(
        self,
        parent_run_id: str,
        run_name: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> Iterator[str]:
        """`start_child` as a context manager. It always ends the run: FAILED on an error, KILLED on an interrupt."""
        run_id = self.start_child(parent_run_id, run_name, params, tags)
        with self.ending(run_id):
            yield run_id

    @contextlib.contextmanager
    def ending(self, run_id: str) -> Iterator[str]:
        """End an open run at the end of the block, like `child`."""
        try:
            yield run_id
        except BaseException as error:
            try:
                self.finish(run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
            except Exception as second:  # the first error is the one to report
                _LOGGER.warning("Run %s could not be marked as failed: %s", run_id, second)
            raise
        self.finish(run_id)

    def close_abandoned(self, experiment: str, ended: Callable[[set[str]], set[str]] = lambda _: set()) -> list[str]:
        """Mark open runs as KILLED if their process was killed or their flow run has ended.

        A status that another machine's spool delivers later takes precedence.

        Args:
            experiment: name of the experiment.
            ended: returns, of the given ids of flow runs, those that have ended. It is called for runs whose process
                cannot be checked here: of another machine or container, or of an older version.

        Returns:
            The ids of the marked runs.
        """
        self.deliver()  # a pending write may end one of these runs
        found = self._store.call("get_experiment_by_name", experiment)
        if found is None:
            return []
        closed, unknown = [], []
        for run in self._store.call("search_runs", [found.experiment_id], "attributes.status = 'RUNNING'"):
            process = ProcessTag.read(run.data.tags.get(_PROCESS_TAG, ""))
            dead = process.is_dead() if process else None
            if dead is None:
                unknown.append(run)
            elif dead:
                closed.append(run.info.run_id)
        if flows := self._flow_runs_of(unknown, found.experiment_id):
            over = ended(set(flows.values()))
            closed += [run for run, flow in flows.items() if flow in over]
        for run_id in closed:
            self.finish(run_id, "KILLED")
        return closed

    def _flow_runs_of(self, runs: Sequence[Any], experiment_id: str) -> dict[str, str]:
        """Run id → id of its (or its parent's) flow run; runs without a flow run are omitted."""
        tags = {run.info.run_id: run.data.tags for run in runs}
        parents = {found[_PARENT_TAG] for found in tags.values() if _PARENT_TAG in found} - tags.keys()
        known = dict(tags)
        if parents:
            names = ", ".join(f"'{parent}'" for parent in sorted(parents))
            found = self._store.call("search_runs", [experiment_id], f"attributes.run_id IN ({names})")
            known |= {run.info.run_id: run.data.tags for run in found}
        flows = {
            run: found.get(FLOW_RUN_TAG) or known.get(found.get(_PARENT_TAG), {}).get(FLOW_RUN_TAG)
            for run, found in tags.items()
        }
        return {run: flow for run, flow in flows.items() if flow}

    def tags(self, run_id: str) -> dict[str, str]:
        """A run's tags."""
        return dict(self._store.call("get_run", run_id).data.tags)

    def experiment_id(self, name: str) -> str:
        """The id of an experiment, which is created on first use; safe for concurrent processes.

        Raises:
            QAdapterError: it was deleted in the UI.
        """
        found = self._store.call("get_experiment_by_name", name)
        if found is None:
            with first_use(self.uri):
                found = self._store.call("get_experiment_by_name", name) or self._store.create_experiment(name)
        if found.lifecycle_stage != "active":
            raise QAdapterError(
                f"MLflow's experiment {name!r} at {shown(self.uri)} was deleted. Bring it back with "
                f"`mlflow experiments restore -x {found.experiment_id}`, or choose another experiment name."
            )
        if KIND_TAG not in found.tags:  # of an older version of this project, or made by hand
            self._store.call("set_experiment_tag", found.experiment_id, KIND_TAG, MODEL_TRAINING)
        return str(found.experiment_id)

    def _tags(self, tags: Mapping[str, Any] | None) -> dict[str, str]:
        return {
            "mlflow.user": _user(),
            **_source(),
            _PROCESS_TAG: ProcessTag.own().text(),
            **{name: str(value) for name, value in (tags or {}).items()},
        }

    def _with_params(self, run_id: str, params: Mapping[str, Any] | None) -> str:
        try:
            self.log_params(run_id, params or {})
        except BaseException:
            with contextlib.suppress(Exception):
                self.finish(run_id, "FAILED")
            raise
        return run_id

    # ---- values

    def log(
        self,
        run_id: str,
        *,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
        history: Iterable[Row] = (),
        model_data: tuple[str | None, str | None] | None = None,
    ) -> None:
        """Log settings, tags and curves in as few calls as possible, since each call is several transactions.

        Args:
            run_id: the run.
            params: settings; see `flatten` for how nested ones are named.
            tags: name → value.
            history: curves, each row {"step": n, metric name: value, ...}; rows need not contain every metric. A name
                that MLflow refuses is changed (`mlflow_name`). A row may have its `timestamp` (milliseconds since the
                epoch); with it, logging the row twice shows it once.
            model_data: name and digest of the data set that the metrics were measured on, if they belong to the run's
                logged model too (`log_model`); None and None for no data set.
        """
        now = _now()
        waiting: dict[str, list[Any]] = {
            "params": list(flatten(params or {}).items()),
            "tags": [(name, str(value)) for name, value in (tags or {}).items()],
            "metrics": [
                (mlflow_name(name), float(value), int(row.get("timestamp", now)), int(row["step"]))
                for row in history
                for name, value in row.items()
                if name not in ("step", "timestamp")
            ],
        }
        while any(waiting.values()):
            batch = {name: waiting[name][:_NAMES_PER_BATCH] for name in ("params", "tags")}
            room = MAX_METRICS_PER_BATCH - sum(map(len, batch.values()))  # MLflow limits the sum of all three
            batch["metrics"] = waiting["metrics"][:room]
            waiting = {name: entries[len(batch[name]) :] for name, entries in waiting.items()}
            of_model = {"model_data": list(model_data)} if model_data and batch["metrics"] else {}
            content = {name: entries for name, entries in batch.items() if entries}
            self._outbox.record("batch", run_id, **content, **of_model)

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Log settings; `flatten` names nested ones."""
        self.log(run_id, params=params)

    def log_tags(self, run_id: str, tags: Mapping[str, Any]) -> None:
        """Set tags on a run."""
        self.log(run_id, tags=tags)

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Log one value per metric."""
        self.log(run_id, history=[{"step": step, **metrics}])

    def log_history(self, run_id: str, rows: Iterable[Row]) -> None:
        """Log curves; see `log`."""
        self.log(run_id, history=rows)

    def log_dataset(
        self,
        run_id: str,
        name: str,
        source: str,
        digest: str,
        context: str = "training",
        profile: Mapping[str, Any] | None = None,
    ) -> None:
        """Log a data set as an input of a run.

        Args:
            run_id: the run.
            name: its name in the UI.
            source: its origin: path, URL (logged without password and query) or hub id.
            digest: digest of its content; MLflow keeps the first 36 characters.
            context: its use: training, evaluation, ...
            profile: small facts about it, such as the number of rows.
        """
        self._outbox.record(
            "dataset",
            run_id,
            name=name,
            digest=digest[:MAX_DATASET_DIGEST_SIZE],
            type="http" if "://" in source else "local",
            source=json.dumps({"url" if "://" in source else "uri": shown(source)}),
            profile=json.dumps(dict(profile or {})),
            context=context,
        )

    def log_model(self, run_id: str, name: str, digest: str, params: Mapping[str, Any]) -> None:
        """Make an adapter the logged model of a run; see `tasks.tracking.logged_models`.

        A server older than MLflow 3 has no logged models: then only a warning is logged.

        Args:
            run_id: the run that trained or found it.
            name: of the model.
            digest: of the adapter's stage.
            params: its settings.
        """
        try:
            self._outbox.record("model", run_id, name=name, digest=digest, params=flatten(params))
        except RefusedError as error:
            _LOGGER.warning("%s is not among MLflow's models: %s", name, error)

    # ---- files

    def log_folder(
        self, run_id: str, path: Path, artifact_path: str | None = None, max_bytes_per_file: int | None = None
    ) -> None:
        """Copy a folder's files into a run's artifacts. The folder must not move before its delivery.

        Args:
            run_id: the run.
            path: the folder.
            artifact_path: target folder in the artifacts; None: their root.
            max_bytes_per_file: a larger file is not copied, but listed in `references.json` with its name, size, sha256
                and location. None copies all files.
        """
        self._outbox.record(
            "folder", run_id, path=str(path.absolute()), artifact_path=artifact_path, max_bytes=max_bytes_per_file
        )

    def log_file(self, run_id: str, file: Path, artifact_path: str | None = None) -> None:
        """Copy one file into a run's artifacts, under its own name."""
        self._outbox.record("file", run_id, path=str(file.absolute()), artifact_path=artifact_path)

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
        """Store a text among a run's artifacts."""
        self._outbox.record("text", run_id, text=text, artifact_file=artifact_file)

    def log_table(self, run_id: str, columns: Mapping[str, Sequence[Any]], artifact_file: str) -> None:
        """Store a table (column name → values; the file ends in `.json`), which the UI can compare across runs."""
        table = {name: list(values) for name, values in columns.items()}
        self._outbox.record("table", run_id, columns=table, artifact_file=artifact_file)

    # ---- access

    @property
    def downloads(self) -> Path:
        """Folder of the artifacts downloaded from a store on another machine."""
        return Path(self.artifact_root).parent / ".qadapter" / "downloads"

    @property
    def _store(self) -> MlflowStore:
        return MlflowStore(self.uri, self.artifact_root)

    @property
    def _outbox(self) -> Outbox:
        return Outbox(self._store)

    def deliver(self, patience: float = 0.0) -> bool:
        """Deliver pending writes to MLflow; see `Outbox.deliver`."""
        return self._outbox.deliver(patience)

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of MLflow's client by its name (for `registry.py`), after delivering pending writes.

        Tickets among the arguments become run ids.

        Raises:
            AwayError: MLflow does not answer.
            RefusedError: MLflow refuses the call, or refused to start the run behind a ticket.
        """
        self.deliver(_PATIENCE)
        run_of = self._outbox.run_of
        options = {name: run_of(value) if isinstance(value, str) else value for name, value in options.items()}
        return self._store.call(method, *(run_of(v) if isinstance(v, str) else v for v in arguments), **options)


@lru_cache(maxsize=1)
def _source() -> dict[str, str]:
    """Tags of MLflow's Source column: what runs, and the commit of the project's code, if it is a git checkout."""
    tags = {"mlflow.source.type": "LOCAL", "mlflow.source.name": "qadapter"}
    command = ["git", "-C", str(PROJECT_ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        found = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):  # no git, no checkout, or another user's
        return tags
    commit, _, dirty = found.partition("-")
    return {**tags, "mlflow.source.git.commit": commit, "mlflow.source.git.dirty": str(bool(dirty))}


def _now() -> int:
    return int(time.time() * 1000)


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # this user id has no name, as in many containers
        return "unknown"
