"""What Prefect's clients read of the certificates, once per process instead of once per client."""

from __future__ import annotations

import ssl
from functools import cache
from types import SimpleNamespace

from prefect.client import orchestration


def share_certificates() -> None:
    """Let Prefect's clients of this process share a TLS context per file of certificates.

    A stage in a worker process makes three clients, and a flow run a few; each parsed the same certificates for 26 ms,
    also for a server on this machine, which has none.
    """
    if orchestration.ssl is ssl:
        shared = SimpleNamespace(**vars(ssl) | {"create_default_context": cache(ssl.create_default_context)})
        orchestration.ssl = shared  # type: ignore[assignment]
