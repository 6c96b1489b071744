"""Prefect's command line as a child that ends with its parent: `… worker_process --parent PID worker start --pool …`.

`make serve` starts its worker this way. Its flow runs are separate processes and continue without a worker.
"""

from __future__ import annotations

import os
import sys

from flows.prefect_host.server_process import end_with
from qadapter.files.private import keep_private

_NAME = "flows.prefect_host.worker_process"


def command(*arguments: str, parent: int) -> list[str]:
    """The command line of a Prefect command that ends with another process.

    Args:
        arguments: the arguments of `prefect`.
        parent: id of the process that starts it.
    """
    return [sys.executable, "-m", _NAME, "--parent", str(parent), *arguments]


def main() -> None:
    """Watch the parent and become Prefect's command line."""
    option, parent, *arguments = sys.argv[1:]
    if option != "--parent" or not parent.isdecimal():
        sys.exit(f"usage: python -m {_NAME} --parent PID arguments-of-prefect ...")
    keep_private()
    end_with(int(parent), lambda: os._exit(1))  # not by TERM: a worker that receives it also ends its runs
    sys.argv[:] = ["prefect", *arguments]
    from prefect.cli import app

    app()


if __name__ == "__main__":
    main()
