"""What Prefect's UI shows of a finished stage. A Prefect server that is away must not fail the stage."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import httpx
from prefect.exceptions import PrefectHTTPStatusError
from prefect.logging import get_run_logger

_PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds between attempts: a restart of the server fits in


def show(create: Callable[..., Any], **content: Any) -> None:
    """Create a Prefect artifact. A server that is away is waited for; one that stays away is only mentioned.

    Prefect's client waits by itself only for a server that it has reached before, and each task has a new client.

    Args:
        create: one of Prefect's `create_…_artifact`.
        content: its arguments.
    """
    for pause in (*_PAUSES, None):
        try:
            create(**content)
            return
        except (httpx.TransportError, PrefectHTTPStatusError) as error:
            if pause is None:
                where = "the stage's files and MLflow have it"
                get_run_logger().warning("Prefect cannot show %r (%s); %s.", content.get("key"), error, where)
                return
            time.sleep(pause)
