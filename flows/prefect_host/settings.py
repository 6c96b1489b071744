"""Prefect's settings of this process, read again only where they may have changed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

_read: tuple[Any, Any] | None = None
"""What the settings were last read from, and Prefect's context of them."""


def read_settings() -> None:
    """Let Prefect read its settings again, also for threads that send logs and events.

    It takes a quarter of a second, so it is left out where the variables and the folder are those of the last time.
    """
    from prefect import context

    global _read
    source = ({name: value for name, value in os.environ.items() if name.startswith("PREFECT_")}, Path.cwd())
    if _read is None or _read[0] != source or _read[1] is not context.GLOBAL_SETTINGS_CONTEXT:
        context.refresh_global_settings_context()
        _read = (source, context.GLOBAL_SETTINGS_CONTEXT)
