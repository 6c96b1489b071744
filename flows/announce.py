"""New preferences are announced by a Prefect event, which starts `customize-on-new-preferences` where it is deployed.

python -m flows.recurring announce --config smoke
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from prefect import flow
from prefect.events import Event, Resource
from prefect.events.clients import get_events_client
from prefect.logging import get_run_logger
from prefect.states import Completed, State

from flows.customize import fingerprint_of
from qadapter.customization import Customization, load_customization
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

    A change is announced once; what becomes of it is the other flow's matter. Ends as `NothingNew` or `Announced`.

    Args:
        config: a name in `configs/customize/`, or a YAML file.
    """
    customization = load_customization(config)
    fingerprint, seen = fingerprint_of(customization), Seen.read(customization)
    if fingerprint in (seen.fingerprint, seen.announced):
        name, message = "NothingNew", f"nothing new in {customization.source.path}"
    else:
        announce(customization)
        replace(Seen.read(customization), announced=fingerprint).write(customization)
        name, message = "Announced", f"{customization.source.path} has changed"
    get_run_logger().info("%s: %s", name, message)
    return Completed(name=name, message=message, data={"outcome": name, "message": message})
