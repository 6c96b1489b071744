"""Prefect artifacts of a finished stage. An unavailable Prefect server must not fail the stage."""

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
"""Largest figure, in bytes, for Prefect's database; larger figures are in the store and in MLflow only."""
_PAUSES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)  # seconds between attempts: long enough for a restart of the server
_AWAY = (httpx.TransportError, PrefectHTTPStatusError)
_FIGURE = re.compile(r"^!\[([^\]]*)\]\(\w+\.png\)$", re.MULTILINE)


def show(create: Callable[..., Any], **content: Any) -> None:
    """Create a Prefect artifact, waiting for an unavailable server. If it stays unavailable, log a warning.

    Prefect's client waits only for a server that it has reached before, and each task has a new client.

    Args:
        create: one of Prefect's `create_…_artifact` functions.
        content: its arguments.
    """
    try:
        retrying(_PAUSES, lambda error: isinstance(error, _AWAY))(create, **content)
    except _AWAY as error:
        where = "it is in the stage's files and in MLflow"
        get_run_logger().warning("Prefect cannot show %r (%s); %s.", content.get("key"), error, where)


def show_page(file: Path, key: str, description: str) -> None:
    """Show a Markdown file, without its figures: Prefect's page cannot follow a link to a file beside it."""
    text = _FIGURE.sub(r"*Figure beside this page: \1*", file.read_text(encoding="utf-8"))
    show(create_markdown_artifact, key=key, markdown=text, description=description)


def show_figure(file: Path, key: str, description: str) -> None:
    """Embed a PNG file (not a link to it); a missing file, or one larger than `LARGEST_IMAGE`, is left out."""
    if file.exists() and file.stat().st_size <= LARGEST_IMAGE:
        show(create_image_artifact, key=key, image_url=data_uri(file), description=description)
