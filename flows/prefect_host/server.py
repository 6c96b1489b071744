"""The Prefect server that a command runs against: the one that is up, or a temporary one."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def prefect_server() -> Iterator[None]:
    """The server that the user names or that is up; where none is, Prefect's own for the length of the block.

    That one is started here and named in the environment, for worker processes (`parallel: 2`): each would start one
    of its own, after a minute of looking for the one of `make serve`.
    """
    from flows.commands.serve import answers, api_url
    from tasks.stages.context import PROJECT_ROOT

    if "PREFECT_API_URL" in os.environ or answers(api_url(PROJECT_ROOT)):
        yield
        return
    # Imported only where a server is started: that takes seconds.
    from prefect.context import refresh_global_settings_context
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        server = SubprocessASGIServer()
        server.start()
    os.environ["PREFECT_API_URL"] = server.api_url
    refresh_global_settings_context()  # for the threads that send logs and events
    logs = logging.getLogger("prefect.flow_runs")
    logs.addFilter(_no_link)
    try:
        yield
        APILogWorker.drain_all(timeout=10)
        EventsWorker.drain_all(timeout=10)
    finally:
        logs.removeFilter(_no_link)
        del os.environ["PREFECT_API_URL"]
        refresh_global_settings_context()
        server.stop()


def _no_link(record: logging.LogRecord) -> bool:
    """Prefect's "View at": its own server for the length of a run has no pages."""
    return not record.getMessage().startswith("View at ")
