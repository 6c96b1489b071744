"""What a flow refuses on the word of a deployment's parameters, and what a stage's error may say."""

from __future__ import annotations

from pathlib import Path

import pytest

from flows.running.run_request import ALLOW_REMOTE_CODE, RunRequest
from qadapter.errors import QAdapterError
from qadapter.files import shown as module
from qadapter.files.shown import remember_secret
from tasks.stages.stage_run import _masked_errors


def test_a_deployments_parameters_run_no_remote_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QADAPTER_HOME", str(tmp_path))
    monkeypatch.delenv(ALLOW_REMOTE_CODE, raising=False)
    checked: list[str] = []
    monkeypatch.setattr("qadapter.config.execution.RunnerSettings.check", lambda _: checked.append("went on"))
    request = RunRequest("full-paper-repro", "smoke", None, {"model.trust_remote_code": True})
    monkeypatch.setattr("prefect.runtime.deployment.get_id", lambda: "a-deployment")
    with pytest.raises(QAdapterError, match=r"trust_remote_code is on, which a deployment's parameters alone may not"):
        request.check(remote=False)
    assert checked == []
    monkeypatch.setenv(ALLOW_REMOTE_CODE, "1")
    request.check(remote=False)
    monkeypatch.delenv(ALLOW_REMOTE_CODE)
    monkeypatch.setattr("prefect.runtime.deployment.get_id", lambda: None)
    request.check(remote=False)
    assert checked == ["went on"] * 2


def test_a_stages_error_does_not_repeat_what_was_filled_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_filled", {})
    remember_secret("pa55word-of-the-test", "QADAPTER_T")
    with (
        pytest.raises(QAdapterError, match=r"OSError: https://x.org/\$\{QADAPTER_T\} is gone") as masked,
        _masked_errors(),
    ):
        raise OSError("https://x.org/pa55word-of-the-test is gone")
    assert masked.value.__suppress_context__
    with pytest.raises(ZeroDivisionError), _masked_errors():
        raise ZeroDivisionError("nothing secret")
