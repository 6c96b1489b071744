"""`qadapter compare`: the report of any recorded runs, side by side (`make compare`).

A RUN is the id or the name of a flow run, or of one run of a domain and method.
"""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import atomic_folder


def compare(
    runs: Annotated[
        list[str], typer.Argument(metavar="RUN", help="id or name of a flow run, or of a domain and method")
    ],
    output: Annotated[Path, typer.Option(help="folder for the report; new or empty", show_default=False)],
    title: Annotated[str, typer.Option(help="heading of the report")] = "Comparison of runs",
) -> None:
    """Write the report and print its summary.

    Raises:
        QAdapterError: there are no runs yet, a run has no measurements, or the folder is not empty.
    """
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    write_comparison(runs, output, title)
    sys.stdout.write((output / "report.md").read_text(encoding="utf-8").partition("## Comparison")[0])
    sys.stdout.write(f"report:  {output / 'report.html'}\n")


def write_comparison(runs: list[str], output: Path, title: str) -> None:
    """Write the report of recorded runs into a folder.

    Raises:
        QAdapterError: there are no runs yet, a run has no measurements, or the folder is not empty.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise QAdapterError(f"the output {str(output)!r} exists and is not an empty folder; name another one")
    if output.resolve() == Path.cwd():
        raise QAdapterError(f"the output {str(output)!r} is the current folder; name a new one in it")
    from tasks.stages.context import workspace
    from tasks.tracking.tracker import Tracker

    tracker = Tracker.for_project(workspace())
    database = Path(tracker.uri.removeprefix("sqlite:///"))
    if tracker.uri.startswith("sqlite:///") and not database.is_file():
        raise QAdapterError(
            f"there are no runs yet: {database} does not exist. Run an experiment first (`make repro`), or set "
            "QADAPTER_HOME or MLFLOW_TRACKING_URI to the store of the runs."
        )
    from qadapter.report.build import build_report
    from tasks.tracking.past_runs import read_runs

    with tempfile.TemporaryDirectory(prefix="qadapter-") as files:
        recorded = read_runs(tracker, list(dict.fromkeys(runs)), Path(files))
        if output.exists():
            output.rmdir()
        with atomic_folder(output) as folder:
            build_report(recorded.rows, title=title, data=recorded.data, config=recorded.config, out=folder)
