"""The command behind `make repro` and `make plan`.

python -m flows.commands.run --profile smoke
python -m flows.commands.run --profile mini --data path/to/folder training.max_steps=20
python -m flows.commands.run --profile paper --plan
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from flows.environment import prepare_environment
from flows.prefect_host.server import prefect_server


def main(arguments: list[str] | None = None) -> int:
    """Run, or only plan, an experiment; returns the exit code: 0 done, 1 a stage failed, 2 refused."""
    prepare_environment()
    from qadapter.config.experiment import profiles
    from qadapter.errors import QAdapterError

    parser = argparse.ArgumentParser(
        prog="python -m flows.commands.run", description="Run or plan the full experiment."
    )
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
    from flows.running.plan import plan_text

    sys.stdout.write(plan_text(given.profile, given.data, given.overrides) + "\n")
    return 0


def _run(given: argparse.Namespace) -> int:
    from flows.running.launch import Launch, StagesFailedError
    from qadapter.config.experiment import parse_overrides

    overrides = parse_overrides(given.overrides)
    launch = Launch("full-paper-repro", given.profile, given.data, overrides)
    experiment = launch.check()  # refuse what cannot work before Prefect starts anything
    from flows.full_paper_repro import full_paper_repro
    from tasks.stages.context import workspace

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
