"""The way to MLflow, the only file that imports it: it waits, says what is wrong, and knows MLflow's entities."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import pandas as pd
import requests
from filelock import FileLock

# MLflow decides at its import whether it reports usage to its makers; a user who wants that sets the variable.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS
from mlflow.utils.validation import MAX_DATASET_DIGEST_SIZE, MAX_METRICS_PER_BATCH, MAX_PARAM_VAL_LENGTH

from qadapter.artifacts import digest_file, list_files, storage_errors, write_json
from qadapter.errors import QAdapterError
from qadapter.url_secrets import shown
from tasks.spool import Entry

__all__ = [
    "MAX_DATASET_DIGEST_SIZE",
    "MAX_METRICS_PER_BATCH",
    "MAX_PARAM_VAL_LENGTH",
    "SQLITE",
    "AwayError",
    "MlflowStore",
    "away_errors",
    "first_use",
    "is_away",
]

_LOGGER = logging.getLogger(__name__)
SQLITE = "sqlite:///"
_CLIENT_SETTINGS = {
    # It waits 2, 4, ... 32 s for a server that is away: a minute, where its default is four. Then the spool helps.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    # A line with the address of each run that ends: a flow run has dozens.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
# A server's own error (500) would meet the same request again: that is not being away.
_AWAY = re.compile(r"failed with (timeout )?exception(?!.*too many 500)|error code 50[234]", re.DOTALL)
_UNWRITABLE = {
    "disk is full": "the disk is full; free some space",
    "readonly database": "it is read-only; change its permissions or name another folder",
}
_PROBE_SECONDS = 3.0
_PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between attempts; SQLite itself waits 20 s for a lock before each


class AwayError(QAdapterError):
    """MLflow did not answer for longer than is waited for."""


@lru_cache(maxsize=8)
def _client(uri: str, artifact_root: str, _process: int) -> MlflowClient:
    """One client a process: a database connection must not be shared with a forked child."""
    for name, value in _CLIENT_SETTINGS.items():  # MLflow reads them at each request; the user's own win
        os.environ.setdefault(name, value)
    if uri.startswith(SQLITE):
        database = Path(uri.removeprefix(SQLITE))
        with storage_errors(database):
            database.parent.mkdir(parents=True, exist_ok=True)
            with first_use(uri):
                if not database.exists():
                    # Some sixty lines about tables, and artifacts below the current directory, whatever that is, are
                    # what a client that comes first would give us.
                    for name in ("alembic", "mlflow.store.db.utils"):
                        logging.getLogger(name).setLevel(logging.WARNING)
                    SqlAlchemyStore(uri, artifact_root)
    return MlflowClient(uri)


def first_use(uri: str) -> contextlib.AbstractContextManager[Any]:
    """A lock between processes: MLflow creates tables and experiments without one, and two doing so at once collide."""
    return FileLock(f"{uri.removeprefix(SQLITE)}.lock") if uri.startswith(SQLITE) else contextlib.nullcontext()


def is_away(error: Exception) -> bool:
    """Whether MLflow's client raised this because its server does not answer."""
    return isinstance(error, requests.RequestException) or bool(_AWAY.search(str(error)))


def _away(uri: str, error: Exception) -> AwayError:
    reason = shown(str(error)).splitlines()[0][:200]
    return AwayError(
        f"MLflow at {shown(uri)} does not answer ({reason}). Start its server or correct MLFLOW_TRACKING_URI, then run "
        "again: finished stages are kept."
    )


@contextlib.contextmanager
def away_errors(uri: str) -> Iterator[None]:
    """For MLflow's fluent calls, which `MlflowStore.call` cannot make: say when the server is away.

    Args:
        uri: of the store that they speak to; its password is in no message.

    Raises:
        AwayError: in place of what MLflow or its HTTP client raised; other exceptions pass unchanged.
    """
    try:
        yield
    except (MlflowException, requests.RequestException) as error:
        if not is_away(error):
            raise
        raise _away(uri, error) from None  # the cause has the address as given, password and all


@dataclass(frozen=True)
class MlflowStore:
    """One MLflow store: a server, or a database in a file.

    Attributes:
        uri: MLflow's tracking URI.
        artifact_root: folder below which a local store keeps artifacts; a server has its own and ignores it.
    """

    uri: str
    artifact_root: str

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call the client; wait and try again while the store is busy.

        A server that does not answer is waited for by MLflow's own client, a locked SQLite file here.

        Raises:
            AwayError: the store stayed away for longer than that.
            QAdapterError: the database cannot be written to.
        """
        for pause in (*_PAUSES, None):
            try:
                return getattr(_client(self.uri, self.artifact_root, os.getpid()), method)(*arguments, **options)
            except (MlflowException, requests.RequestException) as error:
                text = shown(str(error))
                for sign, advice in _UNWRITABLE.items():
                    if sign in text:
                        raise QAdapterError(
                            f"MLflow's database {shown(self.uri)} cannot be written: {advice}, then run again. "
                            "Finished stages are kept."
                        ) from error
                busy = isinstance(error, MlflowException) and (
                    # another run wrote the same data set's row first: the next try finds it there
                    error.error_code == "TEMPORARILY_UNAVAILABLE" or "unique constraint" in text.lower()
                )
                if busy and pause is not None:
                    _LOGGER.warning("MLflow is busy; trying again in %.1f s", pause)
                    time.sleep(pause)
                elif busy or is_away(error):
                    raise _away(self.uri, error) from None  # the cause has the address as given, password and all
                else:
                    raise
        raise AssertionError("unreachable")

    def is_there(self) -> bool:
        """Whether a server accepts requests, asked once and quickly; a database is taken to be there."""
        if not self.uri.startswith("http"):
            return True
        try:
            with urllib.request.urlopen(f"{self.uri.rstrip('/')}/health", timeout=_PROBE_SECONDS):
                return True
        except urllib.error.HTTPError as error:
            return error.code < 500  # it answers; whether it has a page of this name does not matter
        except (OSError, ValueError):
            return False

    def create_experiment(self, name: str) -> Any:
        """Create an experiment, with its artifacts below `artifact_root`; it is no error if another was faster."""
        if self.uri.startswith(SQLITE):  # a client would put its artifacts below the current directory
            SqlAlchemyStore(self.uri, self.artifact_root).create_experiment(name)
        else:
            try:
                self.call("create_experiment", name)
            except MlflowException as error:  # another machine's process was faster
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
        return self.call("get_experiment_by_name", name)

    def write(self, entry: Entry, run: str) -> None:
        """Do one write of `tracking.Tracker`, at once or out of its spool; doing it again changes nothing.

        Args:
            entry: what to write.
            run: id of the run.
        """
        match entry["what"]:
            case "batch":
                self.call(
                    "log_batch",
                    run,
                    metrics=[Metric(*metric) for metric in entry.get("metrics", ())],
                    params=[Param(*param) for param in entry.get("params", ())],
                    tags=[RunTag(*tag) for tag in entry.get("tags", ())],
                )
            case "finish":
                self.call("set_terminated", run, entry["status"], entry["time"])
            case "dataset":
                dataset = Dataset(
                    entry["name"], entry["digest"], entry["type"], entry["source"], profile=entry["profile"]
                )
                tag = InputTag("mlflow.data.context", entry["context"])
                self.call("log_inputs", run, [DatasetInput(dataset, [tag])])
            case "folder":
                self._upload(run, Path(entry["path"]), entry["artifact_path"], entry["max_bytes"])
            case "file":
                self._store("log_artifact", run, entry["path"], entry["artifact_path"])
            case "text":
                self._store("log_text", run, entry["text"], entry["artifact_file"])
            case "table":
                self._write_table(run, entry["columns"], entry["artifact_file"])
            case unknown:
                raise ValueError(f"{unknown!r} is nothing that could be told to MLflow.")

    def _write_table(self, run: str, columns: Mapping[str, Sequence[Any]], artifact_file: str) -> None:
        """Store a table as MLflow's `log_table` does, but whole: that one appends, and a repeat doubles the rows."""
        text = pd.DataFrame(dict(columns)).to_json(orient="split", index=False, date_format="iso")
        self._store("log_text", run, text, artifact_file)
        # The UI finds the tables of a run by this tag.
        tables = json.loads(self.call("get_run", run).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
        table = {"path": artifact_file, "type": "table"}
        if table not in tables:
            self.call("set_tag", run, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*tables, table]))

    def _upload(self, run_id: str, path: Path, artifact_path: str | None, max_bytes: int | None) -> None:
        files = list_files(path)
        large = {
            name: file for name, file in files.items() if max_bytes is not None and file.stat().st_size > max_bytes
        }
        if not large:
            self._store("log_artifacts", run_id, str(path), artifact_path)
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
            self._store("log_artifacts", run_id, staging, artifact_path)

    def _store(self, method: str, *arguments: Any) -> None:
        with storage_errors(Path(self.artifact_root)):
            self.call(method, *arguments)
