"""Where Prefect's server keeps the leases of running deployments: on the disk, and with patience.

A run of a deployment with a concurrency limit holds a lease of 300 s, which its process renews every 225 s. Prefect
cancels a run whose renewal is refused. By default the server keeps leases in its memory: a restart would cancel every
run. It also takes away what is overdue as soon as it looks, even if it was itself away when the renewal came.
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
"""Seconds that a lease may be overdue before it is taken away. While the server is away, a run's client tries again
after at most 256 s and a fifth (`client.max_retries` in `prefect.toml`): a run that lives has renewed it by then."""

# Lease → when this process first found it overdue. By a clock that begins anew with the server, and stands still while
# the machine sleeps, as the clocks of its runs do; whatever somebody sets the time of day to.
_overdue: dict[UUID, float] = {}

_ALL = 1_000_000


class ConcurrencyLeaseStorage(filesystem.ConcurrencyLeaseStorage):
    """Prefect's storage in files below `PREFECT_HOME`; a lease is given up only after `PATIENCE`."""

    async def read_expired_lease_ids(self, limit: int = 100) -> list[UUID]:
        """Leases that nobody has renewed for long enough while somebody could."""
        found = set(await super().read_expired_lease_ids(_ALL))
        for lease in _overdue.keys() - found:
            del _overdue[lease]
        now = time.monotonic()
        return sorted(lease for lease in found if now - _overdue.setdefault(lease, now) >= PATIENCE)[:limit]

    @asynccontextmanager
    async def _lock_expiration_index(self) -> AsyncGenerator[None, None]:
        # Prefect's own lock is a file with the number of its holder's process. After a power cut another process may
        # have that number, and the server would wait for it for ever. The system's lock ends with its holder.
        self._ensure_storage_path()
        async with AsyncFileLock(self.storage_path / "expirations.system-lock", mode=0o600):
            yield
