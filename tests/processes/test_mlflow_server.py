"""MLflow for several machines: a real server, which keeps the artifacts where `--artifacts-destination` says.

Where a test needs answers that are not MLflow's, its own server's code runs in this process, behind something that
answers in its place.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient
from werkzeug.serving import WSGIRequestHandler, make_server

import qadapter
from qadapter.config.model import ModelSettings
from qadapter.errors import QAdapterError
from qadapter.files.artifacts import digest_tree
from qadapter.serving.registered import DamagedError
from tasks.tracking import outbox
from tasks.tracking.models import check_files, find_adapter, find_served_model, log_served_model
from tasks.tracking.registry import Candidate, Registry
from tasks.tracking.store import RefusedError
from tasks.tracking.tracker import Tracker
from tests.support.commands import subcommand
from tests.support.damage import cut, damaged
from tests.support.real_runs import mlflow_server

serve_model = subcommand("serve-model")


@pytest.mark.slow
def test_runs_and_artifacts_go_to_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two machines, each with a workspace of its own, write to one server, which keeps the files."""
    results, kept = tmp_path / "results", tmp_path / "server"
    for folder in (results, kept):
        folder.mkdir()
    (results / "metrics.json").write_text('{"train/final_loss": 0.25}')
    server = mlflow_server(kept).start()
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url)
        runs = []
        for machine in ("a", "b"):
            home = tmp_path / machine
            home.mkdir()
            tracker = Tracker.for_project(home)
            run = tracker.start_parent("shared", f"run of {machine}", params={"machine": machine})
            tracker.log_folder(run, results, "train")
            tracker.finish(run)
            runs.append(run)
            assert not (home / "mlflow.db").exists()
            assert not (home / "mlruns").exists()
    finally:
        server.send(signal.SIGKILL)
    copies = sorted((kept / "files").rglob("metrics.json"))
    assert len(copies) == 2
    assert all(any(run in str(copy) for copy in copies) for run in runs)
    assert copies[0].read_text() == '{"train/final_loss": 0.25}'


def promote_policy(folder: Path) -> None:
    """Log a base and an adapter, each of which says what it is, as machine `a`: the champion of `policy`."""
    base, adapter = folder / "base", folder / "adapter"
    for part, weights in ((base, "model.safetensors"), (adapter, "adapter_model.safetensors")):
        part.mkdir()
        (part / weights).write_text(part.name)
    tracker = Tracker.for_project(folder / "a")
    run = tracker.start_parent("customise", "candidate")
    uri = log_served_model(run, base=base, adapter=adapter, model=ModelSettings(pretrained="x", dtype="bfloat16"))
    registry = Registry(tracker, "policy", folder / "policy.lock")
    facts = {"base": "base", "data_digest": "0" * 64}
    candidate = Candidate("key", run, True, ["better"], None, facts, {"adaptation/score": 0.5}, {})
    registry.promote(registry.register(candidate, lambda: uri))


@pytest.mark.slow
def test_a_model_is_registered_at_the_server_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By another machine, which fetches no more than it asks for; the password of the address is written nowhere."""
    kept = tmp_path / "server"
    kept.mkdir()
    server = mlflow_server(kept).start()
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url.replace("http://", "http://me:pa55word@"))
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        monkeypatch.setenv("QADAPTER_HOME", str(tmp_path / "a"))
        promote_policy(tmp_path)

        monkeypatch.setenv("QADAPTER_HOME", str(tmp_path / "b"))
        alone = find_adapter("policy@champion")
        assert (alone / "adapter_model.safetensors").read_text() == "adapter"
        assert not list(alone.parent.rglob("model.safetensors")), "the base stays where it is"
        found = find_served_model("policy@champion")
        assert (found.adapter / "adapter_model.safetensors").read_text() == "adapter"
        assert (Path(found.base) / "model.safetensors").read_text() == "base"
        assert found.numerics == {"dtype": "bfloat16", "quantization": "none"}

        for unknown in ("policy@nobody", "policy/7", "other/1"):
            assert serve_model([unknown]) == 2
            assert f"{server.url} has no model '{unknown}'" in capsys.readouterr().err
    finally:
        server.send(signal.SIGKILL)
    assert serve_model(["policy@champion"]) == 2
    message = capsys.readouterr().err
    assert f"{server.url} does not answer" in message
    assert "has no model" not in message
    for file in [file for file in tmp_path.rglob("*") if file.is_file()]:
        assert b"pa55word" not in file.read_bytes(), file


# ---- behind a proxy


class Proxied:
    """MLflow's own server, and before it somebody who may answer in its place.

    Attributes:
        url: where both are reached.
        files: folder in which the server keeps artifacts.
        asked: "METHOD path" of each request.
    """

    def __init__(self, app: Callable[..., Iterable[bytes]], files: Path) -> None:
        self._app, self.files = app, files
        self.url = ""
        self.asked: list[str] = []
        self._obstacles: dict[str, int] = {}

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        asked = f"{environ['REQUEST_METHOD']} {environ['PATH_INFO']}"
        self.asked.append(asked)
        for pattern, status in self._obstacles.items():
            if re.search(pattern, asked):
                environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
                start(f"{status} Obstacle", [("Content-Type", "text/html")])
                return [b"<html>an obstacle</html>"]
        return self._app(environ, start)

    @contextmanager
    def answering(self, obstacles: dict[str, int]) -> Iterator[None]:
        """Within the block, requests of a pattern get a status, and no answer of MLflow's."""
        self._obstacles = obstacles
        try:
            yield
        finally:
            self._obstacles = {}


class _Quiet(WSGIRequestHandler):
    def log(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def proxied(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Proxied]:
    folder = tmp_path_factory.mktemp("proxied")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("_MLFLOW_SERVER_FILE_STORE", f"sqlite:///{folder}/server.db")
        patch.setenv("_MLFLOW_SERVER_ARTIFACT_DESTINATION", str(folder / "files"))
        patch.setenv("_MLFLOW_SERVER_ARTIFACT_ROOT", "mlflow-artifacts:/")
        patch.setenv("_MLFLOW_SERVER_SERVE_ARTIFACTS", "true")
        from mlflow.server import app

        # The server would make its database the store of the whole process, for clients past any proxy.
        patch.setattr("mlflow.tracking._model_registry.utils.set_registry_uri", lambda _: None)
        patch.setattr("mlflow.tracking._tracking_service.utils.set_tracking_uri", lambda _: None)
        both = Proxied(app, folder / "files")
        server = make_server("127.0.0.1", 0, both, threaded=True, request_handler=_Quiet)
        both.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield both
        server.shutdown()


@pytest.fixture
def tracker(proxied: Proxied, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tracker:
    """A machine's, whose client gives up at once and begins again without a pause."""
    for name in ("MAX_RETRIES", "BACKOFF_FACTOR", "BACKOFF_JITTER"):
        monkeypatch.setenv(f"MLFLOW_HTTP_REQUEST_{name}", "0")
    monkeypatch.setattr(outbox.Outbox, "_pause", lambda *_: None)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", proxied.url)
    monkeypatch.setenv("QADAPTER_HOME", str(tmp_path / "home"))
    return Tracker.for_project(tmp_path / "home")


def refused(tracker: Tracker) -> list[dict[str, Any]]:
    return [json.loads(line) for line in tracker._outbox.spool.refused.read_text().splitlines()]


def adapter_in(folder: Path) -> Path:
    """A folder of which a proxy with a limit of size refuses one file, neither the first nor the last."""
    (folder / "sub").mkdir(parents=True)
    for name in ("a.json", "large.bin", "sub/z.txt"):
        (folder / name).write_text(name)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("status", [413, 403])
@pytest.mark.parametrize("told", ["at once", "later"])
def test_a_refused_file_is_put_aside_and_the_rest_goes_on(
    proxied: Proxied, tracker: Tracker, tmp_path: Path, status: int, told: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Live, or out of the spool; nothing fails, nothing waits, and the files beside it are there."""
    folder = adapter_in(tmp_path / "adapter")
    parent = tracker.start_parent("refused", "x")
    with proxied.answering({"/api/2.0/": 503} if told == "later" else {}):
        run = tracker.start_child(parent, "stage")
    with proxied.answering({r"PUT .*large\.bin": status}):
        tracker.log_folder(run, folder, "train")
        tracker.log_metrics(run, {"adaptation/score": 0.5})
        tracker.finish(run)
        assert tracker.deliver()
    client = MlflowClient(proxied.url)
    experiment = client.get_run(parent).info.experiment_id
    (child,) = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{parent}'")
    assert (child.info.status, child.data.metrics) == ("FINISHED", {"adaptation/score": 0.5})
    assert [file.path for file in client.list_artifacts(child.info.run_id, "train")] == ["train/a.json", "train/sub"]
    assert [file.path for file in client.list_artifacts(child.info.run_id, "train/sub")] == ["train/sub/z.txt"]
    (entry,) = refused(tracker)
    assert (entry["what"], entry["path"]) == ("folder", str(folder))
    assert entry["reason"].startswith(f"large.bin: MLflow at {proxied.url} refused log_artifact ({status} Client Error")
    assert ("client_max_body_size" in entry["reason"]) == (status == 413)
    assert str(tracker._outbox.spool.refused) in caplog.text


@pytest.mark.slow
def test_a_server_that_fails_for_a_while_gets_everything_later(
    proxied: Proxied, tracker: Tracker, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It answers that it is well, and 500 to all that needs its database: more often than one entry is tried."""
    folder = adapter_in(tmp_path / "adapter")
    parent = tracker.start_parent("failing", "x")
    with proxied.answering({"/api/2.0/": 500}):
        run = tracker.start_child(parent, "stage", {"lr": 0.1})
        tracker.log_folder(run, folder, "train")
        tracker.log_metrics(run, {"adaptation/score": 0.5})
        tracker.finish(run)
        for _ in range(7):
            assert not tracker.deliver()
        entries = tracker._outbox.spool.entries()
        assert [entry["what"] for entry in entries] == ["start", "batch", "folder", "batch", "finish"]
        assert entries[0]["tries"] >= 7
    assert "answers with a server error (status 500)" in caplog.text
    assert tracker.deliver()
    client = MlflowClient(proxied.url)
    child = client.get_run(tracker._outbox.run_of(run))
    assert (child.info.status, child.data.params) == ("FINISHED", {"lr": "0.1"})
    assert child.data.metrics == {"adaptation/score": 0.5}
    assert len(client.list_artifacts(child.info.run_id, "train")) == 3
    assert not tracker._outbox.spool.refused.exists()


@pytest.mark.slow
def test_an_entry_that_always_fails_blocks_no_others(proxied: Proxied, tracker: Tracker) -> None:
    """It is tried five times, over all processes; what was delivered before it is not sent again each time."""
    parent = tracker.start_parent("poison", "x")
    with proxied.answering({r"PUT .*poison\.txt": 500}):
        spool = tracker._outbox.spool
        for entry in (
            {"what": "text", "run": parent, "text": "first", "artifact_file": "first.txt"},
            {"what": "text", "run": parent, "text": "poison", "artifact_file": "poison.txt"},
            {"what": "batch", "run": parent, "tags": [["behind", "yes"]]},
        ):
            spool.append(entry)
        proxied.asked.clear()
        for tries in range(1, 5):
            assert not tracker.deliver()
            assert [entry.get("tries") for entry in spool.entries()] == [tries, None]
        assert tracker.deliver()
    puts = [asked.rpartition("/")[2] for asked in proxied.asked if asked.startswith("PUT")]
    assert puts == ["first.txt"] + 5 * ["poison.txt"]
    (entry,) = refused(tracker)
    assert (entry["artifact_file"], entry["tries"]) == ("poison.txt", 4)
    assert "(status 500)" in entry["reason"]
    assert MlflowClient(proxied.url).get_run(parent).data.tags["behind"] == "yes"


@pytest.mark.slow
def test_a_run_that_was_refused_stops_no_other(proxied: Proxied, tracker: Tracker) -> None:
    """Its start came out of the spool; what belongs to it follows it there, and only asking for it is an error."""
    parent = tracker.start_parent("no start", "x")
    with proxied.answering({"/api/2.0/": 503}):
        run = tracker.start_child(parent, "stage")
    with proxied.answering({"POST .*runs/create": 403}):
        tracker.log_metrics(run, {"adaptation/score": 0.5})
        tracker.log_metrics(parent, {"all": 1.0})
        says = rf"refused to start the run {run}; see .*refused\.jsonl for the reason\."
        with pytest.raises(RefusedError, match=says):
            tracker.call("get_run", run)
    assert [entry["what"] for entry in refused(tracker)] == ["start", "batch"]
    assert MlflowClient(proxied.url).get_run(parent).data.metrics == {"all": 1.0}


# ---- fetched from another machine


def register(tracker: Tracker, home: Path, number: int) -> Registry:
    """A version on one and the same base, with an adapter of its own and a ledger among its run's artifacts."""
    base, adapter, ledger = home / "base", home / f"adapter-{number}" / "adapter", home / "records.jsonl"
    for file, text in ((base / "model.safetensors", "base"), (adapter / "adapter_model.safetensors", str(number))):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text * 100)
    ledger.write_text("{}\n")
    run = tracker.start_parent("customise", f"candidate {number}")
    tracker.log_file(run, ledger, "ledger")
    uri = log_served_model(run, base=base, adapter=adapter, model=ModelSettings(pretrained="x", dtype="float32"))
    registry = Registry(tracker, "kept", home / "lock")
    facts = {"adapter_digest": digest_tree(adapter), "base_digest": digest_tree(base)}
    registry.promote(
        registry.register(Candidate(str(number), run, True, [], number - 1 or None, facts, {}, {}), lambda: uri)
    )
    return registry


@pytest.mark.slow
def test_what_was_fetched_is_kept_whole_and_found_again(
    proxied: Proxied, tracker: Tracker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two versions on one base; nothing is left in the temporary folder, and a copy that is damaged is not used.

    The package that each version carries is one of two files: all others would come through the proxy at each call.
    """
    package = tmp_path / "small/qadapter"
    package.mkdir(parents=True)
    for name in ("__init__.py", "errors.py"):
        shutil.copy(Path(str(qadapter.__file__)).with_name(name), package)
    monkeypatch.setattr("tasks.tracking.models.qadapter", SimpleNamespace(__file__=str(package / "__init__.py")))
    for number in (1, 2):
        registry = register(tracker, tmp_path / "made", number)
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    kept = tmp_path / "home/.qadapter/downloads"

    def fetched() -> list[str]:
        """Names of the files that were asked for, without the version's code, which is verified anew each time."""
        files = [asked for asked in proxied.asked if re.match(r"GET .*/artifacts/\d+/", asked)]
        proxied.asked.clear()
        code = re.compile(r"/artifacts/(code/qadapter/|served_policy\.py)")
        return sorted(asked.rpartition("/")[2] for asked in files if not code.search(asked))

    proxied.asked.clear()
    with proxied.answering({r"GET .*/model\.safetensors": 503}), pytest.raises(QAdapterError, match="status 503"):
        find_served_model("kept/1")
    assert [path.name for path in (kept / "models").iterdir() if path.is_dir()] == [], "not even a part of it"
    fetched()
    first = find_served_model("kept/1")
    assert fetched() == ["MLmodel", "adapter_model.safetensors", "model.safetensors"]
    assert find_served_model("kept/1") == first
    assert fetched() == ["MLmodel"]
    second = find_served_model("kept@champion")
    assert fetched() == ["MLmodel", "adapter_model.safetensors"], "the base is the same one"
    assert (second.base, second.base_digest) == (first.base, digest_tree(Path(first.base)))
    assert (first.version, second.version) == (1, 2)
    with damaged(first.adapter / "adapter_model.safetensors", cut):
        assert (find_adapter("kept/1") / "adapter_model.safetensors").read_text() == "1" * 100
    assert fetched() == ["MLmodel", "adapter_model.safetensors"]

    version = registry.versions()[0]
    ledger = registry.files(version, "ledger")
    assert ledger == registry.files(version, "ledger")
    assert (ledger / "records.jsonl").read_text() == "{}\n"
    assert fetched() == ["records.jsonl"]
    (ledger / "records.jsonl").write_text("")
    assert registry.files(version, "ledger", lambda place: (place / "records.jsonl").read_text() == "{}\n") == ledger
    assert fetched() == ["records.jsonl"]

    check_files("kept/1")
    stored = [file for file in proxied.files.rglob("adapter_model.safetensors") if file.read_text() == "1" * 100]
    with damaged(stored[0], cut):
        assert find_adapter("kept/1") == first.adapter, "the copy is whole"
        with pytest.raises(DamagedError, match="adapter of version 1"):
            check_files("kept/1")
    assert list(temporary.iterdir()) == []


@pytest.mark.slow
def test_a_model_too_large_for_a_proxy_is_refused(proxied: Proxied, tracker: Tracker, tmp_path: Path) -> None:
    with (
        proxied.answering({r"PUT .*/model\.safetensors": 413}),
        pytest.raises(RefusedError, match=r"refused this \(413 .*client_max_body_size"),
    ):
        register(tracker, tmp_path / "made", 3)
