"""What MLflow's pages compare: the experiment's kind, sources, descriptions, logged models, system metrics."""

from __future__ import annotations

import os
import subprocess
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from qadapter.config.model import ModelSettings
from qadapter.progress.reports import Row
from tasks.report import note_of
from tasks.tracking import logged_models
from tasks.tracking import tracker as tracker_module
from tasks.tracking.models import log_served_model
from tasks.tracking.system_metrics import system_metrics, wanted_by_environment
from tasks.tracking.tracker import LONGEST_TAG, Tracker
from tests.support.paths import PROJECT_ROOT
from tests.support.real_runs import wait_for

KIND = "mlflow.experimentKind"


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    root = tmp_path_factory.mktemp("project")
    return Tracker(f"sqlite:///{root}/mlflow.db", str(root / "mlruns"))


@pytest.fixture(scope="module")
def parent(tracker: Tracker) -> str:
    return tracker.start_parent("smoke", "parent")


@pytest.fixture(scope="module")
def client(tracker: Tracker, parent: str) -> MlflowClient:
    """Reads what was written."""
    return MlflowClient(tracker.uri)


def test_an_experiment_opens_in_the_view_of_model_training(tracker: Tracker, client: MlflowClient) -> None:
    found = client.get_experiment_by_name("smoke")
    assert found is not None
    assert found.tags[KIND] == "custom_model_development"
    client.create_experiment("older")
    tracker.start_parent("older", "parent")
    older = client.get_experiment_by_name("older")
    assert older is not None
    assert older.tags[KIND] == "custom_model_development"
    client.set_experiment_tag(older.experiment_id, KIND, "genai_development")  # the user's own choice stays
    tracker.start_parent("older", "parent")
    assert client.get_experiment(older.experiment_id).tags[KIND] == "genai_development"


def test_source_and_commit(
    tracker: Tracker, client: MlflowClient, parent: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = client.get_run(parent)
    assert run.data.tags["mlflow.source.name"] == "qadapter"
    if (PROJECT_ROOT / ".git").exists():
        command = ["git", "-C", str(PROJECT_ROOT), "rev-parse", "HEAD"]
        commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
        assert run.data.tags["mlflow.source.git.commit"] == commit
    monkeypatch.setattr(tracker_module, "PROJECT_ROOT", Path("/nowhere"))
    tracker_module._source.cache_clear()
    try:
        assert "mlflow.source.git.commit" not in tracker_module._source(), "an installed package has no commit"
    finally:
        tracker_module._source.cache_clear()


def models(client: MlflowClient, tracker: Tracker) -> list[Any]:
    experiment = client.get_experiment_by_name("smoke")
    assert experiment is not None
    return list(client.search_logged_models([experiment.experiment_id], order_by=[{"field_name": "creation_time"}]))


def test_an_adapter_is_a_logged_model_with_metrics_per_data_set(
    tracker: Tracker, client: MlflowClient, parent: str
) -> None:
    """Trained once, evaluated on two data sets; a second run finds it, and a delivery is repeated."""
    first, second = (tracker.start_child(parent, "academy · dpo · seed 0") for _ in range(2))
    for run in (first, first, second):
        tracker.log_model(run, "academy · dpo · seed 0", "0123abcd", {"method": "dpo", "beta": 0.1})
    tracker.log_dataset(first, "academy-heldout", "pairs.jsonl", "d1", "evaluation")
    learnt = [{"step": 0, "adaptation/score": 0.75, "timestamp": 5}]
    for _ in range(2):
        tracker.log(first, history=learnt, model_data=("academy-heldout", "d1"))
    tracker.log(first, history=[{"step": 0, "retention/mean": 0.5}], model_data=(None, None))
    (model,) = models(client, tracker)
    assert (model.name, model.model_type, model.source_run_id) == ("academy · dpo · seed 0", "adapter", first)
    assert model.params == {"method": "dpo", "beta": "0.1"}
    assert str(model.status) == "READY"
    measured = {(m.key, m.value, m.dataset_name, m.dataset_digest) for m in model.metrics}
    assert measured == {
        ("adaptation/score", 0.75, "academy-heldout", "d1"),
        ("retention/mean", 0.5, None, None),
    }
    for run in (first, second):
        outputs = client.get_run(run).outputs
        assert [output.model_id for output in outputs.model_outputs] == [model.model_id]
    assert client.get_run(first).data.metrics == {"adaptation/score": 0.75, "retention/mean": 0.5}
    assert len(client.get_metric_history(first, "adaptation/score")) == 1


def test_metrics_of_a_run_without_model_are_logged_all_the_same(
    tracker: Tracker, client: MlflowClient, parent: str
) -> None:
    run = tracker.start_child(parent, "academy · base")
    tracker.log(run, history=[{"step": 0, "retention/mean": 0.25}], model_data=(None, None))
    assert client.get_run(run).data.metrics == {"retention/mean": 0.25}
    assert logged_models.model_of(tracker._store, run) is None


REPORT = """# Report

> The best is dpo.

- a sentence

![a figure](figure.png)

## Main table

| a | b |
| - | - |
| 1 | 2 |

## Comparison

more
"""


def test_the_description_is_the_reports_beginning(tmp_path: Path) -> None:
    file = tmp_path / "report.md"
    file.write_text(REPORT)
    text = note_of(file)
    assert text.startswith("> The best is dpo.\n\n- a sentence\n\n**Main table**\n\n| a | b |")
    assert text.endswith("| 1 | 2 |\n\nThe whole report is among this run's artifacts, under `report`.")
    file.write_text(REPORT.replace("| 1 | 2 |", "| 1 | 2 |\n" * 2000))
    assert 0.9 * LONGEST_TAG < len(note_of(file)) <= LONGEST_TAG
    assert note_of(file).splitlines()[-3] == "| 1 | 2 |", "cut between two rows"


def test_system_metrics_where_asked_for(
    tracker: Tracker, client: MlflowClient, parent: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL", "0.1")
    run = tracker.start_child(parent, "watched")
    counted = tmp_path / "live" / "steps"
    for _ in range(2):  # training, then evaluation
        with system_metrics(lambda rows: tracker.log_history(run, rows), counted):
            time.sleep(0.5)
    history = client.get_metric_history(run, "system/cpu_utilization_percentage")
    assert len(history) > 3
    assert [entry.step for entry in history] == list(range(len(history)))
    assert counted.read_text() == str(len(history)), "where another process would go on"
    counted.write_text("70")
    seen: list[Row] = []
    with system_metrics(seen.extend, counted):
        wait_for(lambda: seen, 10, "a row")
    assert seen[0]["step"] == 70
    names = set(client.get_run(run).data.metrics)
    assert {"system/system_memory_usage_megabytes", "system/disk_usage_percentage"} <= names
    assert not wanted_by_environment()
    monkeypatch.setenv("MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING", "true")
    assert wanted_by_environment()


def test_logging_a_model_to_serve_warns_of_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QADAPTER_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    for part in ("base", "adapter"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "weights.safetensors").write_text(part)
    run = Tracker.for_project(tmp_path).start_parent("customise", "candidate")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        log_served_model(run, base=tmp_path / "base", adapter=tmp_path / "adapter", model=ModelSettings(pretrained="x"))
    ours = [str(warning.message) for warning in caught if "mlflow" in str(warning.filename)]
    assert [text for text in ours if "type hints" in text or "input example" in text] == []
    assert os.environ.get("MLFLOW_TRACKING_URI") is None
