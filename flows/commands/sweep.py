"""`qadapter sweep`: many settings of every method (`make sweep`)."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from flows.commands.arguments import Data, Overrides, names_in
from flows.prefect_host.server import prefect_server
from qadapter.command.app import CommandFailedError

Sweep = Annotated[str, typer.Option(help="a name in configs/sweep/, or a YAML file", autocompletion=names_in("sweep"))]


def sweep(
    overrides: Overrides = None,
    sweep: Sweep = "smoke",
    profile: Annotated[str | None, typer.Option(help="another profile than the sweep's own")] = None,
    data: Data = None,
    plan: Annotated[bool, typer.Option("--plan", help="check and print settings and time; run nothing")] = False,
) -> None:
    """Run a sweep, or only plan it.

    Raises:
        QAdapterError: something in the sweep, the profile or the data cannot work.
        CommandFailedError: a stage failed.
    """
    from flows.running.prefect_run import StagesFailedError
    from flows.running.sweep_plan import plan_text
    from flows.sweep import check_sweep
    from flows.sweep import sweep as run_sweep
    from qadapter.config.reading import parse_overrides
    from tasks.stages.context import workspace

    changes = parse_overrides(overrides or [])
    if plan:
        sys.stdout.write(plan_text(check_sweep(sweep, profile, data, changes, remote=False)) + "\n")
        return
    checked = check_sweep(sweep, profile, data, changes)  # before Prefect starts anything
    start = time.monotonic()
    folder = str(checked.request.data_folder) if data else None
    with prefect_server():
        try:
            summary = run_sweep(sweep, profile, folder, changes)
        except StagesFailedError as error:
            raise CommandFailedError(str(error)) from error
    report = Path(summary["report"])
    text = report.read_text(encoding="utf-8")
    sys.stdout.write(text.partition("## Every setting")[0].rstrip() + "\n\n")
    sys.stdout.write(f"{len(checked.variants)} settings: finished in {time.monotonic() - start:.0f} s\n")
    sys.stdout.write(f"report:  {report}\nfigure:  {report.parent / 'sweep.png'}\n")
    sys.stdout.write(f"compare the runs: make ui   (MLflow on {workspace() / 'mlflow.db'})\n")
