"""What a command's temporary Prefect server writes goes into a file, not between the run's own lines."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flows.prefect_host import server
from qadapter.errors import QAdapterError


def test_its_log_is_a_file_that_an_error_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    program = "import sys; print('Traceback (most recent call last):', file=sys.stderr); sys.exit(3)"
    monkeypatch.setattr(server, "command", lambda **_: [sys.executable, "-c", program])
    log = tmp_path / "temporary-server.log"
    for count in (1, 2):
        with server._started(tmp_path, "auth") as (_, ready), pytest.raises(QAdapterError) as refused:
            ready()
        assert str(refused.value) == f"The temporary Prefect server did not start (code 3); its log is {log}."
        assert log.read_text() == "Traceback (most recent call last):\n" * count
    log.write_bytes(b"x" * (2**20 + 1))
    with server._started(tmp_path, "auth") as (_, ready), pytest.raises(QAdapterError):
        ready()
    assert log.read_text() == "Traceback (most recent call last):\n"
    assert capfd.readouterr() == ("", "")
