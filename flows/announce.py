"""New preferences are announced by a Prefect event, which starts `customize-on-new-preferences` where it is deployed.

python -m flows.recurring announce --config smoke
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from prefect import flow
from prefect.events import Event, Resource
from prefect.events.clients import get_events_client
from prefect.logging import get_run_logger
from prefect.states import Completed, State

from flows.customize import at_work, fingerprint_of
from flows.launch import check_workspace
from qadapter.customization import Customization, load_customization
from tasks.context import workspace
from tasks.preferences import Seen

ANNOUNCED = "qadapter.preferences.announced"


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
    not come to an end. Ends as `NothingNew` or `Announced`.

    Args:
        config: a name in `configs/customize/`, or a YAML file.
    """
    customization = load_customization(config)
    check_workspace(workspace())
    fingerprint = fingerprint_of(customization)
    busy = at_work(customization)  # asked first: a run that ends now has written down what it did
    seen = Seen.read(customization)
    failed = fingerprint == seen.started and not busy
    if fingerprint == seen.fingerprint or (fingerprint == seen.announced and not failed):
        name, message = "NothingNew", f"nothing new in {customization.source.path}"
    else:
        again = fingerprint == seen.announced
        announce(customization)
        # Until the run has begun that this announcement starts, no run of this content has failed.
        Seen.update(customization, announced=fingerprint, started="")
        why = "announced again: the run of this content did not come to an end" if again else "has changed"
        name, message = "Announced", f"{customization.source.path} {why}"
    get_run_logger().info("%s: %s", name, message)
    return Completed(name=name, message=message, data={"outcome": name, "message": message})
