"""Leases of running deployments, as Prefect's server keeps them for this project: on the disk, and with patience."""

from __future__ import annotations

import asyncio
import json
import os
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from prefect.server.concurrency.lease_storage import ConcurrencyLimitLeaseMetadata, get_concurrency_lease_storage
from prefect.settings import PREFECT_HOME, temporary_settings

from flows.prefect_host import leases
from flows.prefect_host.leases import PATIENCE, ConcurrencyLeaseStorage

LIMIT = uuid4()


class Clock:
    """Seconds since the server started."""

    now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Of a server that was started just now."""
    clock = Clock()
    monkeypatch.setattr(leases, "time", clock)
    monkeypatch.setattr(leases, "_overdue", {})
    return clock


@pytest.fixture
def storage(tmp_path: Path) -> ConcurrencyLeaseStorage:
    """As the server finds it, by the project's settings."""
    with temporary_settings({PREFECT_HOME: tmp_path}):
        found = get_concurrency_lease_storage()
    assert isinstance(found, ConcurrencyLeaseStorage)
    assert found.storage_path == tmp_path / "concurrency_leases"
    return found


def lease_of(storage: ConcurrencyLeaseStorage, seconds: float) -> UUID:
    """A lease that has so long to live, or is overdue since then."""
    one = ConcurrencyLimitLeaseMetadata(slots=1)
    return asyncio.run(storage.create_lease([LIMIT], timedelta(seconds=seconds), one)).id


def given_up(storage: ConcurrencyLeaseStorage) -> list[UUID]:
    return asyncio.run(storage.read_expired_lease_ids())


def test_a_lease_is_revoked_after_ten_minutes_without_renewal(storage: ConcurrencyLeaseStorage, clock: Clock) -> None:
    alive, dead = lease_of(storage, 300), lease_of(storage, -3600)
    assert given_up(storage) == [], "however long it was overdue before this server looked"
    clock.now = PATIENCE - 1
    assert given_up(storage) == []
    clock.now = PATIENCE
    assert given_up(storage) == [dead]
    asyncio.run(storage.revoke_lease(dead))
    assert given_up(storage) == []
    assert asyncio.run(storage.read_active_lease_ids()) == [alive]


def test_a_renewed_lease_is_given_all_of_its_time_again(storage: ConcurrencyLeaseStorage, clock: Clock) -> None:
    lease = lease_of(storage, -1)
    given_up(storage)
    clock.now = PATIENCE - 1
    assert asyncio.run(storage.renew_lease(lease, timedelta(seconds=300)))
    assert given_up(storage) == []
    asyncio.run(storage.renew_lease(lease, timedelta(seconds=-1)))
    clock.now = PATIENCE + 1
    assert given_up(storage) == [], "found overdue for the first time again"
    clock.now = 2 * PATIENCE + 1
    assert given_up(storage) == [lease]


def test_a_restarted_server_knows_its_leases_and_waits_anew(
    storage: ConcurrencyLeaseStorage, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    lease = lease_of(storage, -1)
    given_up(storage)
    clock.now = PATIENCE - 1
    given_up(storage)
    monkeypatch.setattr(leases, "_overdue", {})
    again = ConcurrencyLeaseStorage(storage.storage_path)
    clock.now = 5.0
    assert given_up(again) == []
    clock.now = 4.0 + PATIENCE
    assert given_up(again) == []
    assert asyncio.run(again.renew_lease(lease, timedelta(seconds=300))), "its run is alive and comes back"
    found = asyncio.run(again.read_lease(lease))
    assert found is not None
    assert timedelta(seconds=290) < found.expiration - datetime.now(UTC) <= timedelta(seconds=300)
    assert (found.resource_ids, found.metadata) == ([LIMIT], ConcurrencyLimitLeaseMetadata(slots=1))


def test_many_leases_that_wait_do_not_hide_one_that_is_given_up(storage: ConcurrencyLeaseStorage, clock: Clock) -> None:
    """Prefect asks for a hundred at a time."""
    dead = lease_of(storage, -1)
    given_up(storage)
    clock.now = PATIENCE
    index = storage.storage_path / "expirations.json"
    known = json.loads(index.read_text())
    index.write_text(json.dumps({str(uuid4()): "2026-01-01T00:00:00+00:00" for _ in range(150)} | known))
    assert given_up(storage) == [dead]
    clock.now = 2 * PATIENCE
    assert len(given_up(storage)) == 100


def test_a_lock_that_a_killed_server_left_is_no_obstacle(storage: ConcurrencyLeaseStorage, clock: Clock) -> None:
    """With the number of a process that is another one by now: Prefect's own lock would wait for it for ever."""
    storage.storage_path.mkdir()
    (storage.storage_path / "expirations.lock").write_text(str(os.getpid()))

    async def renew() -> bool:
        async with asyncio.timeout(20):
            lease = await storage.create_lease([LIMIT], timedelta(seconds=300))
            return await storage.renew_lease(lease.id, timedelta(seconds=300))

    assert asyncio.run(renew())
