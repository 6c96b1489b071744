"""The command behind `make compare`: the report of any recorded runs, side by side.

python -m flows.commands.compare RUN [RUN …] --output folder

A RUN is the id or the name of a flow run, or of one run of a domain and method.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import atomic_folder
from tasks.stages.context import workspace


def main(arguments: list[str] | None = None) -> int:
    """Write the report; returns the exit code: 0 done, 2 refused."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.commands.compare", description="Compare recorded MLflow runs."
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="id or name of a flow run, or of a domain and method")
    parser.add_argument("--output", required=True, type=Path, help="folder for the report; new or empty")
    parser.add_argument("--title", default="Comparison of runs", help="heading of the report")
    given = parser.parse_args(arguments)
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
    try:
        compare(given.runs, given.output, given.title)
    except QAdapterError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write((given.output / "report.md").read_text(encoding="utf-8").partition("## Comparison")[0])
    sys.stdout.write(f"report:  {given.output / 'report.html'}\n")
    return 0


def compare(runs: list[str], output: Path, title: str) -> None:
    """Write the report of recorded runs into a folder.

    Raises:
        QAdapterError: nothing was recorded yet, a run cannot be used, or the folder is in use.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise QAdapterError(f"the output {str(output)!r} exists and is not an empty folder; name another one")
    from tasks.tracking.tracker import Tracker

    tracker = Tracker.for_project(workspace())
    database = Path(tracker.uri.removeprefix("sqlite:///"))
    if tracker.uri.startswith("sqlite:///") and not database.is_file():
        raise QAdapterError(
            f"there are no runs yet: {database} does not exist. Run an experiment first (`make repro`), or name the "
            "place of the runs in QADAPTER_HOME or MLFLOW_TRACKING_URI."
        )
    from qadapter.report.build import build_report
    from tasks.tracking.recorded import read_runs

    with tempfile.TemporaryDirectory(prefix="qadapter-") as files:
        recorded = read_runs(tracker, list(dict.fromkeys(runs)), Path(files))
        if output.exists():
            output.rmdir()
        with atomic_folder(output) as folder:
            build_report(recorded.rows, title=title, data=recorded.data, config=recorded.config, out=folder)


if __name__ == "__main__":
    sys.exit(main())
