"""What the servers of tests do in forked processes: Prefect's and MLflow's own commands, without their imports."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from flows.prefect_host import server_process


def serve_prefect(*arguments: str) -> None:
    """Be `python -m flows.prefect_host.server_process`; the server ends with the process that it was forked from."""
    server_process.main([*arguments, "--parent", str(os.getppid())])


def serve_mlflow(*arguments: str) -> None:
    """Be `mlflow server`, with the server that it starts in the same process."""
    import mlflow.server
    import uvicorn.main
    from mlflow.cli import cli

    def run_here(command: Sequence[str], extra_env: Mapping[str, str], **_: Any) -> None:
        assert list(command[1:3]) == ["-m", "uvicorn"], command
        os.environ.update(extra_env)
        kept = "mlflow.server.otlp_metrics"  # Prometheus registers a counter once
        for name in [name for name in sys.modules if f"{name}.".startswith("mlflow.server.") and name != kept]:
            del sys.modules[name]  # it reads the environment when it is imported
        uvicorn.main.main(list(command[3:]), standalone_mode=False)
        sys.exit()

    mlflow.server._exec_cmd = run_here
    cli(["server", *arguments], standalone_mode=False)
