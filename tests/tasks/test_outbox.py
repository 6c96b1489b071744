"""What MLflow's answers mean: away, refused, or this machine's own trouble; nothing waits behind it for ever."""

from __future__ import annotations

import errno
import http.server
import json
import os
import tempfile
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from qadapter.errors import QAdapterError
from tasks.tracking import outbox
from tasks.tracking.store import NOT_FOUND, AwayError, MlflowStore, RefusedError
from tasks.tracking.tracker import Tracker

HTML = "<html>no</html>"
PASSWORD = "pa55" + "word"  # a traceback shows lines of code too


class _Answer(http.server.BaseHTTPRequestHandler):
    """Stands for MLflow, or a proxy before it: one answer to everything."""

    status, body = 200, "{}"

    def _answer(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        text = self.body.encode()
        self.send_response(self.status)
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PUT = _answer  # noqa: N815 - the server's own names

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[MlflowStore]:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answer) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield MlflowStore(f"http://me:{PASSWORD}@127.0.0.1:{server.server_port}", str(tmp_path / "mlruns"))
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "body", "kind", "says"),
    [
        (
            500,
            HTML,
            AwayError,
            "repeatedly answers with a server error (status 500). Check the log of its server",
        ),
        (502, HTML, AwayError, "(status 502)"),
        (503, HTML, AwayError, "(status 503)"),
        (520, HTML, AwayError, "(status 520)"),
        (408, HTML, AwayError, "(status 408)"),
        (429, HTML, AwayError, "(status 429)"),
        (401, "You are not authenticated", AwayError, "requires a login (status 401). Set MLFLOW_TRACKING_USERNAME"),
        (200, "<html>Sign in</html>", AwayError, "does not answer (API request to endpoint was successful but"),
        (403, HTML, RefusedError, "those of a user with this permission"),
        (403, '{"error": "no"}', RefusedError, "{'error': 'no'}"),
        (413, HTML, RefusedError, "raise the limit (nginx: client_max_body_size)"),
        (
            404,
            '{"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "gone"}',
            RefusedError,
            "refused get_run (RESOURCE",
        ),
    ],
)
def test_what_a_status_means(
    store: MlflowStore, status: int, body: str, kind: type[QAdapterError], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Said without the address's password, which MLflow's own text has. Uploads: test_mlflow_server.py."""
    monkeypatch.setattr(_Answer, "status", status)
    monkeypatch.setattr(_Answer, "body", body)
    with pytest.raises(kind) as caught:
        store.call("get_run", "0" * 32)
    assert says in str(caught.value)
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))
    if isinstance(caught.value, RefusedError):
        assert caught.value.code == (NOT_FOUND if status == 404 else "")


@pytest.mark.parametrize(
    ("address", "kind", "says"),
    [
        ("http://me:{}@127.0.0.1:99999", RefusedError, "(Invalid url: http://127.0.0.1:99999/"),
        ("http://me:{}@127.0.0.1:9", AwayError, "does not answer"),
    ],
)
def test_an_unreachable_address_is_shown_without_password(
    address: str, kind: type[QAdapterError], says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(kind) as caught:
        Tracker(address.format(PASSWORD), str(tmp_path / "mlruns")).start_parent("x", "y")
    assert says in str(caught.value)
    assert "MLFLOW_TRACKING_URI" in str(caught.value)
    assert PASSWORD not in "".join(traceback.format_exception(caught.value))


# ---- this machine's own trouble, on SQLite


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    root = tmp_path_factory.mktemp("project")
    return Tracker(f"sqlite:///{root}/mlflow.db", str(root / "mlruns"))


@pytest.fixture(scope="module")
def run(tracker: Tracker) -> str:
    return tracker.start_parent("outbox", "x")


@pytest.fixture(autouse=True)
def _at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A delivery that failed is begun again without a pause."""
    monkeypatch.setattr(outbox, "_ASK_AGAIN", 0.0)
    monkeypatch.setattr(outbox.Outbox, "_pause", lambda *_: None)


def spooled(tracker: Tracker, *entries: dict[str, Any]) -> None:
    for entry in entries:
        tracker._outbox.spool.append(entry)


def tag(run: str, name: str) -> dict[str, Any]:
    return {"what": "batch", "run": run, "tags": [[name, "yes"]]}


def test_a_full_temporary_folder_keeps_pending_writes(
    tracker: Tracker, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Files that are left out of a folder's copy are listed in one that is made there."""
    (tmp_path / "large.bin").write_bytes(b"x" * 100)
    folder = {"what": "folder", "run": run, "path": str(tmp_path), "artifact_path": "some", "max_bytes": 10}
    spooled(tracker, tag(run, "before"), folder, tag(run, "after"))
    spool = tracker._outbox.spool

    def full(*_: Any, **__: Any) -> str:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(tempfile, "mkdtemp", full)
        for _ in range(7):
            assert not tracker.deliver()
    assert "the disk is full" in caplog.text
    assert spool.entries() == [folder, tag(run, "after")], "what was delivered is not sent again"
    assert not spool.refused.exists()
    assert tracker.deliver()
    client = MlflowClient(tracker.uri)
    assert {"before", "after"} <= client.get_run(run).data.tags.keys()
    assert [file.path for file in client.list_artifacts(run, "some")] == ["some/references.json"]


def test_what_is_gone_from_here_is_put_aside(tracker: Tracker, run: str, tmp_path: Path) -> None:
    lost = {"what": "folder", "run": run, "path": str(tmp_path / "gone"), "artifact_path": "gone", "max_bytes": None}
    spooled(tracker, lost, tag(run, "behind"))
    assert tracker.deliver()
    assert MlflowClient(tracker.uri).get_run(run).data.tags["behind"] == "yes"
    spool = tracker._outbox.spool
    (refused,) = [json.loads(line) for line in spool.refused.read_text().splitlines()]
    spool.refused.unlink()
    assert refused == {"reason": f"the folder {tmp_path / 'gone'} is gone", **lost}


def test_a_spool_that_cannot_be_written_stays_as_it_is(
    tracker: Tracker, run: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full: what was delivered cannot be taken out of the file, so it is delivered again."""
    entries = [tag(run, "one"), {"what": "nothing we know", "run": run}, tag(run, "three")]
    spooled(tracker, *entries)
    spool = tracker._outbox.spool

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert not tracker.deliver()
    assert spool.entries() == entries
    assert tracker.deliver()
    assert {"one", "three"} <= MlflowClient(tracker.uri).get_run(run).data.tags.keys()
    assert "nothing we know" in spool.refused.read_text()
