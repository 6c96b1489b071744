"""Prefect's clients share what they read of the certificates (`flows/prefect_host/certificates.py`)."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Any

import certifi
import pytest
from prefect.client import orchestration
from prefect.settings import PREFECT_API_SSL_CERT_FILE, temporary_settings

from flows.prefect_host.certificates import share_certificates


def test_clients_share_a_context_per_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice as once; another file is read, and both verify."""
    parse = ssl.create_default_context
    monkeypatch.setattr(ssl, "create_default_context", getattr(parse, "__wrapped__", parse))  # the tests share one too
    monkeypatch.setattr(orchestration, "ssl", ssl)
    share_certificates()
    share_certificates()
    other = tmp_path / "other.pem"
    other.write_text(Path(certifi.where()).read_text())
    read: list[ssl.SSLContext] = []

    class Recording(orchestration.PrefectHttpxSyncClient):
        def __init__(self, *, verify: ssl.SSLContext, **options: Any) -> None:
            read.append(verify)
            super().__init__(verify=verify, **options)

    monkeypatch.setattr(orchestration, "PrefectHttpxSyncClient", Recording)
    for file in (None, None, str(other)):
        with temporary_settings({PREFECT_API_SSL_CERT_FILE: file}):
            orchestration.SyncPrefectClient("http://127.0.0.1:9/api")
    first, second, third = read
    assert first is second
    assert third is not first
    assert {one.verify_mode for one in (first, third)} == {ssl.CERT_REQUIRED}
    assert first.check_hostname
    assert third.check_hostname
