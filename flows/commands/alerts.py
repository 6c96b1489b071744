"""`qadapter alerts`: a message in Slack, an e-mail or a POST when a run is rejected, quarantined, fell or failed.

The automations are the files in `configs/alerts/`. A block on the server keeps the address, which may hold a secret.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.prefect_host.server import server_access
from qadapter.config.folder import CONFIGS
from qadapter.errors import QAdapterError, did_you_mean
from qadapter.files.shown import shown
from qadapter.files.yaml_text import read_yaml

if TYPE_CHECKING:
    from prefect.blocks.abstract import NotificationBlock
    from prefect.client.orchestration import SyncPrefectClient

FOLDER = CONFIGS / "alerts"
ADDRESS_VARIABLE = "QADAPTER_ALERT_URL"
_SCHEMES = {"slack": ("https://", "http://"), "webhook": ("https://", "http://"), "email": ("mailtos://", "mailto://")}


def kinds() -> list[str]:
    """The kinds of alerts: names of the files in `configs/alerts/`."""
    return sorted(file.stem for file in FOLDER.glob("*.yaml"))


def alerts(
    kind: Annotated[str, typer.Argument(metavar="slack|email|webhook", autocompletion=lambda: kinds())],
    url: Annotated[
        str | None,
        typer.Option(
            help="where to: Slack's webhook, an address that takes JSON, or mailtos://user:password@server?from=…&to=… "
            f"(default: the environment variable {ADDRESS_VARIABLE}, which keeps secrets out of the shell's history)",
            show_default=False,
        ),
    ] = None,
    remove: Annotated[bool, typer.Option("--remove", help="remove this alert from the server")] = False,
) -> None:
    """Create an alert on the running Prefect server, after a first message has got through.

    Raises:
        QAdapterError: no server answers, there is no such kind, or the message could not be sent.
    """
    if kind not in kinds():
        raise QAdapterError(f"there is no alert {kind!r}{did_you_mean(kind, kinds())}")
    address = url or os.environ.get(ADDRESS_VARIABLE)
    if not remove:
        if not address:
            raise QAdapterError(f"where should the alert go? Give --url, or set {ADDRESS_VARIABLE}")
        if not address.startswith(_SCHEMES[kind]):
            wanted = " or ".join(_SCHEMES[kind])
            raise QAdapterError(f"the address {shown(address)} of {kind} alerts should begin with {wanted}")
    with server_access("Alerts live on a server.") as where:
        from prefect.client.orchestration import get_client

        with get_client(sync_client=True) as client:
            settings = read_yaml((FOLDER / f"{kind}.yaml").read_text(encoding="utf-8"))
            before = [entry.id for entry in client.read_automations_by_name(settings["name"])]
            if not remove:
                assert address is not None
                create(client, kind, settings, address)
            for automation in before:
                client.delete_automation(automation)
    if remove and not before:
        raise QAdapterError(f"there is no {kind} alert on the server at {where}")
    done = f"removed from {where}" if remove else f"are on at {where}; the first message was sent"
    sys.stdout.write(f"{kind} alerts {done}\n")


def create(client: SyncPrefectClient, kind: str, settings: dict[str, Any], address: str) -> None:
    """Send a first message, then create the block and the automation.

    Raises:
        QAdapterError: the message did not get through.
    """
    from prefect.events.schemas.automations import AutomationCore

    block: Any = _BLOCKS[kind](address)  # its methods are typed as coroutines, and are none outside of a loop
    try:
        with block.raise_on_failure():
            block.notify(subject="qadapter: alerts are on", body=f"{settings['description']}")
    except Exception as error:  # of Apprise, httpx and Prefect, by kind
        raise QAdapterError(
            f"the first message could not be sent to {shown(address)}: {shown(str(error)) or type(error).__name__}. "
            "Check the address; nothing was created."
        ) from error
    identifier = block.save(settings["name"], overwrite=True)
    for action in settings["actions"]:
        action["block_document_id"] = str(identifier)
    client.create_automation(AutomationCore.model_validate(settings))


def _post(json_data: dict[str, str]) -> Callable[[str], NotificationBlock]:
    def block(address: str) -> NotificationBlock:
        from prefect.blocks.notifications import CustomWebhookNotificationBlock
        from prefect.types import SecretDict

        # The address itself is a secret: it is all that is needed to write into the channel.
        secrets = SecretDict({"address": address})
        return CustomWebhookNotificationBlock(
            name="qadapter", url="{{address}}", json_data=dict(json_data), secrets=secrets, headers=None, cookies=None
        )

    return block


def _mail(address: str) -> NotificationBlock:
    from prefect.blocks.notifications import SlackWebhook
    from pydantic import SecretStr

    return SlackWebhook(url=SecretStr(address))


_BLOCKS: dict[str, Callable[[str], NotificationBlock]] = {
    "slack": _post({"text": "{{subject}}\n{{body}}"}),
    "webhook": _post({"subject": "{{subject}}", "body": "{{body}}"}),
    "email": _mail,
}
