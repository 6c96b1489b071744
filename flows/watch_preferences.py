"""New preferences are announced by a Prefect event, which starts `customize-on-new-preferences` where it is deployed.

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
# Seconds. An automation asks for a run within moments, and what waits for its turn is seen in Prefect: after an hour
# with neither, the event was lost, for example by a server that was killed or because nobody listened.
_LOST_AFTER = 3600.0
# A run that was killed is asked for again at once; one that came to no end twice may never come to one.
_FAILED_TWICE = 1800.0
_LONGEST = 86400.0


def distance(times: int, *, begun: bool) -> float:
    """Seconds that must lie between an announcement and the next one of the same content.

    They double with each one, up to a day: 0, 30 min, 1 h, 2 h … where a run of it had begun, else 1 h, 2 h, 4 h …

    Args:
        times: how often the content has been announced.
        begun: a run of it had begun since, and came to no end.
    """
    if begun and times <= 1:
        return 0.0
    first, doubled = (_FAILED_TWICE, times - 2) if begun else (_LOST_AFTER, times - 1)
    return min(first * 2.0 ** min(max(doubled, 0), 30), _LONGEST)


def announce(customization: Customization) -> None:
    """Say that new preferences of a customisation have arrived. `prefect.yaml` says which deployments listen."""
    emit(ANNOUNCED, f"qadapter.preferences.{customization.name}", {"config": customization.name})


def emit(event: str, resource: str, payload: Mapping[str, Any]) -> None:
    """Send an event and wait until the server has it: Prefect's own `emit_event` may lose one at a process's end."""

    async def send() -> None:
        async with get_events_client(checkpoint_every=1) as client:
            await client.emit(
                Event(event=event, resource=Resource({"prefect.resource.id": resource}), payload=dict(payload))
            )

    asyncio.run(send())


@flow(name="watch-preferences")
def watch_preferences(config: str = "smoke") -> State[Any]:
    """Look at the source (folder, file, URL or hub revision) and announce it if its content changed.

    The held-out pairs and the config count too. A change is announced once, and again if the run that it started did
    not come to an end, or if after an hour none has begun or is about to; further ones come more and more seldom
    (`distance`). Ends as `NothingNew` or `Announced`.

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
        # Before the event: the run that it starts may begin at once, and is then one that began after it.
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
    """What is said of the source when it is announced; None if it need not be."""
    # A run begins and ends behind its lock. One that had begun before the lock was found free and has not written down
    # an end after that, has come to none.
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
    # A clock that was set back is no reason to wait.
    if 0 <= time.time() - seen.announced_at < distance(seen.announcements, begun=failed):
        return None
    if failed:
        return "announced again: the run of this content did not come to an end"
    return None if _is_about_to_run(config) else "announced again: no run of this content has begun since"


def _is_about_to_run(config: str) -> bool:
    """Whether a run waits for its turn, as Prefect knows; a server that does not answer knows of none.

    Runs that Prefect takes for running are not asked for: they have the lock, or are dead.
    """
    of_this_flow = FlowFilter(name=FlowFilterName(any_=[NAME]))
    try:
        with get_client(sync_client=True) as client:
            runs = due_runs(client, datetime.now(UTC), StateType.SCHEDULED, StateType.PENDING, flow_filter=of_this_flow)
    except (httpx.TransportError, PrefectHTTPStatusError):
        return False
    return any(run.parameters.get("config", config) == config for run in runs)
