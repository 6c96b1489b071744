"""What the served model says when it fails itself: nothing of the machine that it runs on."""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow.exceptions import MlflowException

from tasks.tracking.served_policy import ServedPolicy


def test_a_fault_of_the_model_is_answered_without_its_traceback(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory in /home/operator/secret/model.py")

    policy = ServedPolicy()
    policy._name, policy._generator = "policy", SimpleNamespace(submit=fail)
    prepared = SimpleNamespace(turns=[], prompt=[], sampling=None, tokenizer=None)
    monkeypatch.setattr("qadapter.serving.protocol.prepare", lambda *_: prepared)
    rows = {"messages": [[{"role": "user", "content": "Hello"}]]}
    with caplog.at_level(logging.ERROR), pytest.raises(MlflowException) as failed:
        policy.predict(None, rows)
    assert failed.value.get_http_status_code() == 500
    assert "operator" not in failed.value.serialize_as_json()
    assert "stack_trace" not in failed.value.serialize_as_json()
    assert failed.value.__suppress_context__
    assert "operator" in caplog.text, "the server's own log says why"
