"""The command behind `make sweep`.

python -m flows.commands.sweep --sweep smoke
python -m flows.commands.sweep --sweep mini --data path/to/folder --plan
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from flows.environment import prepare_environment
from flows.prefect_host.server import prefect_server


def main(arguments: list[str] | None = None) -> int:
    """Run, or only plan, a sweep; returns the exit code: 0 done, 1 a stage failed, 2 refused."""
    prepare_environment()
    from qadapter.errors import QAdapterError

    parser = argparse.ArgumentParser(
        prog="python -m flows.commands.sweep", description="Compare many settings of every method."
    )
    parser.add_argument("--sweep", default="smoke", help="a name in configs/sweep, or a YAML file (default: smoke)")
    parser.add_argument("--profile", help="another profile than the sweep's own")
    parser.add_argument("--data", help="folder with the data, where the profile's paths say {data}")
    parser.add_argument("--plan", action="store_true", help="check everything, print settings and time, run nothing")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings to change for all: seeds=[0]")
    given = parser.parse_args(arguments)
    try:
        return _plan(given) if given.plan else _run(given)
    except QAdapterError as error:
        sys.stderr.write(f"error: {error}\n")
        return 2


def _plan(given: argparse.Namespace) -> int:
    from flows.running.sweep_plan import plan_text
    from flows.sweep import check_sweep
    from qadapter.config.experiment import parse_overrides

    checked = check_sweep(given.sweep, given.profile, given.data, parse_overrides(given.overrides), remote=False)
    sys.stdout.write(plan_text(checked) + "\n")
    return 0


def _run(given: argparse.Namespace) -> int:
    from flows.running.launch import StagesFailedError
    from flows.sweep import check_sweep, sweep
    from qadapter.config.experiment import parse_overrides
    from tasks.stages.context import workspace

    overrides = parse_overrides(given.overrides)
    checked = check_sweep(given.sweep, given.profile, given.data, overrides)  # before Prefect starts anything
    start = time.monotonic()
    data = str(checked.launch.data_folder) if given.data else None
    with prefect_server():
        try:
            summary = sweep(given.sweep, given.profile, data, overrides)
        except StagesFailedError as error:
            sys.stderr.write(f"error: {error}\n")
            return 1
    report = Path(summary["report"])
    text = report.read_text(encoding="utf-8")
    sys.stdout.write(text.partition("## Every setting")[0].rstrip() + "\n\n")
    sys.stdout.write(f"{len(checked.variants)} settings: finished in {time.monotonic() - start:.0f} s\n")
    sys.stdout.write(f"report:  {report}\nfigure:  {report.parent / 'sweep.png'}\n")
    sys.stdout.write(f"compare the runs: make ui   (MLflow on {workspace() / 'mlflow.db'})\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
