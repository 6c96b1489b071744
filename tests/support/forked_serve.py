"""`qadapter up` without the imports: the command, its server, Prefect's commands, its worker and their flow runs.

Each is a process of its own that is forked from one that has imported everything, and does what the command does. In
`test_deployments.py` all but the engines of most flow runs are started as in earnest.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import IO, Any

import anyio
from prefect.runner import _starter_engine, _workspace_hook_runner, _workspace_runtime_bootstrap, _workspace_supervisor

from flows.commands import serve
from flows.prefect_host import worker_process
from flows.running import forking
from tests.support.forked_process import ForkedProcess, be_module, fresh_prefect
from tests.support.own_servers import serve_prefect
from tests.support.zygote import fork_from_zygote

BARE = "QADAPTER_TESTS_BARE_ENGINE"
"""In the environment of a flow run: its engine is started as in earnest."""

_SERVER = "flows.prefect_host.server_process"
_WORKER = "flows.prefect_host.worker_process"
_run_process = _starter_engine.run_process
_run_hook = _workspace_hook_runner.run_process


class ForkedCommand(ForkedProcess):
    """Stands for `subprocess.Popen` in `flows.commands.serve`."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str],
        stdin: int,
        stdout: int | IO[bytes] | None,
        stderr: int | None,
        start_new_session: bool,
    ) -> None:
        assert list(command[:2]) == [sys.executable, "-m"], command
        assert threading.active_count() == 1, "a fork has no other thread"
        self._output = Path(env["PREFECT_HOME"], f"output-of-{os.getpid()}")
        file = self._output if stdout == subprocess.PIPE else _path_of(1 if stdout is None else stdout.fileno())  # type: ignore[union-attr]
        target, arguments = _target(*command[2:])
        super().__init__(target, *arguments, cwd=cwd, env=env, stdout=file, own_group=start_new_session, fork=True)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end; 0, as `subprocess` says it, where psutil has asked for the code before."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return super().wait(timeout)
        return 0

    def communicate(self) -> tuple[bytes, None]:
        """Wait for the end; what it printed."""
        self.wait()
        printed = self._output.read_bytes()
        self._output.unlink()
        return printed, None


def _path_of(file: int) -> Path:
    return Path(f"/proc/self/fd/{file}").readlink()


def _target(module: str, *arguments: str) -> tuple[Any, tuple[str, ...]]:
    if module == _SERVER:
        place = arguments.index("--parent")
        return serve_prefect, (*arguments[:place], *arguments[place + 2 :])
    assert module == _WORKER, module
    return (be_worker if "worker" in arguments else be_module), (_WORKER, *arguments)


def be_up() -> None:
    """Be `qadapter up`, with forked processes."""
    serve.subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": ForkedCommand})  # type: ignore[attr-defined]
    be_module("qadapter", "up")


def be_worker(*arguments: str) -> None:
    """Be Prefect's worker, with forked engines."""
    fork_engines()
    sys.argv = [*arguments]
    worker_process.main()


def fork_engines() -> None:
    """Let a worker in this process fork its flow runs and their hooks, but for those that have `BARE`."""
    forking.OF_EVERY_STAGE = "tests.support.forked_run"
    fork_from_zygote()
    first = forking.forking().Process(target=int)  # it waits for the imports, which the worker must not do later
    first.start()
    first.join()
    _starter_engine.run_process = run_process  # type: ignore[assignment]
    _workspace_hook_runner.run_process = run_hook  # type: ignore[assignment]


async def run_hook(command: list[str], *, cwd: str, env: dict[str, str], stream_output: bool) -> Any:
    """Stands for Prefect's function where it runs the hooks of a flow run that was killed."""
    if BARE in env:
        return await _run_hook(command, cwd=cwd, env=env, stream_output=stream_output)
    assert command[:2] == [sys.executable, _workspace_runtime_bootstrap.__file__], command
    out, error = _path_of(1), _path_of(2)
    process = ForkedProcess(be_hook, *command[2:], cwd=Path(cwd), env=env, stdout=out, stderr=error)
    while process.poll() is None:
        await anyio.sleep(0.05)
    return process


def be_hook(*arguments: str) -> None:
    """Be Prefect's process of a hook."""
    sys.path[:0] = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    fresh_prefect()
    sys.exit(_workspace_runtime_bootstrap.main([*arguments]))


async def run_process(
    command: list[str],
    *,
    stream_output: bool,
    task_status: Any,
    task_status_handler: Any,
    env: dict[str, str],
    cwd: Path,
    start_new_session: bool,
) -> None:
    """Stands for Prefect's function, which `EngineCommandStarter` says may be replaced."""
    options: dict[str, Any] = {"env": env, "cwd": cwd, "start_new_session": start_new_session}
    if BARE in env:
        options |= {"task_status": task_status, "task_status_handler": task_status_handler}
        await _run_process(command, stream_output=stream_output, **options)
        return
    assert command[:3] == [sys.executable, "-m", "prefect.runner._workspace_supervisor"], command
    out, error = _path_of(1), _path_of(2)
    process = ForkedProcess(be_flow_run, *command[3:], cwd=cwd, env=env, stdout=out, stderr=error, own_group=True)
    task_status.started(task_status_handler(process))
    while process.poll() is None:
        await anyio.sleep(0.05)


def be_flow_run(config: str) -> None:
    """Be Prefect's supervisor of a flow run, and then the engine that it becomes by `exec`.

    The supervisor starts threads, and ends in an `exec`, which spares the engine them. Here it runs in a fork, which
    says what it would have executed.
    """
    read, write = os.pipe()
    if not (supervisor := os.fork()):
        code = 1
        try:
            code = _supervise(config, write)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        said = pipe.read()
    code = os.waitstatus_to_exitcode(os.waitpid(supervisor, 0)[1])
    if code:
        sys.exit(code)
    engine = json.loads(said)
    assert engine["command"] == [sys.executable, "-m", "prefect.engine"], engine["command"]
    os.chdir(engine["folder"])
    os.environ.clear()
    os.environ.update(engine["environment"])
    sys.path[:0] = os.environ["PYTHONPATH"].split(os.pathsep)
    fresh_prefect()
    try:
        be_module("prefect.engine")
    finally:
        atexit._run_exitfuncs()  # which processes of `multiprocessing` leave out; Prefect sends its last events there


def _supervise(config: str, write: int) -> int:
    async def launch(command: list[str], *, cwd: Path, environment: dict[str, str]) -> int:
        engine = {"command": command, "folder": str(cwd), "environment": environment}
        os.write(write, json.dumps(engine).encode())
        return 0

    _workspace_supervisor._launch_engine = launch
    return _workspace_supervisor.main([config])


if __name__ == "__main__":  # a command of Prefect's that is started as in earnest, but for a worker's engines
    if "worker" in sys.argv:
        from tests.support import forked_serve

        forked_serve.fork_engines()
    worker_process.main()
