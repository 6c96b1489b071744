"""Process setup of every command and worker, before it imports Prefect or transformers."""

from __future__ import annotations

import os

from qadapter.files.private import keep_private
from qadapter.files.shown import guard_logs, quiet_libraries

# Prefect, tqdm and tokenizers read these once, when first imported: `main` sets them before it imports anything.
_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "qadapter,tasks",
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",  # Prefect stores results of failed runs without pickle
    "TQDM_DISABLE": "1",
    # Its warnings are about prompts that we cut to the context on purpose.
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


def prepare_environment() -> None:
    """Set the environment of a command before it imports Prefect or transformers; the user's settings take precedence.

    From then on, files that the process and its children write are private to the user.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    quiet_libraries()
    guard_logs()
    keep_private()
