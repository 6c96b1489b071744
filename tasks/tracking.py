"""MLflow: the only file that imports it. Every call names its run, so threads and processes cannot mix them up."""

from __future__ import annotations

import contextlib
import getpass
import json
import logging
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import psutil
from filelock import FileLock

# MLflow decides at its import whether it reports usage to its makers; a user who wants that sets the variable.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.utils.validation import MAX_DATASET_DIGEST_SIZE, MAX_METRICS_PER_BATCH, MAX_PARAM_VAL_LENGTH

from qadapter.artifacts import digest_file, list_files, storage_errors, write_json
from qadapter.errors import QAdapterError

_LOGGER = logging.getLogger(__name__)
_PARAMS_PER_BATCH = 100
_SQLITE = "sqlite:///"
_PROCESS_TAG = "qadapter.process"
_PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between attempts; SQLite itself waits 20 s for a lock before each

Row = Mapping[str, float]


def tracking_uri(project_root: Path) -> str:
    """Where runs are recorded: `MLFLOW_TRACKING_URI`, or MLflow's own default file made absolute.

    The default is what a bare `mlflow ui` in the project root opens.
    """
    return os.environ.get("MLFLOW_TRACKING_URI") or f"{_SQLITE}{project_root.resolve().as_posix()}/mlflow.db"


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as MLflow parameters: dotted names, lists as compact JSON, long values cut at MLflow's limit."""
    flat: dict[str, str] = {}
    for name, value in values.items():
        label = prefix + re.sub(r"[^\w. :/-]", "_", str(name))  # MLflow refuses other characters
        if isinstance(value, Mapping) and value:
            flat |= flatten(value, f"{label}.")
            continue
        text = json.dumps(value, separators=(",", ":")) if isinstance(value, list | tuple | dict) else str(value)
        flat[label] = text if len(text) <= MAX_PARAM_VAL_LENGTH else text[: MAX_PARAM_VAL_LENGTH - 1] + "…"
    return flat


@lru_cache(maxsize=8)
def _client(uri: str, artifact_root: str, _process: int) -> MlflowClient:
    """One client a process: a database connection must not be shared with a forked child."""
    if uri.startswith(_SQLITE):
        database = Path(uri.removeprefix(_SQLITE))
        with storage_errors(database):
            database.parent.mkdir(parents=True, exist_ok=True)
            with _first_use(uri):
                if not database.exists():
                    # Some sixty lines about tables, and artifacts below the current directory, whatever that is, are
                    # what a client that comes first would give us.
                    for name in ("alembic", "mlflow.store.db.utils"):
                        logging.getLogger(name).setLevel(logging.WARNING)
                    SqlAlchemyStore(uri, artifact_root)
    return MlflowClient(uri)


def _first_use(uri: str) -> contextlib.AbstractContextManager[Any]:
    """A lock between processes: MLflow creates tables and experiments without one, and two doing so at once collide."""
    return FileLock(f"{uri.removeprefix(_SQLITE)}.lock") if uri.startswith(_SQLITE) else contextlib.nullcontext()


def _is_dead(process: str) -> bool:
    """Whether a process tag names a process of this machine that runs no more."""
    host, _, rest = process.partition(" ")
    pid, _, started = rest.partition(" ")
    if host != socket.gethostname():
        return False
    try:
        return abs(psutil.Process(int(pid)).create_time() - float(started)) > 1.0
    except (psutil.NoSuchProcess, ValueError):
        return True


@dataclass(frozen=True)
class Tracker:
    """Writes runs to one MLflow store. Holds two strings only, so it can be handed to any thread or process.

    Attributes:
        uri: MLflow's tracking URI.
        artifact_root: folder below which a local store keeps artifacts; a server has its own and ignores it.
    """

    uri: str
    artifact_root: str

    @classmethod
    def for_project(cls, project_root: Path) -> Tracker:
        """The tracker of a project folder: `mlflow.db` and `mlruns/` there, or what `MLFLOW_TRACKING_URI` names."""
        return cls(tracking_uri(project_root), str(project_root.resolve() / "mlruns"))

    # ---- runs

    def start_parent(
        self,
        experiment: str,
        run_name: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> str:
        """Start the run that stands for a whole flow run, creating the experiment if needed.

        Returns:
            The run's id.
        """
        return self._start(self.experiment_id(experiment), run_name, params, tags)

    def start_child(
        self,
        parent_run_id: str,
        run_name: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> str:
        """Start a run below another one, in the same experiment.

        Returns:
            The run's id.
        """
        experiment_id = self._call("get_run", parent_run_id).info.experiment_id
        return self._start(experiment_id, run_name, params, {**(tags or {}), "mlflow.parentRunId": parent_run_id})

    def finish(self, run_id: str, status: str = "FINISHED") -> None:
        """End a run as FINISHED, FAILED or KILLED."""
        self._call("set_terminated", run_id, status)

    @contextlib.contextmanager
    def child(
        self,
        parent_run_id: str,
        run_name: str,
        params: Mapping[str, Any] | None = None,
        tags: Mapping[str, Any] | None = None,
    ) -> Iterator[str]:
        """`start_child` for a `with` block, which always ends the run: FAILED on an error, KILLED on an interrupt."""
        run_id = self.start_child(parent_run_id, run_name, params, tags)
        with self.ending(run_id):
            yield run_id

    @contextlib.contextmanager
    def ending(self, run_id: str) -> Iterator[str]:
        """End an open run when the block is left, as `child` does."""
        try:
            yield run_id
        except BaseException as error:
            try:
                self.finish(run_id, "FAILED" if isinstance(error, Exception) else "KILLED")
            except Exception as second:  # the first error is the one to report
                _LOGGER.warning("Run %s could not be marked as failed: %s", run_id, second)
            raise
        self.finish(run_id)

    def close_abandoned(self, experiment: str) -> list[str]:
        """Mark runs as KILLED that a process of this machine left open when it was killed.

        Returns:
            The ids of those runs.
        """
        found = self._call("get_experiment_by_name", experiment)
        if found is None:
            return []
        closed = []
        for run in self._call("search_runs", [found.experiment_id], "attributes.status = 'RUNNING'"):
            if _is_dead(run.data.tags.get(_PROCESS_TAG, "")):
                self.finish(run.info.run_id, "KILLED")
                closed.append(run.info.run_id)
        return closed

    def experiment_id(self, name: str) -> str:
        """The id of an experiment, created on first use; safe when several processes do so at once.

        Raises:
            QAdapterError: it was deleted in the UI.
        """
        found = self._call("get_experiment_by_name", name)
        if found is None:
            with _first_use(self.uri):
                found = self._call("get_experiment_by_name", name) or self._create_experiment(name)
        if found.lifecycle_stage != "active":
            raise QAdapterError(
                f"MLflow's experiment {name!r} at {self.uri} was deleted. Bring it back with "
                f"`mlflow experiments restore -x {found.experiment_id}`, or choose another experiment name."
            )
        return str(found.experiment_id)

    def _create_experiment(self, name: str) -> Any:
        if self.uri.startswith(_SQLITE):  # a client would put its artifacts below the current directory
            SqlAlchemyStore(self.uri, self.artifact_root).create_experiment(name)
        else:
            try:
                self._call("create_experiment", name)
            except MlflowException as error:  # another machine's process was faster
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
        return self._call("get_experiment_by_name", name)

    def _start(
        self, experiment_id: str, run_name: str, params: Mapping[str, Any] | None, tags: Mapping[str, Any] | None
    ) -> str:
        process = psutil.Process()
        everything = {
            "mlflow.user": _user(),
            _PROCESS_TAG: f"{socket.gethostname()} {process.pid} {process.create_time():.2f}",
            **{name: str(value) for name, value in (tags or {}).items()},
        }
        run_id = str(self._call("create_run", experiment_id, tags=everything, run_name=run_name).info.run_id)
        try:
            self.log_params(run_id, params or {})
        except BaseException:
            with contextlib.suppress(Exception):
                self.finish(run_id, "FAILED")
            raise
        return run_id

    # ---- values

    def log_params(self, run_id: str, params: Mapping[str, Any]) -> None:
        """Record settings; see `flatten` for how nested ones are named."""
        entities = [Param(name, value) for name, value in flatten(params).items()]
        for start in range(0, len(entities), _PARAMS_PER_BATCH):
            self._call("log_batch", run_id, params=entities[start : start + _PARAMS_PER_BATCH])

    def log_tags(self, run_id: str, tags: Mapping[str, Any]) -> None:
        """Set tags on a run."""
        self._call("log_batch", run_id, tags=[RunTag(name, str(value)) for name, value in tags.items()])

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        """Record one value for each metric."""
        self.log_history(run_id, [{"step": step, **metrics}])

    def log_history(self, run_id: str, rows: Iterable[Row]) -> None:
        """Record curves.

        Args:
            run_id: the run.
            rows: each {"step": n, metric name: value, ...}; steps need not be complete.
        """
        now = int(time.time() * 1000)
        metrics = [
            Metric(name, float(value), now, int(row["step"]))
            for row in rows
            for name, value in row.items()
            if name != "step"
        ]
        for start in range(0, len(metrics), MAX_METRICS_PER_BATCH):
            self._call("log_batch", run_id, metrics=metrics[start : start + MAX_METRICS_PER_BATCH])

    def log_dataset(
        self,
        run_id: str,
        name: str,
        source: str,
        digest: str,
        context: str = "training",
        profile: Mapping[str, Any] | None = None,
    ) -> None:
        """Record a data set as an input of a run.

        Args:
            run_id: the run.
            name: what the UI calls it.
            source: where it came from: path, URL or hub id.
            digest: of its content; MLflow keeps the first 36 characters.
            context: what it was used for: training, evaluation, ...
            profile: small facts about it, such as the number of rows.
        """
        dataset = Dataset(
            name,
            digest[:MAX_DATASET_DIGEST_SIZE],
            "http" if "://" in source else "local",
            json.dumps({"url" if "://" in source else "uri": source}),
            profile=json.dumps(dict(profile or {})),
        )
        self._call("log_inputs", run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    # ---- files

    def log_folder(
        self, run_id: str, path: Path, artifact_path: str | None = None, max_bytes_per_file: int | None = None
    ) -> None:
        """Copy a folder's files into a run's artifacts.

        Args:
            run_id: the run.
            path: the folder.
            artifact_path: folder among the artifacts; their root if None.
            max_bytes_per_file: a larger file is not copied but listed in `references.json` beside the others, with
                its name, size, sha256 and where it lies. None copies all.
        """
        files = list_files(path)
        large = {
            name: file
            for name, file in files.items()
            if max_bytes_per_file is not None and file.stat().st_size > max_bytes_per_file
        }
        if not large:
            self._upload(run_id, path, artifact_path)
            return
        with tempfile.TemporaryDirectory(prefix="qadapter-") as staging:
            for name, file in files.items():
                if name not in large:
                    link = Path(staging, name)
                    link.parent.mkdir(parents=True, exist_ok=True)
                    link.symlink_to(file.resolve())
            references = [
                {
                    "file": name,
                    "bytes": file.stat().st_size,
                    "sha256": digest_file(file),
                    "location": str(file.resolve()),
                }
                for name, file in large.items()
            ]
            write_json(Path(staging, "references.json"), references)
            self._upload(run_id, Path(staging), artifact_path)

    def _upload(self, run_id: str, folder: Path, artifact_path: str | None) -> None:
        with storage_errors(Path(self.artifact_root)):
            self._call("log_artifacts", run_id, str(folder), artifact_path)

    def log_file(self, run_id: str, file: Path, artifact_path: str | None = None) -> None:
        """Copy one file into a run's artifacts, under its own name."""
        with storage_errors(Path(self.artifact_root)):
            self._call("log_artifact", run_id, str(file), artifact_path)

    def log_text(self, run_id: str, text: str, artifact_file: str) -> None:
        """Store a text among a run's artifacts."""
        with storage_errors(Path(self.artifact_root)):
            self._call("log_text", run_id, text, artifact_file)

    def log_table(self, run_id: str, columns: Mapping[str, Sequence[Any]], artifact_file: str) -> None:
        """Store a table (column name to values; the file ends in `.json`) that the UI can show across runs."""
        with storage_errors(Path(self.artifact_root)):
            self._call("log_table", run_id, {name: list(values) for name, values in columns.items()}, artifact_file)

    # ---- the one way to MLflow

    def _call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call the client; wait and try again while the store is busy.

        A server that does not answer is waited for by MLflow's own client (`MLFLOW_HTTP_REQUEST_MAX_RETRIES` and
        `…_BACKOFF_FACTOR`, some four minutes by default), a locked SQLite file here.

        Raises:
            QAdapterError: the store stayed away for longer than that.
        """
        for pause in (*_PAUSES, None):
            try:
                return getattr(_client(self.uri, self.artifact_root, os.getpid()), method)(*arguments, **options)
            except MlflowException as error:
                busy = error.error_code == "TEMPORARILY_UNAVAILABLE"
                if busy and pause is not None:
                    _LOGGER.warning("MLflow is busy; trying again in %.1f s", pause)
                    time.sleep(pause)
                elif busy or "failed with exception" in str(error):
                    reason = str(error).splitlines()[0][:200]
                    raise QAdapterError(
                        f"MLflow at {self.uri} does not answer ({reason}). Start its server or correct "
                        "MLFLOW_TRACKING_URI, then run again: finished stages are kept."
                    ) from error
                else:
                    raise
        raise AssertionError("unreachable")


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # no name for this user id, as in many containers
        return "unknown"
