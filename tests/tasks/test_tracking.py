"""Runs in a real SQLite MLflow: what is written can be read back, with several writers at the same time."""

from __future__ import annotations

import json
import logging
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import threading
import traceback
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import digest_file
from qadapter.files.process_tags import ProcessTag
from tasks.tracking import journal
from tasks.tracking import store as mlflow_store
from tasks.tracking.names import flatten, mlflow_name
from tasks.tracking.store import AwayError, RefusedError
from tasks.tracking.tracker import FLOW_RUN_TAG, Tracker, tracking_uri
from tasks.tracking.view import NOTE_TAG, VIEW_TAG, view_path, view_state, view_tags
from tests.support.forked_process import ForkedProcess, be_program
from tests.support.paths import PROJECT_ROOT


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    root = tmp_path_factory.mktemp("project")
    return Tracker(f"sqlite:///{root}/mlflow.db", str(root / "mlruns"))


@pytest.fixture(scope="module")
def client(tracker: Tracker, parent: str) -> MlflowClient:
    """Reads what was written; after `parent`, because a plain client that comes first sets its own layout."""
    return MlflowClient(tracker.uri)


@pytest.fixture(scope="module")
def parent(tracker: Tracker) -> str:
    return tracker.start_parent("paper", "smoke", {"seed": 1}, {"qadapter.profile": "smoke"})


@pytest.fixture(autouse=True)
def _no_tracking_uri(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def test_the_uri_is_mlflows_own_default_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tracking_uri(tmp_path) == f"sqlite:///{tmp_path}/mlflow.db"
    assert Tracker.for_project(tmp_path) == Tracker(f"sqlite:///{tmp_path}/mlflow.db", f"{tmp_path}/mlruns")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:5000")
    assert tracking_uri(tmp_path) == "http://127.0.0.1:5000"


def test_flatten() -> None:
    assert flatten({"a": {"b": {"c": 1.5}, "d": [1, "x"]}, "e": None, "f": True, "g": {}, "h": "text", "α*": 0}) == {
        "a.b.c": "1.5",
        "a.d": '[1,"x"]',
        "e": "None",
        "f": "True",
        "g": "{}",
        "h": "text",
        "α_": "0",
    }
    long = flatten({"long": "x" * 7000})["long"]
    assert (len(long), long[-1]) == (6000, "…")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("train/loss", "train/loss"),
        ("curve/a b/q-adapter:x.1/area", "curve/a b/q-adapter:x.1/area"),
        ("mean/adaptation/score/dpo (lazy fox)", "mean/adaptation/score/dpo _lazy fox_"),
        ("curve/academy/sft lr=0.1/area", "curve/academy/sft lr_0.1/area"),
        ("a\nb", "a_b"),
        ("exact_match,strict", "exact_match_strict"),
        ("/a//b/../c/.", "_/a/_/b/_/c/_"),
        ("..a", "_..a"),
        ("", "_"),
        ("α", "α"),
    ],
)
def test_names_become_names_to_mlflow(given: str, expected: str) -> None:
    from mlflow.utils.validation import _validate_metric_name

    assert mlflow_name(given) == expected
    _validate_metric_name(expected)
    assert mlflow_name(expected) == expected


def test_long_names_stay_different() -> None:
    """MLflow takes 250 characters: 241 of the name, a dash, and 8 of the digest of the whole."""
    one, other = (mlflow_name("x" * 300 + end) for end in "ab")
    assert len(one) == len(other) == 250
    assert one != other
    assert one[:242] == "x" * 241 + "-"
    assert mlflow_name("x" * 250) == "x" * 250


def test_a_metric_of_any_name_is_logged(tracker: Tracker, client: MlflowClient, parent: str) -> None:
    tracker.log_metrics(parent, {"curve/sft lr=0.1/area": 0.5})
    tracker.log_history(parent, [{"step": 3, "a//b": 1.0}])
    found = client.get_run(parent).data.metrics
    assert (found["curve/sft lr_0.1/area"], found["a/_/b"]) == (0.5, 1.0)


def test_parent_and_child(tracker: Tracker, client: MlflowClient, parent: str) -> None:
    params = {"train": {f"p{i}": i for i in range(130)}, "long": "y" * 9000}
    child = tracker.start_child(parent, "harmless · dpo", params, {"qadapter.method": "dpo", "n": 3})
    run = client.get_run(child)
    assert run.info.run_name == "harmless · dpo"
    assert run.info.status == "RUNNING"
    assert run.info.experiment_id == client.get_run(parent).info.experiment_id
    assert run.data.tags["mlflow.parentRunId"] == parent
    assert (run.data.tags["qadapter.method"], run.data.tags["n"]) == ("dpo", "3")
    assert len(run.data.params) == 131
    assert run.data.params["train.p129"] == "129"
    assert client.get_run(parent).data.params == {"seed": "1"}
    tracker.finish(child)
    assert client.get_run(child).info.status == "FINISHED"


def test_an_experiment_has_the_view_once(tracker: Tracker, client: MlflowClient, parent: str) -> None:
    """MLflow keeps at most 5,000 characters in a tag; the user's own description of the experiment stays."""
    experiment = client.get_experiment(client.get_run(parent).info.experiment_id)
    state = json.loads(experiment.tags[VIEW_TAG])
    assert state == view_state()
    assert len(experiment.tags[VIEW_TAG]) <= 5000
    (scatter,) = [chart for chart in state["compareRunCharts"] if chart["type"] == "SCATTER"]
    assert (scatter["xaxis"]["key"], scatter["yaxis"]["key"]) == ("adaptation/score", "retention/mean")
    assert view_path(experiment.experiment_id) in experiment.tags[NOTE_TAG]
    assert view_tags(experiment.experiment_id, experiment.tags) == {}
    assert view_tags("7", {NOTE_TAG: "mine", VIEW_TAG: "{}"}).keys() == {VIEW_TAG}
    client.set_experiment_tag(experiment.experiment_id, NOTE_TAG, "what we tried")
    tracker.finish(tracker.start_parent("paper", "again"))
    assert client.get_experiment(experiment.experiment_id).tags[NOTE_TAG] == "what we tried"


def test_artifacts_lie_where_a_bare_mlflow_ui_looks(tracker: Tracker, client: MlflowClient, parent: str) -> None:
    """Not below the current directory; MLflow's own `Default` experiment is not used."""
    for experiment in client.search_experiments(filter_string="name != 'Default'"):
        assert experiment.artifact_location == f"{tracker.artifact_root}/{experiment.experiment_id}"
    assert client.get_run(parent).info.artifact_uri == f"{tracker.artifact_root}/1/{parent}/artifacts"
    assert not (Path.cwd() / "mlruns" / "1" / parent).exists()


def test_curves_of_more_than_one_batch(tracker: Tracker, client: MlflowClient, parent: str) -> None:
    rows: list[dict[str, float]] = [{"step": i, "train/loss": 1 / (i + 1), "train/lr": 0.5} for i in range(700)]
    rows.append({"step": 1000, "adaptation/accuracy": 0.75})
    with tracker.child(parent, "curves") as run_id:
        tracker.log_history(run_id, rows)
        tracker.log_metrics(run_id, {"retention/mean": 0.25, "cost/steps": 700})
        tracker.log_history(run_id, [])
    losses = client.get_metric_history(run_id, "train/loss")
    assert [(m.step, m.value) for m in losses] == [(i, 1 / (i + 1)) for i in range(700)]
    assert len(client.get_metric_history(run_id, "train/lr")) == 700
    data = client.get_run(run_id).data.metrics
    assert data["adaptation/accuracy"] == 0.75
    assert (data["retention/mean"], data["cost/steps"]) == (0.25, 700)


@pytest.mark.filterwarnings("ignore:For backward compatibility, 'str' dtypes")  # MLflow 3.17 asks pandas 3 this way
def test_files(tracker: Tracker, client: MlflowClient, parent: str, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    (folder / "sub").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "sub" / "small.txt").write_text("small")
    (folder / "sub" / "weights.safetensors").write_bytes(b"w" * 5000)
    with tracker.child(parent, "files") as run_id:
        tracker.log_folder(run_id, folder, "all")
        tracker.log_folder(run_id, folder, "some", max_bytes_per_file=1000)
        tracker.log_file(run_id, folder / "config.json", "single")
        tracker.log_text(run_id, "# Report\n", "report.md")
        tracker.log_table(run_id, {"method": ["dpo", "sft"], "retention": [0.5, 0.25]}, "table.json")
    place = Path(client.get_run(run_id).info.artifact_uri)
    names = sorted(path.relative_to(place).as_posix() for path in place.rglob("*") if path.is_file())
    assert names == [
        "all/config.json",
        "all/sub/small.txt",
        "all/sub/weights.safetensors",
        "report.md",
        "single/config.json",
        "some/config.json",
        "some/references.json",
        "some/sub/small.txt",
        "table.json",
    ]
    assert not any(path.is_symlink() for path in place.rglob("*"))
    weights = folder / "sub" / "weights.safetensors"
    assert json.loads((place / "some" / "references.json").read_text()) == [
        {"file": "sub/weights.safetensors", "bytes": 5000, "sha256": digest_file(weights), "location": str(weights)}
    ]
    table = json.loads((place / "table.json").read_text())
    assert table == {"columns": ["method", "retention"], "data": [["dpo", 0.5], ["sft", 0.25]]}


def test_a_table_delivered_twice_is_stored_once(tracker: Tracker, client: MlflowClient, parent: str) -> None:
    """As a delivery does that was killed before it could note its end."""
    rows = {"prompt": ["a", "b"], "score": [0.5, None]}
    with tracker.child(parent, "tables") as run_id:
        for _ in range(2):
            tracker.log_table(run_id, rows, "answers.json")
            tracker.log_table(run_id, rows, "more/answers.json")
    tables = json.loads(client.get_run(run_id).data.tags["mlflow.loggedArtifacts"])
    assert tables == [{"path": path, "type": "table"} for path in ("answers.json", "more/answers.json")]
    for table in tables:
        written = json.loads(Path(client.download_artifacts(run_id, table["path"])).read_text())
        assert written == {"columns": ["prompt", "score"], "data": [["a", 0.5], ["b", None]]}


def test_dataset_input(tracker: Tracker, client: MlflowClient, parent: str) -> None:
    with tracker.child(parent, "data") as run_id:
        tracker.log_dataset(run_id, "hh-harmless", "/data/hh", "ab" * 32, "training", {"rows": 10})
        tracker.log_dataset(run_id, "dsp", "https://example.org/dsp.json", "cd" * 32, "evaluation")
    inputs = {entry.dataset.name: entry for entry in client.get_run(run_id).inputs.dataset_inputs}
    first = inputs["hh-harmless"]
    assert first.dataset.digest == "ab" * 18
    assert json.loads(first.dataset.source) == {"uri": "/data/hh"}
    assert json.loads(first.dataset.profile) == {"rows": 10}
    assert [(tag.key, tag.value) for tag in first.tags] == [("mlflow.data.context", "training")]
    assert inputs["dsp"].dataset.source_type == "http"


@pytest.mark.parametrize(("error", "status"), [(RuntimeError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_a_child_never_stays_running(
    tracker: Tracker, client: MlflowClient, parent: str, error: type[BaseException], status: str
) -> None:
    name = f"ends {status}"
    with pytest.raises(error), tracker.child(parent, name):
        raise error
    runs = client.search_runs([client.get_run(parent).info.experiment_id], f"attributes.run_name = '{name}'")
    assert [run.info.status for run in runs] == [status]


def test_a_run_whose_start_fails_is_not_left_open(
    tracker: Tracker, client: MlflowClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise RuntimeError("boom")

    monkeypatch.setattr(Tracker, "log_params", refuse)
    with pytest.raises(RuntimeError, match="boom"):
        tracker.start_parent("start-fails", "x", {"a": 1})
    experiment = client.get_experiment_by_name("start-fails")
    assert experiment is not None
    assert [run.info.status for run in client.search_runs([experiment.experiment_id])] == ["FAILED"]


def test_a_killed_process_leaves_a_run_that_can_be_closed(tracker: Tracker, client: MlflowClient) -> None:
    program = (
        "import sys, time; from tasks.tracking.tracker import Tracker\n"
        "tracker = Tracker(*sys.argv[1:])\n"
        "print(tracker.start_parent('abandoned', 'x'), flush=True); time.sleep(60)"
    )
    command = [sys.executable, "-c", program, tracker.uri, tracker.artifact_root]
    child = subprocess.Popen(command, cwd=PROJECT_ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout is not None
        lost = child.stdout.readline().strip()
        assert tracker.close_abandoned("abandoned") == []
    finally:
        child.send_signal(signal.SIGKILL)
        child.wait()
    mine = tracker.start_parent("abandoned", "alive")
    assert client.get_run(lost).info.status == "RUNNING"
    assert tracker.close_abandoned("abandoned") == [lost]
    assert client.get_run(lost).info.status == "KILLED"
    assert client.get_run(mine).info.status == "RUNNING"
    assert tracker.close_abandoned("no such experiment") == []


def open_runs(tracker: Tracker, experiment: str, process: str, flow: str) -> list[str]:
    """The runs of a flow run that a process has at work: the flow's own and one stage."""
    parent = tracker.start_parent(experiment, "flow", tags={FLOW_RUN_TAG: flow, "qadapter.process": process})
    return [parent, tracker.start_child(parent, "stage", tags={"qadapter.process": process})]


def test_a_run_of_elsewhere_is_closed_when_its_flow_run_has_ended(tracker: Tracker, client: MlflowClient) -> None:
    """Its process cannot be seen from here; a tag of an earlier version says too little of it."""
    elsewhere = replace(ProcessTag.own(), host="elsewhere").text()
    ended = open_runs(tracker, "elsewhere", elsewhere, "ended")
    old = open_runs(tracker, "elsewhere", "elsewhere 1234 1719858862.12", "ended")
    open_runs(tracker, "elsewhere", elsewhere, "alive")
    open_runs(tracker, "elsewhere", elsewhere, "")
    here = open_runs(tracker, "elsewhere", ProcessTag.own().text(), "ended")
    lone = tracker.start_child(here[0], "a stage alone", tags={"qadapter.process": elsewhere})
    tracker.finish(here[0])
    asked = []

    def those_that_have(flows: set[str]) -> set[str]:
        asked.append(flows)
        return flows & {"ended", "of no run"}

    assert tracker.close_abandoned("elsewhere") == [], "no server was asked"
    assert set(tracker.close_abandoned("elsewhere", those_that_have)) == {*ended, *old, lone}
    assert asked == [{"ended", "alive"}]
    assert {client.get_run(run).info.status for run in [*ended, *old, lone]} == {"KILLED"}
    assert client.get_run(here[1]).info.status == "RUNNING", "its process is seen to be alive"
    assert tracker.close_abandoned("elsewhere", those_that_have) == []
    tracker.finish(ended[0])
    assert client.get_run(ended[0]).info.status == "FINISHED", "what is told later counts"


def test_prefect_is_not_asked_about_runs_of_this_machine(tracker: Tracker) -> None:
    own = ProcessTag.own()
    dead = open_runs(tracker, "here", replace(own, start=own.start - 86_400).text(), "dead")
    open_runs(tracker, "here", own.text(), "alive")

    def fail(flows: set[str]) -> set[str]:
        raise AssertionError(flows)

    assert set(tracker.close_abandoned("here", fail)) == set(dead)


def test_threads_do_not_mix(tracker: Tracker, client: MlflowClient, parent: str) -> None:
    def work(index: int) -> tuple[int, str]:
        with tracker.child(parent, f"t{index}", {"index": index}) as run_id:
            tracker.log_history(run_id, [{"step": step, "value": index * 100 + step} for step in range(20)])
        return index, run_id

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(work, range(8)))
    for index, run_id in results:
        run = client.get_run(run_id)
        assert run.data.params == {"index": str(index)}
        assert [m.value for m in client.get_metric_history(run_id, "value")] == [index * 100 + s for s in range(20)]
        assert run.info.status == "FINISHED"


@pytest.mark.slow
def test_first_use_by_several_processes_from_anywhere(tmp_path: Path) -> None:
    """Four processes create the schema and the experiment at once, each with another current directory."""
    program = (
        "import sys; from tasks.tracking.tracker import Tracker\n"
        "from tests.support.mlflow_tables import make_own_tables; make_own_tables()\n"
        "tracker = Tracker(*sys.argv[1:3]); tracker.close_abandoned('race')\n"
        "run = tracker.start_parent('race', sys.argv[3], {'a': 1})\n"
        "tracker.log_text(run, 'x', 'x.txt'); tracker.finish(run)"
    )
    uri, artifacts = f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path / "mlruns")
    children = []
    for index in range(4):
        cwd = tmp_path / f"cwd{index}"
        cwd.mkdir()
        given = (program, uri, artifacts, f"run{index}")
        children.append(ForkedProcess(be_program, *given, cwd=cwd, env=os.environ, stdout=tmp_path / f"said{index}"))
    codes = [child.wait(120) for child in children]
    errors = [(tmp_path / f"said{index}").read_text() for index in range(4)]
    assert codes == [0, 0, 0, 0], errors
    assert not any("INFO" in text or "alembic" in text for text in errors), errors
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("race")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id])
    assert sorted(run.info.run_name for run in runs) == ["run0", "run1", "run2", "run3"]
    assert all(run.info.status == "FINISHED" for run in runs)
    assert all(list((tmp_path / f"cwd{index}").iterdir()) == [] for index in range(4))
    assert len(list((tmp_path / "mlruns" / "1").glob("*/artifacts/x.txt"))) == 4


def test_a_row_written_by_another_run_is_found_on_retry(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two runs that log the same data set at the same moment: both look for its row, both write it, one is refused."""
    refusal = (
        "(sqlite3.IntegrityError) UNIQUE constraint failed: datasets.experiment_id, datasets.name, datasets.digest"
    )
    answers = iter([MlflowException(refusal), "logged"])

    class Raced:
        def log_inputs(self, run_id: str) -> str:
            answer = next(answers)
            if isinstance(answer, Exception):
                raise answer
            return f"{answer} {run_id}"

    monkeypatch.setattr(mlflow_store, "_client", lambda *_: Raced())
    monkeypatch.setattr(mlflow_store, "_PAUSES", (0.01,))
    store = mlflow_store.MlflowStore(tracker.uri, tracker.artifact_root)
    assert store.call("log_inputs", "a run") == "logged a run"


def test_a_locked_database_is_waited_for(
    tracker: Tracker,
    client: MlflowClient,
    parent: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """A real lock would hold each attempt for SQLite's own 20 s, so the first two attempts fail by hand."""
    real, calls = mlflow_store._client(tracker.uri, os.getpid()), []

    class Busy:
        def log_batch(self, *arguments: Any, **options: Any) -> None:
            calls.append(1)
            if len(calls) < 3:
                raise MlflowException("database is locked", error_code=TEMPORARILY_UNAVAILABLE)
            real.log_batch(*arguments, **options)

    monkeypatch.setattr(mlflow_store, "_client", lambda *_: Busy())
    monkeypatch.setattr(mlflow_store, "_PAUSES", (0.01, 0.01, 0.01))
    with caplog.at_level(logging.WARNING):
        tracker.log_metrics(parent, {"patience": 1.0})
    assert len(calls) == 3
    assert "trying again" in caplog.text
    assert client.get_run(parent).data.metrics["patience"] == 1.0
    calls.clear()
    monkeypatch.setattr(mlflow_store, "_PAUSES", (0.01,))
    tracker.log_metrics(parent, {"patience": 2.0})
    assert "The write is queued" in caplog.text
    assert client.get_run(parent).data.metrics["patience"] == 1.0
    assert tracker.deliver()
    assert client.get_run(parent).data.metrics["patience"] == 2.0


def test_a_short_real_lock_does_not_lose_a_metric(tracker: Tracker, client: MlflowClient, parent: str) -> None:
    database = sqlite3.connect(tracker.uri.removeprefix("sqlite:///"), isolation_level=None, check_same_thread=False)
    database.execute("BEGIN EXCLUSIVE")
    timer = threading.Timer(0.8, lambda: database.execute("COMMIT"))
    timer.start()
    try:
        tracker.log_metrics(parent, {"through-a-lock": 1.0})
    finally:
        timer.join()
        database.close()
    assert client.get_run(parent).data.metrics["through-a-lock"] == 1.0


def test_an_absent_server_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(QAdapterError, match=r"http://127\.0\.0\.1:9 does not answer.*MLFLOW_TRACKING_URI"):
        Tracker("http://127.0.0.1:9", "/nowhere").start_parent("x", "y")


def test_a_mistake_of_ours_is_raised(tracker: Tracker, parent: str) -> None:
    with pytest.raises(RefusedError, match=r"refused log_batch .*Invalid") as caught:
        tracker.log_tags(parent, {"bad\nname": 1.0})
    assert caught.value.code == "INVALID_PARAMETER_VALUE"
    assert not tracker._outbox.spool.refused.exists()


def test_passwords_stay_out_of_what_is_recorded(tracker: Tracker, client: MlflowClient, parent: str) -> None:
    secret = "http://me:s3cret@example.org/data.json?token=s3cret"
    with tracker.child(parent, "secret", {"sources": {"path": secret}, "all": [secret]}) as run_id:
        tracker.log_dataset(run_id, "secret", secret, "ab" * 32)
    run = client.get_run(run_id)
    assert run.data.params == {
        "sources.path": "http://example.org/data.json?…",
        "all": '["http://example.org/data.json?…"]',
    }
    assert json.loads(run.inputs.dataset_inputs[0].dataset.source) == {"url": "http://example.org/data.json?…"}


def test_a_password_in_the_address_is_not_shown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    address = f"http://me:{'s3' + 'cret'}@127.0.0.1:9"  # a traceback shows lines of code too
    with pytest.raises(AwayError) as caught:
        Tracker(address, str(tmp_path / "mlruns")).start_parent("x", "y")
    shown = "".join(traceback.format_exception(caught.value))
    assert "http://127.0.0.1:9 does not answer" in shown
    assert "s3cret" not in shown


def test_a_deleted_experiment_is_explained(tracker: Tracker, client: MlflowClient) -> None:
    client.delete_experiment(tracker.experiment_id("thrown away"))
    with pytest.raises(QAdapterError, match="mlflow experiments restore -x"):
        tracker.start_parent("thrown away", "x")


def test_a_tracker_can_be_sent_to_another_process(tracker: Tracker) -> None:
    assert pickle.loads(pickle.dumps(tracker)) == tracker


def journal_of(file: Path) -> str:
    with closing(sqlite3.connect(file)) as database:
        return str(database.execute("PRAGMA journal_mode").fetchone()[0])


def test_a_local_database_gets_a_write_ahead_log(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A new one, and one of before; not on a network's file system, whose machines share no memory."""
    file = tmp_path / "mlflow.db"
    tracker = Tracker(f"sqlite:///{file}", str(tmp_path / "mlruns"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(journal, "_file_system", lambda _: "nfs4")
        run = tracker.start_parent("journal", "run")
    assert journal_of(file) == "delete"
    with closing(sqlite3.connect(file)) as reader:
        reader.execute("BEGIN")
        assert reader.execute("SELECT COUNT(*) FROM runs").fetchone() == (1,)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(journal, "_BUSY_SECONDS", 0.01)
            journal.write_ahead(file)  # it is in use
    assert journal_of(file) == "delete"
    mlflow_store._client.cache_clear()
    tracker.log_metrics(run, {"kept": 1.0})
    assert journal_of(file) == "wal"
    with closing(sqlite3.connect(file)) as database:
        assert database.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL: a commit is on the disk
    assert not [record for record in caplog.records if record.name.startswith("tasks.")]


def test_the_file_system_is_that_of_the_nearest_mount(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = {"/": "ext4", str(tmp_path): "nfs4", f"{tmp_path}/near": "xfs", f"{tmp_path}/nea": "tmpfs"}
    named = [SimpleNamespace(mountpoint=place, fstype=kind) for place, kind in mounts.items()]
    monkeypatch.setattr(journal.psutil, "disk_partitions", lambda **_: named)
    assert journal._file_system(tmp_path / "near" / "mlflow.db") == "xfs"
    assert journal._file_system(tmp_path / "nearer" / "mlflow.db") == "nfs4"
    named.clear()
    assert journal._file_system(tmp_path / "mlflow.db") == ""
