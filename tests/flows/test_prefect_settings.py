"""Prefect reads its settings again only where they may have changed (`flows/prefect_host/settings.py`)."""

from __future__ import annotations

from pathlib import Path

import pytest
from prefect import context
from prefect.settings import PREFECT_API_URL

from flows.prefect_host.settings import read_settings


def test_settings_are_read_where_they_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A variable of Prefect's, the folder, or somebody else's reading; nothing else."""
    monkeypatch.setattr(context, "GLOBAL_SETTINGS_CONTEXT", context.GLOBAL_SETTINGS_CONTEXT)  # as it is afterwards
    read: list[str | None] = []
    refresh = context.refresh_global_settings_context

    def counted() -> None:
        refresh()
        read.append(context.GLOBAL_SETTINGS_CONTEXT.settings.api.url)

    monkeypatch.setattr(context, "refresh_global_settings_context", counted)
    for url in ("http://127.0.0.1:9/api", "http://127.0.0.1:9/api", "http://127.0.0.1:10/api"):
        monkeypatch.setenv(PREFECT_API_URL.name, url)
        read_settings()
        monkeypatch.setenv("OTHER", url)
    assert read == ["http://127.0.0.1:9/api", "http://127.0.0.1:10/api"]
    monkeypatch.chdir(tmp_path)
    read_settings()
    refresh()
    read_settings()
    read_settings()
    assert len(read) == 4
