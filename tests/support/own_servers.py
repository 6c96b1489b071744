"""What the servers of tests do in forked processes: Prefect's and MLflow's own commands, without their imports."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.prefect_host import server_process
from tests.support.forked_process import ForkedProcess
from tests.support.paths import PROJECT_ROOT


def serve_prefect(*arguments: str) -> None:
    """Be `python -m flows.prefect_host.server_process`; the server ends with the process that it was forked from."""
    server_process.main([*arguments, "--parent", str(os.getppid())])


def serve_harness(port: int) -> None:
    """Be the server of `prefect_test_harness`."""
    import uvicorn
    from prefect.context import refresh_global_settings_context

    refresh_global_settings_context()
    uvicorn.run("prefect.server.api.server:create_app", factory=True, port=port, log_level="error", lifespan="on")


class HarnessServer(ForkedProcess):
    """The process that Prefect's `SubprocessASGIServer` starts, without its imports."""

    stdout = stderr = None

    def __init__(self, server: Any, log: Path) -> None:
        """Start it.

        Args:
            server: the `SubprocessASGIServer`.
            log: file for what it prints.
        """
        from prefect.settings import get_current_settings

        settings = get_current_settings().to_environment_variables(exclude_unset=True)
        own = {"PREFECT_UI_ENABLED": "0", "PREFECT__SERVER_EPHEMERAL": "1", "PREFECT__SERVER_FINAL": "1"}
        super().__init__(
            serve_harness, server.port, cwd=PROJECT_ROOT, env={**os.environ, **own, **settings}, stdout=log
        )


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
