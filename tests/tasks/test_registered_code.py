"""The code that a registered model brings: what `mlflow models serve` would run must be what was logged."""

from __future__ import annotations

from pathlib import Path

import pytest

from qadapter.config.model import ModelSettings
from qadapter.serving.registered import DamagedError, digest_code
from tasks.tracking.models import check_files, find_served_model, log_served_model
from tasks.tracking.registry import Candidate, Registry
from tasks.tracking.tracker import Tracker

MODEL = "policy/1"


@pytest.fixture
def logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a registered model, as MLflow keeps it."""
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("QADAPTER_HOME", str(home))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for part in (base, adapter):
        part.mkdir()
        (part / "weights.safetensors").write_text(part.name)
    tracker = Tracker.for_project(home)
    run = tracker.start_parent("customise", "candidate")
    uri = log_served_model(run, base=base, adapter=adapter, model=ModelSettings(pretrained="x"))
    facts = {"base": "base", "data_digest": "0" * 64}
    candidate = Candidate("key", run, True, ["better"], None, facts, {"adaptation/score": 0.5}, {})
    registry = Registry(tracker, "policy", tmp_path / "policy.lock")
    registry.promote(registry.register(candidate, lambda: uri))
    return Path(uri.removeprefix("file://"))


@pytest.mark.slow
def test_changed_code_is_refused(logged: Path):
    """Weights alone were held against their digests; the code beside them runs with the server's rights."""
    find_served_model(MODEL)
    check_files(MODEL)
    compiled = logged / "code" / "qadapter" / "__pycache__"
    compiled.mkdir(exist_ok=True)
    (compiled / "errors.cpython-311.pyc").write_bytes(b"x")  # serving leaves such files
    find_served_model(MODEL)
    for name in ("code/qadapter/errors.py", "served_policy.py", "code/qadapter/new.py"):
        file = logged / name
        before = file.read_text() if file.exists() else None
        file.write_text((before or "") + "\nprint('run')\n")
        for check in (find_served_model, check_files):
            with pytest.raises(DamagedError, match=r"is damaged: the files in .* are not those that were registered"):
                check(MODEL)
        if before is None:
            file.unlink()
        else:
            file.write_text(before)
    check_files(MODEL)


def test_the_digest_of_code_leaves_out_what_python_compiles(tmp_path: Path):
    (tmp_path / "one.py").write_text("x = 1\n")
    before = digest_code(tmp_path)
    (tmp_path / "__pycache__").mkdir()
    (tmp_path / "__pycache__" / "one.pyc").write_text("y")
    assert digest_code(tmp_path) == before
    (tmp_path / "two.py").write_text("")
    assert digest_code(tmp_path) != before
