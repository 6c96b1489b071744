"""The Makefile's own decisions, as `make -n` prints them."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import PROJECT_ROOT


@pytest.mark.parametrize("named", [True, False])
def test_ui_shows_the_runs_of_the_workspace(tmp_path: Path, named: bool) -> None:
    home = {"QADAPTER_HOME": str(tmp_path)} if named else {}
    environment = {name: value for name, value in os.environ.items() if name not in ("QADAPTER_HOME", "MAKEFLAGS")}
    done = subprocess.run(
        ["make", "-n", "ui"], cwd=PROJECT_ROOT, env={**environment, **home}, capture_output=True, text=True, check=True
    )
    assert f'"sqlite:///{tmp_path if named else PROJECT_ROOT}/mlflow.db"' in done.stdout
