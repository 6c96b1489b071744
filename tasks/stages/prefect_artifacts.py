"""What Prefect's UI shows of a finished stage. A Prefect server that is away must not fail the stage."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from prefect.artifacts import create_image_artifact, create_markdown_artifact
from prefect.exceptions import PrefectHTTPStatusError
from prefect.logging import get_run_logger

from qadapter.report.page import data_uri
from tasks.stages.retries import retrying

LARGEST_IMAGE = 1_000_000
"""Bytes of a figure that is put into Prefect's database; a larger one is in the store and in MLflow only."""
_PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds between attempts: a restart of the server fits in
_AWAY = (httpx.TransportError, PrefectHTTPStatusError)
_FIGURE = re.compile(r"^!\[([^\]]*)\]\(\w+\.png\)$", re.MULTILINE)


def show(create: Callable[..., Any], **content: Any) -> None:
    """Create a Prefect artifact. A server that is away is waited for; one that stays away is only mentioned.

    Prefect's client waits by itself only for a server that it has reached before, and each task has a new client.

    Args:
        create: one of Prefect's `create_…_artifact`.
        content: its arguments.
    """
    try:
        retrying(_PAUSES, lambda error: isinstance(error, _AWAY))(create, **content)
    except _AWAY as error:
        where = "the stage's files and MLflow have it"
        get_run_logger().warning("Prefect cannot show %r (%s); %s.", content.get("key"), error, where)


def show_page(file: Path, key: str, description: str) -> None:
    """Show a Markdown file, without its figures: Prefect's page cannot follow a link to a file beside it."""
    text = _FIGURE.sub(r"*Figure beside this page: \1*", file.read_text(encoding="utf-8"))
    show(create_markdown_artifact, key=key, markdown=text, description=description)


def show_figure(file: Path, key: str, description: str) -> None:
    """Show a PNG file, itself and not a link to it; one that is missing or larger than `LARGEST_IMAGE` is left out."""
    if file.exists() and file.stat().st_size <= LARGEST_IMAGE:
        show(create_image_artifact, key=key, image_url=data_uri(file), description=description)
