"""MLflow for several machines: a real server, which keeps the artifacts where `--artifacts-destination` says."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tasks.tracking import Tracker
from tests.real_runs import mlflow_server


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
