"""MLflow for several machines: a real server, which keeps the artifacts where `--artifacts-destination` says."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from flows.serve_model import main as serve_model
from qadapter.settings import ModelSettings
from tasks.registry import Candidate, Registry
from tasks.served_model import find_adapter, find_served_model, log_served_model
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


@pytest.mark.slow
def test_a_model_is_registered_at_the_server_and_comes_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By another machine, which fetches no more than it asks for; the password of the address is written nowhere."""
    base, adapter, kept = tmp_path / "base", tmp_path / "adapter", tmp_path / "server"
    for folder, weights in ((base, "model.safetensors"), (adapter, "adapter_model.safetensors")):
        folder.mkdir()
        (folder / weights).write_text(folder.name)
    kept.mkdir()
    server = mlflow_server(kept).start()
    try:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", server.url.replace("http://", "http://me:pa55word@"))
        monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        monkeypatch.setenv("QADAPTER_HOME", str(tmp_path / "a"))
        tracker = Tracker.for_project(tmp_path / "a")
        run = tracker.start_parent("customise", "candidate")
        uri = log_served_model(run, base=base, adapter=adapter, model=ModelSettings(pretrained="x", dtype="bfloat16"))
        registry = Registry(tracker, "policy", tmp_path / "policy.lock")
        facts = {"base": "base", "data_digest": "0" * 64}
        candidate = Candidate("key", run, True, ["better"], None, facts, {"adaptation/score": 0.5}, {})
        registry.promote(registry.register(candidate, lambda: uri))

        monkeypatch.setenv("QADAPTER_HOME", str(tmp_path / "b"))
        alone = find_adapter("policy@champion")
        assert (alone / "adapter_model.safetensors").read_text() == "adapter"
        assert not list(alone.parent.rglob("model.safetensors")), "the base stays where it is"
        found = find_served_model("policy@champion")
        assert (found.adapter / "adapter_model.safetensors").read_text() == "adapter"
        assert (Path(found.base) / "model.safetensors").read_text() == "base"
        assert found.numerics == {"dtype": "bfloat16", "quantization": "none"}

        for unknown in ("policy@nobody", "policy/7", "other/1"):
            assert serve_model(["--model", unknown]) == 2
            assert f"{server.url} has no model '{unknown}'" in capsys.readouterr().err
    finally:
        server.send(signal.SIGKILL)
    assert serve_model(["--model", "policy@champion"]) == 2
    message = capsys.readouterr().err
    assert f"{server.url} does not answer" in message
    assert "has no model" not in message
    for file in [file for file in tmp_path.rglob("*") if file.is_file()]:
        assert b"pa55word" not in file.read_bytes(), file
