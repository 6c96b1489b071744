"""The way to MLflow, the only file that imports it: it waits, says what is wrong, and knows MLflow's entities."""

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

import pandas as pd
import requests

# MLflow decides at its import whether it reports usage to its makers; a user who wants that sets the variable.
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow import MlflowClient
from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag, ViewType
from mlflow.exceptions import InvalidUrlException, MlflowException, RestException
from mlflow.utils.file_utils import local_file_uri_to_path
from mlflow.utils.mlflow_tags import MLFLOW_LOGGED_ARTIFACTS
from mlflow.utils.validation import MAX_DATASET_DIGEST_SIZE, MAX_METRICS_PER_BATCH, MAX_PARAM_VAL_LENGTH

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
from tasks.tracking.spool import Entry

__all__ = [
    "MAX_DATASET_DIGEST_SIZE",
    "MAX_METRICS_PER_BATCH",
    "MAX_PARAM_VAL_LENGTH",
    "NOT_FOUND",
    "SQLITE",
    "AwayError",
    "MlflowStore",
    "RefusedError",
    "away_errors",
    "downloaded",
    "first_use",
    "is_away",
    "local_path",
    "status_of",
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
NOT_FOUND = "RESOURCE_DOES_NOT_EXIST"
"""MLflow's code of an error about something that it does not know."""
# The client asks again after 408, 429, 500, 502, 503 and 504, and tells the last of them in the first of these ways.
_STATUS = re.compile(r"too many (\d{3}) error responses|failed with error code (\d{3})")
# The last is a page of somebody in between, such as a login.
_NO_ANSWER = re.compile(r"failed with (timeout )?exception|not in a valid JSON format")
_WANTS_LOGIN, _LATER = 401, (401, 408, 429)
_LOGIN = "Set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
_ADVICE = {
    403: f" {_LOGIN} to those of somebody who may do that.",
    413: " A proxy before it limits the size of what is sent: raise the limit (nginx: client_max_body_size).",
}
_UNWRITABLE = {
    "disk is full": "the disk is full; free some space",
    "readonly database": "it is read-only; change its permissions or name another folder",
}
_PROBE_SECONDS = 3.0
_LOCK_SECONDS = 300.0  # creating the tables takes seconds
_DOWNLOAD_SECONDS = 7200.0  # a model over a slow line
_PAUSES = (0.2, 0.5, 1.0, 2.0, 4.0, 8.0)  # seconds between attempts; SQLite itself waits 20 s for a lock before each


class AwayError(QAdapterError):
    """MLflow did not answer for longer than is waited for, or only that it cannot now (5xx, 408, 429, 401)."""


class RefusedError(QAdapterError):
    """MLflow, or somebody between here and there, will not take or give what was asked, however often.

    Attributes:
        code: MLflow's name for the error, such as `NOT_FOUND`; empty where only a status of HTTP was answered.
        reason: what was answered, without the advice around it.
    """

    def __init__(self, message: str, code: str = "", reason: str = "") -> None:
        super().__init__(message)
        self.code, self.reason = code, reason


@lru_cache(maxsize=8)
def _client(uri: str, _process: int) -> MlflowClient:
    """One client a process: a database connection must not be shared with a forked child."""
    for name, value in _CLIENT_SETTINGS.items():  # MLflow reads them at each request; the user's own win
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
    return MlflowClient(uri)


def first_use(uri: str) -> contextlib.AbstractContextManager[Any]:
    """A lock between processes: MLflow creates tables and experiments without one, and two doing so at once collide."""
    if not uri.startswith(SQLITE):
        return contextlib.nullcontext()
    return held(Path(f"{uri.removeprefix(SQLITE)}.lock"), guards="MLflow's database", seconds=_LOCK_SECONDS)


def status_of(error: Exception) -> int | None:
    """The HTTP status behind what MLflow's client raised; None where there was none, or none is told."""
    if isinstance(error, requests.RequestException):
        return None if error.response is None else error.response.status_code
    found = None if isinstance(error, RestException) else _STATUS.search(str(error))
    return int(found[1] or found[2]) if found else None


def is_away(error: Exception) -> bool:
    """Whether MLflow's client raised this because its server does not answer, or cannot answer now.

    A status below 500 is a refusal, but for those that say "later" or "who are you?"; MLflow's own errors of 5xx never
    come as a `RestException`, because its client asks again.
    """
    if (status := status_of(error)) is not None:
        return status >= 500 or status in _LATER
    if isinstance(error, RestException):
        return False
    return isinstance(error, requests.RequestException) or bool(_NO_ANSWER.search(str(error)))


def _reason(error: Exception) -> str:
    """What an error says, on one line and without what is secret in an address."""
    return " ".join(shown(str(error)).split())[:300] or type(error).__name__


def _away(uri: str, error: Exception) -> AwayError:
    status, where = status_of(error), f"MLflow at {shown(uri)}"
    if status == _WANTS_LOGIN:
        return AwayError(f"{where} asks who is there (status 401). {_LOGIN}, then run again: finished stages are kept.")
    if status is not None:
        return AwayError(
            f"{where} answers with an error of its own (status {status}), again and again. Look into its server's log, "
            "then run again: finished stages are kept."
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
    if isinstance(error, RestException) and code == "INTERNAL_ERROR":  # JSON of somebody else: MLflow's own is a 500
        code = ""
    reason = _reason(error)
    return RefusedError(f"MLflow at {shown(uri)} refused {what} ({reason}).{advice}", code, reason)


@contextlib.contextmanager
def away_errors(uri: str) -> Iterator[None]:
    """For MLflow's fluent calls, which `MlflowStore.call` cannot make: say when the server is away or refuses.

    Args:
        uri: of the store that they speak to; its password is in no message.

    Raises:
        AwayError: in place of what MLflow or its HTTP client raised.
        RefusedError: the same, where the server answered; exceptions of others pass unchanged.
    """
    try:
        yield
    except (MlflowException, requests.RequestException) as error:
        # The cause has the address as given, password and all.
        raise (_away(uri, error) if is_away(error) else _refused(uri, "this", error)) from None


def local_path(artifact_uri: str) -> Path | None:
    """Where artifacts lie on this machine, to be read there and not copied; None if they must be fetched."""
    return Path(local_file_uri_to_path(artifact_uri)) if urlsplit(artifact_uri).scheme in ("", "file") else None


def downloaded(place: Path, path: str, fetch: Callable[[Path], Any], holds: Callable[[Path], bool]) -> Path:
    """Artifacts of another machine: fetched once, kept, and only ever there whole.

    Args:
        place: folder that keeps them, named after what they are.
        path: of the artifacts, as MLflow knows it.
        fetch: has them copied below the folder that it is given, where MLflow puts them: under `path`.
        holds: whether what is kept is still good; if not, it is fetched again.

    Returns:
        Where they lie now.

    Raises:
        QAdapterError: the disk is full or cannot be written to; or what `fetch` raises.
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
        artifact_root: folder below which a local store keeps artifacts; a server has its own and ignores it.
    """

    uri: str
    artifact_root: str

    def call(self, method: str, *arguments: Any, **options: Any) -> Any:
        """Call the client; wait and try again while the store is busy.

        A server that does not answer, or with an error of its own, is waited for by MLflow's own client, a locked
        SQLite file here.

        Raises:
            AwayError: the store stayed away for longer than that.
            RefusedError: it answered that it will not.
            QAdapterError: the database cannot be written to.
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
        """Create an experiment; it is no error if another was faster.

        Artifacts of a local store lie below `artifact_root`, in a folder of the experiment's number, as MLflow has it;
        by default that would be below the current directory. A server has its own place for them. The caller holds
        `first_use`.
        """
        place = {}
        if self.uri.startswith(SQLITE):
            known = self.call("search_experiments", view_type=ViewType.ALL, max_results=50_000)
            number = 1 + max((int(one.experiment_id) for one in known), default=0)
            place = {"artifact_location": f"{self.artifact_root}/{number}"}
        try:
            self.call("create_experiment", name, **place)
        except RefusedError as error:  # another machine's process was faster
            if error.code != "RESOURCE_ALREADY_EXISTS":
                raise
        return self.call("get_experiment_by_name", name)

    def write(self, entry: Entry, run: str) -> None:
        """Do one write of `tracking.Tracker`, at once or out of its spool; doing it again changes nothing.

        Args:
            entry: what to write.
            run: id of the run.

        Raises:
            AwayError: the store is away.
            RefusedError: it will not take that; of a folder, all files were sent that it takes.
            FileNotFoundError: the file or folder to send is gone.
            QAdapterError: a disk of this machine is full or cannot be written to.
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
        """Send a folder; where one of its files is refused, the others all the same."""
        try:
            self._store("log_artifacts", run_id, str(folder), artifact_path)
            return
        except RefusedError as error:
            if error.code:  # what MLflow itself says is about the run, not about a file
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
