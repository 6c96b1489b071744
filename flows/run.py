"""The command behind `make repro` and `make plan`.

python -m flows.run --profile smoke
python -m flows.run --profile mini --data path/to/folder training.max_steps=20
python -m flows.run --profile paper --plan
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# Prefect, tqdm and tokenizers read these once, when first imported: `main` sets them before it imports anything.
_ENVIRONMENT = {
    "DO_NOT_TRACK": "1",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "90",
    "PREFECT_LOGGING_EXTRA_LOGGERS": "qadapter,tasks",
    "TQDM_DISABLE": "1",
    # Its warnings here are about prompts that are cut to the context on purpose.
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}


def prepare_environment() -> None:
    """What every command of the project sets before it imports Prefect or transformers; the user's own settings win."""
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    quiet_libraries()


def quiet_libraries() -> None:
    """Leave out warnings of libraries about what nobody here can change; for every process that trains."""
    # TRL 1.16 and PEFT 0.21 use names that transformers 5.23 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    # Without a GPU, it warns at its import (by PEFT) that a kernel of the hub is not there, and has one of its own.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


@contextmanager
def prefect_server() -> Iterator[None]:
    """The server that the user names or that is up; where none is, Prefect's own for the length of the block.

    That one is started here and named in the environment, for worker processes (`parallel: 2`): each would start one
    of its own, after a minute of looking for the one of `make serve`.
    """
    from flows.serve import answers, api_url
    from tasks.context import PROJECT_ROOT

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


def main(arguments: list[str] | None = None) -> int:
    """Run, or only plan, an experiment; returns the exit code: 0 done, 1 a stage failed, 2 refused."""
    prepare_environment()
    from qadapter.errors import QAdapterError
    from qadapter.experiment import profiles

    parser = argparse.ArgumentParser(prog="python -m flows.run", description="Run or plan the full experiment.")
    parser.add_argument(
        "--profile", default="smoke", help=f"one of {', '.join(profiles())}, or a YAML file (default: smoke)"
    )
    parser.add_argument("--data", help="folder with the data, where the profile's paths say {data}")
    parser.add_argument("--plan", action="store_true", help="check everything, print stages and estimates, run nothing")
    parser.add_argument("--traceback", action="store_true", help="show where an error comes from")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change: training.max_steps=20")
    given = parser.parse_args(arguments)
    try:
        return _plan(given) if given.plan else _run(given)
    except QAdapterError as error:
        if given.traceback:
            raise
        sys.stderr.write(f"error: {error}\n")
        return 2


def _plan(given: argparse.Namespace) -> int:
    from flows.plan import plan_text

    sys.stdout.write(plan_text(given.profile, given.data, given.overrides) + "\n")
    return 0


def _run(given: argparse.Namespace) -> int:
    from flows.launch import Launch, StagesFailedError
    from qadapter.experiment import parse_overrides

    overrides = parse_overrides(given.overrides)
    launch = Launch("full-paper-repro", given.profile, given.data, overrides)
    experiment = launch.check()  # refuse what cannot work before Prefect starts anything
    from flows.full_paper_repro import full_paper_repro
    from tasks.context import workspace

    start = time.monotonic()
    data = str(launch.data_folder) if launch.data_folder else None
    with prefect_server():
        try:
            summary = full_paper_repro(given.profile, data, overrides)
        except StagesFailedError as error:
            if given.traceback:
                raise
            sys.stderr.write(f"error: {error}\n")
            return 1
    report = Path(summary["report"])
    sys.stdout.write(_comparison(report) + "\n\n")
    sys.stdout.write(f"{experiment.name}: finished in {time.monotonic() - start:.0f} s\n")
    sys.stdout.write(f"report:  {report}\nfigure:  {report.parent / 'retention_adaptation.png'}\n")
    sys.stdout.write(f"compare the runs: make ui   (MLflow on {workspace() / 'mlflow.db'})\n")
    return 0


def _comparison(report: Path) -> str:
    """The table of the report, as it stands there."""
    text = report.read_text(encoding="utf-8")
    return text.split("## Comparison\n\n")[1].split("\n\n*adaptation*")[0]


if __name__ == "__main__":
    sys.exit(main())
