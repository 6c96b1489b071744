"""`qadapter run` and `qadapter plan`: the whole experiment (`make repro`, `make plan`)."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from flows.commands.arguments import Data, Overrides, Profile
from flows.prefect_host.server import starting_server
from qadapter.command.app import CommandFailedError
from qadapter.files.imports import importing


def plan(overrides: Overrides = None, profile: Profile = "smoke", data: Data = None) -> None:
    """Print stages and estimates of an experiment.

    Raises:
        QAdapterError: something in the config or the data cannot work.
    """
    from flows.running.plan import plan_text

    sys.stdout.write(plan_text(profile, data, overrides or []) + "\n")


def run(overrides: Overrides = None, profile: Profile = "smoke", data: Data = None) -> None:
    """Run an experiment and print its comparison.

    Raises:
        QAdapterError: something in the config or the data cannot work.
        CommandFailedError: a stage failed.
    """
    from flows.running.forking import start_forking
    from qadapter.config.experiment import load_experiment
    from qadapter.config.reading import parse_overrides
    from tasks.stages.workspace import has_report, workspace

    start = time.monotonic()
    changes = parse_overrides(overrides or [])
    experiment = load_experiment(profile, changes)  # refuse what cannot work before anything starts
    with starting_server() as ready:  # it imports while this process does
        with importing():
            from flows.full_paper_repro import full_paper_repro
            from flows.running.prefect_run import StagesFailedError
            from flows.running.run_request import RunRequest
            from tasks.tracking.store import import_for_database

            import_for_database()
        start_forking(experiment, computes=not has_report())
        request = RunRequest("full-paper-repro", profile, data, changes)
        request.check()  # there is no flow run yet
        ready()
        try:
            summary = full_paper_repro(profile, str(request.data_folder) if request.data_folder else None, changes)
        except StagesFailedError as error:
            raise CommandFailedError(str(error)) from error
    report = Path(summary["report"])
    latest = link_latest(report.parent, workspace())
    sys.stdout.write(f"{_comparison(report)}\n\n{_recommendation(report)}\n\n")
    sys.stdout.write(f"{experiment.name}: finished in {time.monotonic() - start:.0f} s\n")
    sys.stdout.write(f"report:  {latest / 'report.html'}\nfolder:  {report.parent}\n")
    sys.stdout.write(f"compare the runs: make ui   (MLflow on {workspace() / 'mlflow.db'})\n")


def _comparison(report: Path) -> str:
    """The table of the report, as it stands there."""
    text = report.read_text(encoding="utf-8")
    return text.split("## Comparison\n\n")[1].split("\n\n*adaptation*")[0]


def _recommendation(report: Path) -> str:
    """The first line of the report's box."""
    return report.read_text(encoding="utf-8").split("> **Recommendation.** ")[1].partition("\n")[0]


def link_latest(report: Path, workspace: Path) -> Path:
    """Lead `reports/latest` of the workspace to a folder; returns it, or the folder where a link cannot be made.

    Something else that lies there, which is not a link, is left alone.
    """
    link = workspace / "reports" / "latest"
    fresh = link.with_name(f".latest.{os.getpid()}")
    try:
        link.parent.mkdir(exist_ok=True)
        if link.exists() and not link.is_symlink():
            return report
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(report.resolve(), target_is_directory=True)
        fresh.replace(link)  # in one step: a reader finds the old report or the new one
    except OSError:
        return report
    return link
