"""Servers that go away and come back, disks that are full, folders that cannot be written: nothing is lost."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from mlflow import MlflowClient

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import storage_errors
from tasks.stages.store import StageStore
from tasks.tracking.tracker import Tracker
from tests.support.commands import subcommand
from tests.support.real_runs import RealHome, Server, Undisturbed, mlflow_server, wait_for

main = subcommand("run")

MODULE = "qadapter.errors"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    running = mlflow_server(tmp_path_factory.mktemp("server")).start()
    try:
        yield running
    finally:
        running.send(signal.SIGCONT)
        running.send(signal.SIGKILL)


@pytest.fixture
def _impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """MLflow's client gives up after a second, so that a test need not wait a minute for the spool to take over."""
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR", "0")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_BACKOFF_JITTER", "0")


# ---- MLflow


@pytest.mark.slow
def test_a_short_absence_is_waited_for(server: Server, tmp_path: Path) -> None:
    """A server that stands still for three seconds, as a busy one may."""
    tracker = Tracker(server.url, str(tmp_path / "mlruns"))
    parent = tracker.start_parent("short", "x")
    server.send(signal.SIGSTOP)
    timer = threading.Timer(3.0, server.send, [signal.SIGCONT])
    timer.start()
    start = time.monotonic()
    tracker.log_metrics(parent, {"train/loss": 0.5})
    timer.join()
    assert time.monotonic() - start > 2.5
    assert MlflowClient(server.url).get_run(parent).data.metrics == {"train/loss": 0.5}
    assert not (tmp_path / ".qadapter/spool").exists()


@pytest.mark.slow
@pytest.mark.usefixtures("_impatient")
def test_what_a_server_missed_is_delivered_once(
    server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Killed in the middle of a run: runs, curves, parameters, data sets, files and states arrive when it is back."""
    tracker = Tracker(server.url, str(tmp_path / "mlruns"))
    parent = tracker.start_parent("outage", "parent", {"seed": 1})
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter.txt").write_text("weights")

    def log_all(run: str) -> None:
        tracker.log_params(run, {"lr": 0.1})
        tracker.log_history(run, [{"step": step, "train/loss": 1 / (step + 1)} for step in range(5)])
        tracker.log_metrics(run, {"adaptation/score": 0.75})
        tracker.log_tags(run, {"cached.train": True})
        tracker.log_dataset(run, "hh", "/data/hh", "ab" * 32)
        tracker.log_folder(run, folder, "train")
        tracker.log_file(run, folder / "adapter.txt", "single")
        tracker.log_text(run, "# Gate", "gate.md")
        tracker.log_table(run, {"prompt": ["a"], "answer": ["b"]}, "answers.json")

    before = tracker.start_child(parent, "before", {"alpha": 1})
    server.send(signal.SIGKILL)
    log_all(before)
    tracker.finish(before)
    during = tracker.start_child(parent, "during", {"alpha": 2})
    below = tracker.start_child(during, "below")
    log_all(during)
    ended = time.time()
    tracker.finish(below)
    tracker.finish(during, "FAILED")
    (spool,) = (tmp_path / ".qadapter/spool").glob("*[0-9a-f].jsonl")
    kept = spool.read_bytes()
    assert not tracker.deliver()
    assert "does not answer" in caplog.text

    server.start()
    assert tracker.deliver(patience=30)
    assert not spool.exists()
    spool.write_bytes(kept)  # as if this process had been killed before it could note that all was delivered
    tracker.log_metrics(during, {"after": 1.0})  # a ticket stays good, and the rest goes first
    assert not spool.exists()
    tracker.finish(parent)

    client = MlflowClient(server.url)
    runs = {run.info.run_name: run for run in client.search_runs([client.get_run(parent).info.experiment_id])}
    assert {name: run.info.status for name, run in runs.items()} == {
        "parent": "FINISHED", "before": "FINISHED", "during": "FAILED", "below": "FINISHED"
    }  # fmt: skip
    assert runs["before"].info.run_id == before
    assert runs["during"].data.tags["mlflow.parentRunId"] == parent
    assert runs["below"].data.tags["mlflow.parentRunId"] == runs["during"].info.run_id
    assert abs(runs["during"].info.end_time / 1000 - ended) < 5, "the time of the end, not of its delivery"
    assert runs["during"].data.metrics["after"] == 1.0
    for name, alpha in (("before", "1"), ("during", "2")):
        run = runs[name]
        assert run.data.params == {"alpha": alpha, "lr": "0.1"}
        history = client.get_metric_history(run.info.run_id, "train/loss")
        assert [(metric.step, metric.value) for metric in history] == [(step, 1 / (step + 1)) for step in range(5)]
        assert run.data.metrics["adaptation/score"] == 0.75
        assert run.data.tags["cached.train"] == "True"
        assert [entry.dataset.name for entry in run.inputs.dataset_inputs] == ["hh"]
        table = json.loads(Path(client.download_artifacts(run.info.run_id, "answers.json")).read_text())
        assert table["data"] == [["a", "b"]], "once, though delivered twice"
        names = {file.path for file in client.list_artifacts(run.info.run_id)}
        assert names == {"train", "single", "gate.md", "answers.json"}
        assert [file.path for file in client.list_artifacts(run.info.run_id, "train")] == ["train/adapter.txt"]


@pytest.mark.slow
@pytest.mark.usefixtures("_impatient")
def test_what_it_refuses_is_put_aside(server: Server, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One impossible entry, a line cut by a power cut: the others arrive."""
    tracker = Tracker(server.url, str(tmp_path / "mlruns"))
    parent = tracker.start_parent("refused", "x")
    outbox = tracker._outbox
    outbox.spool.append({"what": "batch", "run": "0" * 32, "tags": [["a", "b"]]})
    with outbox.spool.file.open("ab") as stream:
        stream.write(b'{"what": "batch", "run": "')
    outbox.spool.append({"what": "batch", "run": parent, "tags": [["good", "yes"]]})
    assert tracker.deliver()
    assert MlflowClient(server.url).get_run(parent).data.tags["good"] == "yes"
    assert "refused a pending write" in caplog.text
    refused = [json.loads(line) for line in outbox.spool.file.with_suffix(".refused.jsonl").read_text().splitlines()]
    assert [entry["run"] for entry in refused] == ["0" * 32]


# ---- a whole flow run while both servers are away


@pytest.mark.slow
def test_a_run_outlives_both_servers(
    undisturbed: Undisturbed, prefect_server: Server, data_server: str, server: Server, tmp_path: Path
) -> None:
    """Both are killed in the middle of a training and come back behind its end: the run ends as any other."""
    impatient = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "0"}
    home = RealHome(tmp_path, prefect_server, data_server, {"MLFLOW_TRACKING_URI": server.url, **impatient})
    process = home.start()
    try:
        wait_for(lambda: list(home.store.glob("scratch/pretrain/*")), 400, "a training", home.printed)
        for one in (server, prefect_server):
            one.send(signal.SIGKILL)
        wait_for(lambda: "pretrain" in home.finished(), 400, "the base", home.printed)
        wait_for(lambda: list((home.store / "spool").glob("*[0-9a-f].jsonl")), 400, "the spool", home.printed)
    finally:
        for one in (server, prefect_server):
            one.start()
    process.join(timeout=400)
    assert process.exitcode == 0, home.printed()[-4000:]
    assert home.results() == undisturbed.home.results()
    with sqlite3.connect(server.log.parent / "server.db") as database:
        runs = database.execute(
            "SELECT r.name, r.status FROM runs r JOIN experiments e ON e.experiment_id = r.experiment_id "
            "WHERE e.name = 'full-paper-repro'"
        ).fetchall()
        rows = database.execute(
            "SELECT r.name, m.key, m.value FROM runs r JOIN tags t ON t.run_uuid = r.run_uuid "
            "JOIN latest_metrics m ON m.run_uuid = r.run_uuid "
            "WHERE t.key = 'mlflow.parentRunId' AND m.key NOT LIKE 'cost/%'"
        ).fetchall()
    measured: dict[str, dict[str, float]] = {}
    for name, key, value in rows:
        measured.setdefault(name, {})[key] = value
    expected = undisturbed.home.measured()
    assert {name: measured.get(name) for name in expected} == expected
    assert {status for _, status in runs} == {"FINISHED"}
    assert 2 * len(runs) == len(undisturbed.home.runs()), "those of two runs"


# ---- disks


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, check=False)
    if made.returncode:
        pytest.skip("mounting a small file system needs root; the test below does without")
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", place], check=True)  # a traceback can hold a file open


@dataclass
class ReadableHome(RealHome):
    """A workspace whose runs print to somewhere else, as its own disk may be read-only."""

    @property
    def log(self) -> Path:
        return self.folder.parent / "runs.log"


@pytest.mark.slow
def test_a_disk_that_became_read_only_loses_nothing(
    small_disk: Path, undisturbed: Undisturbed, prefect_server: Server, data_server: str
) -> None:
    """Between two runs, as a kernel mounts a disk again that had an error; then it is repaired."""
    subprocess.run(["mount", "-o", "remount,size=512m", small_disk], check=True)
    home = ReadableHome(small_disk, prefect_server, data_server)
    assert home.run(("pretrain", "renamed")) == -9
    finished = home.finished()
    assert finished == {"toy-world": 1, "prepare": 2, "quality": 2, "pretrain": 1}
    before = {file: file.stat().st_mtime_ns for file in small_disk.rglob("*") if file.is_file()}
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    said = len(home.printed())
    assert home.run() == 2
    sentence = f"error: nothing can be written to the workspace {small_disk}: Read-only file system. "
    assert sentence in home.printed()[said:]
    assert "Traceback" not in home.printed()[said:]
    assert {file: file.stat().st_mtime_ns for file in small_disk.rglob("*") if file.is_file()} == before
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    assert home.run() == 0, home.printed()[-4000:]
    assert home.results() == undisturbed.home.results()
    assert home.measured() == undisturbed.home.measured()
    computed = home.printed()[said:].count(": done in ")
    assert computed == sum(home.finished().values()) - sum(finished.values()), "what was finished is not done again"


def stage(store: StageStore, name: str, size: int, checkpoint: int = 0) -> Path:
    """A stage that writes so many bytes, after a checkpoint."""

    def compute(out: Path, scratch: Path) -> None:
        if checkpoint and not (scratch / "checkpoint").exists():
            (scratch / "checkpoint").write_bytes(bytes(checkpoint))
        (out / "result").write_bytes(bytes(size))

    return store.run(name, module=MODULE, config={}, inputs={}, compute=compute).path


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_loses_nothing(small_disk: Path) -> None:
    store = StageStore(small_disk / "store")
    first = stage(store, "first", 100_000)
    with pytest.raises(QAdapterError, match=r"Cannot write .*second.*: the disk is full.*free some space"):
        stage(store, "second", 2_000_000, checkpoint=200_000)
    assert (first / "result").stat().st_size == 100_000
    assert [path.name for path in small_disk.glob("store/stages/*/*")] == [first.name], "and nothing half-written"
    assert [path.stat().st_size for path in small_disk.glob("store/scratch/second/*/checkpoint")] == [200_000]
    subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
    assert (stage(store, "second", 2_000_000, checkpoint=200_000) / "result").stat().st_size == 2_000_000


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="mounting a small file system needs root")
@pytest.mark.parametrize("opened", [False, True], ids=["by its path", "as a file"])
def test_a_disk_that_is_full_in_a_checkpoint_is_named(small_disk: Path, opened: bool) -> None:
    """torch reports it as a position in the file that it did not expect."""
    store = StageStore(small_disk / "store")

    def compute(_: Path, scratch: Path) -> None:
        state = {"exp_avg": torch.zeros(500_000)}
        if opened:
            with (scratch / "optimizer.pt").open("wb") as stream:
                torch.save(state, stream)
        else:
            torch.save(state, scratch / "optimizer.pt")

    with pytest.raises(QAdapterError, match=r"Cannot write .*train.*: the disk is full.*free some space") as caught:
        store.run("train", module=MODULE, config={}, inputs={}, compute=compute)
    assert isinstance(caught.value.__cause__, RuntimeError)


@pytest.mark.parametrize(
    "text",
    [
        "[enforce fail at inline_container.cc:672] . unexpected pos 576 vs 534",
        "[enforce fail at inline_container.cc:863] . PytorchStreamWriter failed writing file data/0: file write failed",
    ],
)
def test_torchs_words_for_a_full_disk_are_known(tmp_path: Path, text: str) -> None:
    with pytest.raises(QAdapterError, match="the disk is full"), storage_errors(tmp_path):
        raise RuntimeError(text)


def test_a_full_device_loses_nothing(tmp_path: Path) -> None:
    """The kernel's own refusal, without root: a device that is always full."""
    if not Path("/dev/full").exists():
        pytest.skip("/dev/full, the device that is always full, exists on Linux only")
    store = StageStore(tmp_path)
    first = stage(store, "first", 10)

    def compute(out: Path, _: Path) -> None:
        (out / "half").write_text("half")
        with Path("/dev/full").open("w") as full:
            full.write("x" * 100_000)

    with pytest.raises(QAdapterError, match="the disk is full"):
        store.run("second", module=MODULE, config={}, inputs={}, compute=compute)
    assert [path.name for path in tmp_path.glob("stages/*/*")] == [first.name]


def test_a_full_disk_below_mlflow_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SQLite's own limit on a file's pages stands for the disk's end."""
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path / "mlruns"))
    parent = tracker.start_parent("full", "x")
    import sqlalchemy

    def limit(connection: Any, _: Any) -> None:
        (pages,) = connection.execute("PRAGMA page_count").fetchone()
        connection.execute(f"PRAGMA max_page_count = {pages}")

    from tasks.tracking import store as mlflow_store

    store = mlflow_store._client(tracker.uri, os.getpid())._tracking_client.store
    store.engine.dispose()
    sqlalchemy.event.listen(store.engine, "connect", limit)
    monkeypatch.setattr(mlflow_store, "_PAUSES", (0.01,))
    rows = [{"step": step, "train/loss": float(step)} for step in range(5000)]
    with pytest.raises(QAdapterError, match=r"mlflow\.db cannot be written: the disk is full; free some space"):
        tracker.log_history(parent, rows)


def test_a_workspace_that_cannot_be_written_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Below a file, where not even root can write."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QADAPTER_HOME", str(tmp_path / "file" / "home"))
    start = time.monotonic()
    assert main(["--profile", "smoke"]) == 2
    assert time.monotonic() - start < 60
    message = capsys.readouterr().err
    assert f"error: nothing can be written to the workspace {tmp_path}/file/home" in message
    assert "QADAPTER_HOME" in message
    assert "Traceback" not in message


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_store_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    store = StageStore(tmp_path / "store")
    first = stage(store, "first", 10)
    real = Path.mkdir

    def refuse(self: Path, *arguments: Any, **options: Any) -> None:
        if "second" in str(self):
            raise OSError(code, os.strerror(code), str(self))
        real(self, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(QAdapterError, match=r"Cannot write .*second.*(disk is full|read-only|denied)"):
        stage(store, "second", 10)
    monkeypatch.setattr(Path, "mkdir", real)
    assert stage(store, "first", 10) == first
    assert stage(store, "second", 10).is_dir()
    shutil.rmtree(first)
