"""Calls to an MLflow store: retries, error messages, and conversion to MLflow's entities."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

import requests
from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag, ViewType
from mlflow.exceptions import InvalidUrlException, MlflowException, RestException
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS
from mlflow.utils.validation import (
    MAX_DATASET_DIGEST_SIZE,
    MAX_ENTITY_KEY_LENGTH,
    MAX_METRICS_PER_BATCH,
    MAX_PARAM_VAL_LENGTH,
    MAX_TAG_VAL_LENGTH,
)

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import (
    atomic_folder,
    digest_file,
    list_files,
    remove_leftovers,
    storage_errors,
    write_json,
)
from qadapter.files.locks import held
from qadapter.files.shown import shown
from tasks.stages.retries import retrying
from tasks.tracking.journal import write_ahead
from tasks.tracking.logged_models import log_model, model_of
from tasks.tracking.spool import Entry

__all__ = [
    "KIND_TAG",
    "MAX_DATASET_DIGEST_SIZE",
    "MAX_ENTITY_KEY_LENGTH",
    "MAX_METRICS_PER_BATCH",
    "MAX_PARAM_VAL_LENGTH",
    "MAX_TAG_VAL_LENGTH",
    "MODEL_TRAINING",
    "NOT_FOUND",
    "SQLITE",
    "AwayError",
    "MlflowStore",
    "RefusedError",
    "away_errors",
    "downloaded",
    "first_use",
    "import_for_database",
    "is_away",
    "local_path",
    "status_of",
]

_LOGGER = logging.getLogger(__name__)
SQLITE = "sqlite:///"
_CLIENT_SETTINGS = {
    # Wait 2, 4, ... 32 s for an unavailable server: a minute instead of four by default. Then writes are queued.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "5",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "30",
    # One log line with the address of each run at its end: a flow run has dozens.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
KIND_TAG, MODEL_TRAINING = "mlflow.experimentKind", "custom_model_development"
"""Tag by which MLflow's page opens an experiment in its view of model training; without it, in that of GenAI."""
NOT_FOUND = "RESOURCE_DOES_NOT_EXIST"
"""MLflow's error code for an unknown entity."""
# The client retries after 408, 429, 500, 502, 503 and 504, and reports the last status in the first of these forms.
_STATUS = re.compile(r"too many (\d{3}) error responses|failed with error code (\d{3})")
# The last is a page of a proxy, such as a login page.
_NO_ANSWER = re.compile(r"failed with (timeout )?exception|not in a valid JSON format")
_WANTS_LOGIN, _LATER = 401, (401, 408, 429)
_LOGIN = "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
_ADVICE = {
    403: f" {_LOGIN} to those of a user with this permission.",
    413: " A proxy before it limits the size of what is sent: raise the limit (nginx: client_max_body_size).",
}
_UNWRITABLE = {
    "disk is full": "the disk is full; free some space",
    "readonly database": "it is read-only; change its permissions or give another folder",
}
_PROBE_SECONDS = 3.0
_LOCK_SECONDS = 300.0  # creating the tables takes seconds
_DOWNLOAD_SECONDS = 7200.0  # enough for a model over a slow connection
_PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between attempts; SQLite itself waits 20 s for a lock before each


class AwayError(QAdapterError):
    """MLflow did not answer in time, or answered that it cannot now (5xx, 408, 429, 401)."""


class RefusedError(QAdapterError):
    """MLflow, or a proxy, refuses a request; repeating it does not help.

    Attributes:
        code: MLflow's error code, such as `NOT_FOUND`; empty if there was only an HTTP status.
        reason: the answer, without our advice.
    """

    def __init__(self, message: str, code: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.code, self.reason = code, reason


@lru_cache(maxsize=8)
def _client(uri: str, _process: int) -> MlflowClient:
    """One client per process: a database connection must not be shared with a forked child."""
    for name, value in _CLIENT_SETTINGS.items():  # MLflow reads them at each request; the user's take precedence
        os.environ.setdefault(name, value)
    if uri.startswith(SQLITE):
        database = Path(uri.removeprefix(SQLITE))
        with storage_errors(database):
            database.parent.mkdir(parents=True, exist_ok=True)
            with first_use(uri):
                if not database.exists():
                    for name in ("alembic", "mlflow.store.db.utils"):  # some sixty lines about tables
                        logging.getLogger(name).setLevel(logging.WARNING)
                    MlflowClient(uri).search_experiments(max_results=1)  # which makes them, under the lock
                write_ahead(database)
    return MlflowClient(uri)


def import_for_database() -> None:
    """Import and prepare what the first call of a store in a SQLite file takes, so that forked processes have it."""
    from mlflow.store.tracking import sqlalchemy_store  # noqa: F401
    from sqlalchemy.orm import configure_mappers

    configure_mappers()


def first_use(uri: str) -> contextlib.AbstractContextManager[Any]:
    """A lock between processes that create tables and experiments, which MLflow itself does without a lock."""
    if not uri.startswith(SQLITE):
        return contextlib.nullcontext()
    return held(Path(f"{uri.removeprefix(SQLITE)}.lock"), guards="MLflow's database", seconds=_LOCK_SECONDS)


def status_of(error: Exception) -> int | None:
    """The HTTP status behind an error of MLflow's client; None if there was none or it is unknown."""
    if isinstance(error, requests.RequestException):
        return None if error.response is None else error.response.status_code
    found = None if isinstance(error, RestException) else _STATUS.search(str(error))
    return int(found[1] or found[2]) if found else None


def is_away(error: Exception) -> bool:
    """Whether MLflow's client raised this error because the server does not answer, or cannot answer now.

    A status below 500 is a refusal, except those that ask to wait or to log in. MLflow's own 5xx errors never arrive as
    a `RestException`, because its client retries them.
    """
    if (status := status_of(error)) is not None:
        return status >= 500 or status in _LATER
    if isinstance(error, RestException):
        return False
    return isinstance(error, requests.RequestException) or bool(_NO_ANSWER.search(str(error)))


def _reason(error: Exception) -> str:
    """The first line of an error's message, with secrets in addresses masked."""
    return " ".join(shown(str(error)).split())[:300] or type(error).__name__


def _away(uri: str, error: Exception) -> AwayError:
    status, where = status_of(error), f"MLflow at {shown(uri)}"
    if status == _WANTS_LOGIN:
        return AwayError(f"{where} requires a login (status 401). {_LOGIN}, then run again: finished stages are kept.")
    if status is not None:
        return AwayError(
            f"{where} repeatedly answers with a server error (status {status}). Check the log of its server, then run "
            "again: finished stages are kept."
        )
    return AwayError(
        f"{where} does not answer ({_reason(error)}). Start its server or correct MLFLOW_TRACKING_URI, then run again: "
        "finished stages are kept."
    )


def _refused(uri: str, what: str, error: MlflowException | requests.RequestException) -> RefusedError:
    status = status_of(error)
    advice = _ADVICE.get(status or 0, "")
    if isinstance(error, InvalidUrlException):
        advice = " Correct MLFLOW_TRACKING_URI."
    code = error.error_code if isinstance(error, MlflowException) and status is None else ""
    if isinstance(error, RestException) and code == "INTERNAL_ERROR":  # JSON of another program: MLflow's own is a 500
        code = ""
    reason = _reason(error)
    return RefusedError(f"MLflow at {shown(uri)} refused {what} ({reason}).{advice}", code, reason)


@contextlib.contextmanager
def away_errors(uri: str) -> Iterator[None]:
    """Translate errors of MLflow's fluent calls, which `MlflowStore.call` cannot make, into ours.

    Args:
        uri: the URI of their store; messages mask its password.

    Raises:
        AwayError: the server is unavailable.
        RefusedError: the server refused the request. Exceptions of other libraries pass unchanged.
    """
    try:
        yield
    except (MlflowException, requests.RequestException) as error:
        # The cause contains the address with its password.
        raise (_away(uri, error) if is_away(error) else _refused(uri, "this", error)) from None


def local_path(artifact_uri: str) -> Path | None:
    """The local path of artifacts, which are then read in place; None if they must be downloaded."""
    return Path(local_file_uri_to_path(artifact_uri)) if urlsplit(artifact_uri).scheme in ("", "file") else None


def downloaded(place: Path, path: str, fetch: Callable[[Path], Any], holds: Callable[[Path], bool]) -> Path:
    """Download artifacts of another machine once and keep them; the folder appears only when it is complete.

    Args:
        place: the folder that keeps them.
        path: MLflow's path of the artifacts.
        fetch: downloads them below the given folder, where MLflow puts them under `path`.
        holds: whether the kept copy is still valid; if not, it is downloaded again.

    Returns:
        The local path of the artifacts.

    Raises:
        QAdapterError: the disk is full or read-only; or as `fetch` raises.
    """
    lock = place.with_name(f"{place.name}.lock")
    with held(lock, guards=f"the download of {path}", seconds=_DOWNLOAD_SECONDS):
        if not (place / path).exists() or not holds(place / path):
            remove_leftovers(place)
            with atomic_folder(place, replace=True) as folder:
                fetch(folder)
    return place / path


def _unwritable(error: BaseException) -> str | None:
    """What to do where an error means that the database cannot be written to; None for any other."""
    return next((advice for sign, advice in _UNWRITABLE.items() if sign in str(error)), None)


def _is_busy(error: BaseException) -> bool:
    """Whether the next attempt may succeed: the store is busy, or another run wrote the same data set's row first."""
    return (
        isinstance(error, MlflowException)
        and not _unwritable(error)
        and (error.error_code == "TEMPORARILY_UNAVAILABLE" or "unique constraint" in str(error).lower())
    )


@dataclass(frozen=True)
class MlflowStore:
    """One MLflow store: a server, or a database in a file.

    Attributes:
        uri: MLflow's tracking URI.
        artifact_root: folder of a local store's artifacts; ignored for a server, which has its own.
    """

    uri: str
    artifact_root: str

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of the client, with retries while the store is busy.

        MLflow's client waits for a server that does not answer or fails; a locked SQLite file is waited for here.

        Raises:
            AwayError: the store stayed unavailable for longer.
            RefusedError: the store refused the request.
            QAdapterError: the database is not writable.
        """
        client = retrying(
            _PAUSES, _is_busy, lambda _, pause: _LOGGER.warning("MLflow is busy; trying again in %.1f s", pause)
        )
        try:
            # The client is looked up in each attempt: it belongs to a process, and a fork may have made this one.
            return client(lambda: getattr(_client(self.uri, os.getpid()), method)(*arguments, **options))
        except (MlflowException, requests.RequestException) as error:
            if advice := _unwritable(error):
                raise QAdapterError(
                    f"MLflow's database {shown(self.uri)} cannot be written: {advice}, then run again. "
                    "Finished stages are kept."
                ) from error
            # `from None`: the cause has the address as given, password and all.
            if _is_busy(error) or is_away(error):
                raise _away(self.uri, error) from None
            raise _refused(self.uri, method, error) from None

    def is_there(self) -> bool:
        """Whether a server accepts requests, checked once with a short timeout; a database counts as available."""
        if not self.uri.startswith("http"):
            return True
        try:
            with urllib.request.urlopen(f"{self.uri.rstrip('/')}/health", timeout=_PROBE_SECONDS):
                return True
        except urllib.error.HTTPError as error:
            return error.code < 500  # it answers; the page itself does not matter
        except (OSError, ValueError):
            return False

    def create_experiment(self, name: str) -> Any:
        """Create an experiment; it is not an error if another process creates it first.

        Artifacts of a local store lie below `artifact_root`, in a folder of the experiment's number, as MLflow has it;
        by default that would be below the current directory. A server has its own place for them. The caller holds
        `first_use`.
        """
        place: dict[str, Any] = {"tags": {KIND_TAG: MODEL_TRAINING}}
        if self.uri.startswith(SQLITE):
            known = self.call("search_experiments", view_type=ViewType.ALL, max_results=50_000)
            number = 1 + max((int(one.experiment_id) for one in known), default=0)
            place["artifact_location"] = f"{self.artifact_root}/{number}"
        try:
            self.call("create_experiment", name, **place)
        except RefusedError as error:  # a process on another machine was faster
            if error.code != "RESOURCE_ALREADY_EXISTS":
                raise
        return self.call("get_experiment_by_name", name)

    def write(self, entry: Entry, run: str) -> None:
        """Do one write of `tracking.Tracker`, directly or from its spool; writes are idempotent.

        Args:
            entry: the write.
            run: id of the run.

        Raises:
            AwayError: the store is unavailable.
            RefusedError: the store refuses the write; of a folder, all accepted files were sent.
            FileNotFoundError: the file or folder to send does not exist any more.
            QAdapterError: a disk of this machine is full or read-only.
        """
        match entry["what"]:
            case "batch":
                of_model: dict[str, Any] = {}
                if "model_data" in entry:
                    name, digest = entry["model_data"]
                    if (model_id := model_of(self, run)) is not None:
                        of_model = {"model_id": model_id, "dataset_name": name, "dataset_digest": digest}
                self.call(
                    "log_batch",
                    run,
                    metrics=[Metric(*metric, **of_model) for metric in entry.get("metrics", ())],
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
            case "model":
                log_model(self, run, name=entry["name"], digest=entry["digest"], params=entry["params"])
            case "text":
                self._store("log_text", run, entry["text"], entry["artifact_file"])
            case "table":
                self._write_table(run, entry["columns"], entry["artifact_file"])
            case unknown:
                raise ValueError(f"{unknown!r} is not a kind of write.")

    def _write_table(self, run: str, columns: Mapping[str, Sequence[Any]], artifact_file: str) -> None:
        """Store a table like MLflow's `log_table`, but atomically: that one appends, and a repeat doubles rows."""
        import pandas as pd  # a quarter of a second, which a command need not wait for

        text = pd.DataFrame(dict(columns)).to_json(orient="split", index=False, date_format="iso")
        self._store("log_text", run, text, artifact_file)
        # The UI finds the tables of a run through this tag.
        tables = json.loads(self.call("get_run", run).data.tags.get(MLFLOW_LOGGED_ARTIFACTS, "[]"))
        table = {"path": artifact_file, "type": "table"}
        if table not in tables:
            self.call("set_tag", run, MLFLOW_LOGGED_ARTIFACTS, json.dumps([*tables, table]))

    def _upload(self, run_id: str, path: Path, artifact_path: str | None, max_bytes: int | None) -> None:
        if not path.is_dir():
            raise FileNotFoundError(f"the folder {path} is gone")
        files = list_files(path)
        large = {
            name: file for name, file in files.items() if max_bytes is not None and file.stat().st_size > max_bytes
        }
        if not large:
            self._send(run_id, path, artifact_path)
            return
        with storage_errors(Path(tempfile.gettempdir())), tempfile.TemporaryDirectory(prefix="qadapter-") as staging:
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
            self._send(run_id, Path(staging), artifact_path)

    def _send(self, run_id: str, folder: Path, artifact_path: str | None) -> None:
        """Send a folder; if one file is refused, the others are still sent."""
        try:
            self._store("log_artifacts", run_id, str(folder), artifact_path)
            return
        except RefusedError as error:
            if error.code:  # an error of MLflow itself concerns the run, not one file
                raise
        refused = {}
        for name, file in list_files(folder).items():
            among = PurePosixPath(artifact_path or "", name).parent
            try:
                self._store("log_artifact", run_id, str(file), None if among.name == "" else str(among))
            except RefusedError as error:
                refused[name] = str(error)
        if refused:
            raise RefusedError(f"{', '.join(refused)}: {next(iter(refused.values()))}")

    def _store(self, method: str, *arguments: Any) -> None:
        with storage_errors(Path(self.artifact_root)):
            self.call(method, *arguments)
