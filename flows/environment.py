"""What every command and worker process sets up before it imports Prefect or transformers."""

from __future__ import annotations

import logging
import os
import warnings

from qadapter.files.private import keep_private
from qadapter.files.shown import guard_logs

# Prefect, tqdm and tokenizers read these once, when first imported: `main` sets them before it imports anything.
_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "qadapter,tasks",
    "PREFECT_RESULTS_DEFAULT_SERIALIZER": "json",  # what Prefect keeps of a failed run is no pickle
    "TQDM_DISABLE": "1",
    # Its warnings here are about prompts that are cut to the context on purpose.
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


def prepare_environment() -> None:
    """What every command of the project sets before it imports Prefect or transformers; the user's own settings win.

    From then on, what the process and its children write is its user's alone.
    """
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    quiet_libraries()
    guard_logs()
    keep_private()


def quiet_libraries() -> None:
    """Leave out warnings of libraries about what nobody here can change; for every process that trains."""
    # TRL 1.16 and PEFT 0.21 use names that transformers 5.23 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    # Without a GPU, it warns at its import (by PEFT) that a kernel of the hub is not there, and has one of its own.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
