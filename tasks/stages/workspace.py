"""The folder of a project's results; known without importing what works in it."""

from __future__ import annotations

import os
from pathlib import Path

PROJECT_ROOT = Path(__file__).resolve().parents[2]


def workspace() -> Path:
    """Folder that holds `mlflow.db`, `mlruns/` and `.qadapter/`: `QADAPTER_HOME`, or the project's root."""
    return Path(os.environ.get("QADAPTER_HOME") or PROJECT_ROOT).resolve()


def has_report() -> bool:
    """Whether any experiment of this workspace has reached its report."""
    return any((workspace() / ".qadapter" / "stages" / "report").glob("*"))
