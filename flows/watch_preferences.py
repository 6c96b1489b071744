"""Announce new preferences by a Prefect event, which starts the deployment of `customize-on-new-preferences`.

qadapter announce --config smoke
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import httpx
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.objects import StateType
from prefect.events import Event, Resource
from prefect.events.clients import get_events_client
from prefect.exceptions import PrefectHTTPStatusError
from prefect.logging import get_run_logger
from prefect.states import Completed, State

from flows.customize import NAME, at_work, fingerprint_of
from flows.prefect_host.waiting_runs import due_runs
from flows.running.run_request import check_workspace
from qadapter.config.customization import Customization, load_customization
from qadapter.files.shown import shown
from tasks.preferences import Seen
from tasks.stages.context import workspace

ANNOUNCED = "qadapter.preferences.announced"
# Seconds. An automation requests a run at once, and waiting runs are visible in Prefect. If there is neither after an
# hour, the event was lost, for example because the server was killed or no automation was active.
_LOST_AFTER = 3600.0
# A killed run is requested again at once; after a second failure the intervals grow, since it may never succeed.
_FAILED_TWICE = 1800.0
_LONGEST = 86400.0


def distance(times: int, *, begun: bool) -> float:
    """The minimum seconds between two announcements of the same content.

    They double each time, up to a day: 0, 30 min, 1 h, 2 h … if a run had started, else 1 h, 2 h, 4 h …

    Args:
        times: how often the content has been announced.
        begun: whether a run of it has started since and did not finish.
    """
    if begun and times <= 1:
        return 0.0
    first, doubled = (_FAILED_TWICE, times - 2) if begun else (_LOST_AFTER, times - 1)
    return min(first * 2.0 ** min(max(doubled, 0), 30), _LONGEST)


def announce(customization: Customization) -> None:
    """Announce new preferences of a customization. `prefect.yaml` configures the deployments that react."""
    emit(ANNOUNCED, f"qadapter.preferences.{customization.name}", {"config": customization.name})


def emit(event: str, resource: str, payload: Mapping[str, Any]) -> None:
    """Send an event and wait until the server has it; Prefect's `emit_event` may lose one when the process ends."""

    async def send() -> None:
        async with get_events_client(checkpoint_every=1) as client:
            await client.emit(
                Event(event=event, resource=Resource({"prefect.resource.id": resource}), payload=dict(payload))
            )

    asyncio.run(send())


@flow(name="watch-preferences")
def watch_preferences(config: str = "smoke") -> State[Any]:
    """Look at the source (folder, file, URL or hub revision) and announce it if its content changed.

    Changes of held-out pairs and config count too. A change is announced once, and again if its run did not finish, or
    if no run has started or is waiting after an hour; the intervals of further announcements grow (`distance`). Ends as
    `NothingNew` or `Announced`.

    Args:
        config: a name in `configs/customize/`, or a YAML file.
    """
    customization = load_customization(config)
    check_workspace(workspace())
    where = shown(str(customization.source.path))
    fingerprint = fingerprint_of(customization)
    if why := _why_announce(config, customization, fingerprint):
        seen = Seen.read(customization)
        before = seen.announcements if fingerprint == seen.announced else 0
        # Stored before the event is sent, since its run may start at once and must count as started afterwards.
        Seen.update(customization, announced=fingerprint, announced_at=time.time(), announcements=before + 1)
        try:
            announce(customization)
        except Exception:
            Seen.update(customization, announced_at=0.0, announcements=before)
            raise
        name, message = "Announced", f"{where} {why}"
    else:
        name, message = "NothingNew", f"nothing new in {where}"
    get_run_logger().info("%s: %s", name, message)
    return Completed(name=name, message=message, data={"outcome": name, "message": message})


def _why_announce(config: str, customization: Customization, fingerprint: str) -> str | None:
    """The reason for announcing the source; None if there is none."""
    # A run starts and ends under its lock. If the lock is free, a run that started earlier but recorded no end did not
    # finish.
    begun = Seen.read(customization)
    busy = at_work(customization)
    seen = Seen.read(customization)
    if fingerprint == seen.fingerprint:
        return None
    if fingerprint != seen.announced:
        return "has changed"
    if busy:
        return None
    failed = fingerprint == begun.started and begun.started_at > seen.announced_at
    # Do not wait if the clock was set back.
    if 0 <= time.time() - seen.announced_at < distance(seen.announcements, begun=failed):
        return None
    if failed:
        return "announced again: the run of this content did not finish"
    return None if _is_about_to_run(config) else "announced again: no run of this content has started since"


def _is_about_to_run(config: str) -> bool:
    """Whether a run is waiting according to Prefect; False if the server does not answer.

    Runs in the state running are ignored: they hold the lock, or are dead.
    """
    of_this_flow = FlowFilter(name=FlowFilterName(any_=[NAME]))
    try:
        with get_client(sync_client=True) as client:
            runs = due_runs(client, datetime.now(UTC), StateType.SCHEDULED, StateType.PENDING, flow_filter=of_this_flow)
    except (httpx.TransportError, PrefectHTTPStatusError):
        return False
    return any(run.parameters.get("config", config) == config for run in runs)
