"""Storage of the leases of running deployments for Prefect's server: on disk, with a grace period.

A run of a deployment with a concurrency limit holds a lease of 300 s, which its process renews every 225 s. Prefect
cancels a run whose renewal is refused. By default the server keeps leases in memory, so a restart would cancel every
run. It also revokes an overdue lease at once, even if the server itself was down when the renewal was due.
`prefect.toml` names this module (`server.concurrency.lease_storage`); only the server loads it.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from uuid import UUID

from filelock import AsyncFileLock
from prefect.server.concurrency.lease_storage import filesystem

PATIENCE = 600.0
"""Seconds that a lease may be overdue before it is revoked. While the server is down, a run's client retries after at
most 256 s plus a fifth (`client.max_retries` in `prefect.toml`), so a live run has renewed its lease by then."""

# Lease → when this process first found it overdue, by the monotonic clock: it restarts with the server, stops while the
# machine is suspended, as the clocks of the runs do, and does not depend on the time of day.
_overdue: dict[UUID, float] = {}

_ALL = 1_000_000


class ConcurrencyLeaseStorage(filesystem.ConcurrencyLeaseStorage):
    """Prefect's storage in files below `PREFECT_HOME`; a lease is revoked only after `PATIENCE`."""

    async def read_expired_lease_ids(self, limit: int = 100) -> list[UUID]:
        """Leases that were not renewed for `PATIENCE` seconds while the server was up."""
        found = set(await super().read_expired_lease_ids(_ALL))
        for lease in _overdue.keys() - found:
            del _overdue[lease]
        now = time.monotonic()
        return sorted(lease for lease in found if now - _overdue.setdefault(lease, now) >= PATIENCE)[:limit]

    @asynccontextmanager
    async def _lock_expiration_index(self) -> AsyncGenerator[None, None]:
        # Prefect's own lock is a file with the process id of its holder. After a power cut another process may have
        # that id, and the server would wait for ever. The system's lock ends with its holder.
        self._ensure_storage_path()
        async with AsyncFileLock(self.storage_path / "expirations.system-lock", mode=0o600):
            yield
