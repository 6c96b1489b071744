"""`qadapter continual`: preferences one after the other (`make continual`)."""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from flows.commands.arguments import Data, Overrides, names_in
from flows.prefect_host.server import prefect_server
from qadapter.command.app import CommandFailedError

Sequence = Annotated[
    str, typer.Option(help="a name in configs/continual/, or a YAML file", autocompletion=names_in("continual"))
]


def continual(
    overrides: Overrides = None,
    sequence: Sequence = "smoke",
    profile: Annotated[str | None, typer.Option(help="another profile than the sequence's own")] = None,
    data: Data = None,
    plan: Annotated[bool, typer.Option("--plan", help="check and print the stages; run nothing")] = False,
) -> None:
    """Run a sequence of preferences, or only plan it.

    Raises:
        QAdapterError: something in the sequence, the profile or the data cannot work.
        CommandFailedError: a stage failed.
    """
    from flows.continual import check_continual, continual_stages
    from flows.continual import continual as run_continual
    from flows.running.prefect_run import StagesFailedError
    from flows.running.sweep_plan import SweepRecorder
    from qadapter.config.reading import parse_overrides
    from tasks.stages.context import workspace

    changes = parse_overrides(overrides or [])
    loaded, request, experiment = check_continual(sequence, profile, data, changes, remote=not plan)
    if plan:
        recorder = SweepRecorder()
        continual_stages(experiment, loaded, recorder)
        kinds = Counter(stage.task for stage in recorder.stages)
        sys.stdout.write(
            f"Plan of the sequence {loaded.name}: {len(recorder.stages)} stages.\n"
            f"  profile {request.profile}: {' → '.join(experiment.domains)}, seeds "
            f"{', '.join(map(str, experiment.seeds))}, ways {', '.join(loaded.ways)}\n\nStages\n"
            + "".join(f"  {kind:<26}{count:>5}\n" for kind, count in kinds.items())
        )
        return
    start = time.monotonic()
    folder = str(request.data_folder) if data else None
    with prefect_server():
        try:
            summary = run_continual(sequence, profile, folder, changes)
        except StagesFailedError as error:
            raise CommandFailedError(str(error)) from error
    report = Path(summary["report"])
    sys.stdout.write(report.read_text(encoding="utf-8").partition("## After each step")[0].rstrip() + "\n\n")
    sys.stdout.write(f"{loaded.name}: finished in {time.monotonic() - start:.0f} s\n")
    sys.stdout.write(f"report:  {report.with_suffix('.html')}\nfigure:  {report.parent / 'continual.png'}\n")
    sys.stdout.write(f"compare the runs: make ui   (MLflow on {workspace() / 'mlflow.db'})\n")
