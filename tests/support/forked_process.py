"""Processes that are forked from the one that has imported everything (`forked_run.py`), behind `Popen`'s interface.

Each is a real process with its own environment, folder, output and signals. What is spared is the start of an
interpreter and the imports, which take longer than what most tests look at.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flows.running.forking import forking

Target = Callable[..., None]


class ForkedProcess:
    """A forked process. Its members are those of `subprocess.Popen` that tests use."""

    def __init__(
        self,
        target: Target,
        *arguments: Any,
        cwd: Path,
        env: Mapping[str, str],
        stdout: Path,
        stderr: Path | None = None,
        own_group: bool = False,
        fork: bool = False,
    ) -> None:
        """Start it.

        Args:
            target: what it does, given `arguments`; both are pickled.
            arguments: of the target.
            cwd: its folder.
            env: its whole environment.
            stdout, stderr: files that its output is appended to; without `stderr` both go to the first.
            own_group: whether it is the leader of a session, so that a signal reaches it with all that it starts.
            fork: whether this process is its parent, which then has to be without threads.
        """
        files = (str(stdout), str(stderr or stdout))
        context: Any = multiprocessing.get_context("fork") if fork else forking()
        self._process = context.Process(target=_be, args=(target, arguments, str(cwd), dict(env), files, own_group))
        self._process.start()
        self.pid = int(self._process.pid)

    @property
    def returncode(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        return self._process.exitcode  # type: ignore[no-any-return]

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Send it a signal, if it still runs."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Signal 15."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """Signal 9."""
        self.send_signal(signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end.

        Raises:
            subprocess.TimeoutExpired: it still runs after that many seconds.
        """
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout or 0.0)
        return self.returncode


def _be(
    target: Target, arguments: Sequence[Any], folder: str, environment: dict[str, str], files: Sequence[str], own: bool
) -> None:
    """Become a process that has set up nothing yet, and call the target."""
    if own:
        os.setsid()
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, file in zip((1, 2), files, strict=True):
        opened = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(opened, number)
        os.close(opened)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    for name in ("", "qadapter", "tasks"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    if "prefect" in sys.modules:
        from prefect.context import refresh_global_settings_context

        refresh_global_settings_context()
    target(*arguments)


def fresh_prefect() -> None:
    """Let Prefect read its settings and set up its log anew, as when it is imported first."""
    from prefect.context import refresh_global_settings_context
    from prefect.logging import configuration

    refresh_global_settings_context()
    configuration.PROCESS_LOGGING_CONFIG.clear()
    configuration.setup_logging()


def be_module(name: str, *arguments: str) -> None:
    """Be `python -m name arguments`."""
    sys.argv = [name, *arguments]
    sys.modules.pop(name, None)
    runpy.run_module(name, run_name="__main__", alter_sys=True)


def be_program(program: str, *arguments: str) -> None:
    """Be `python -c program arguments`."""
    sys.argv = ["-c", *arguments]
    exec(compile(program, "<program>", "exec"), {"__name__": "__main__"})


def be_script(script: str, root: str, *arguments: str) -> None:
    """Be `python -c script arguments` in a copy of the project: its modules are imported from there.

    Args:
        script: the program.
        root: the copy's folder.
        arguments: of the program.
    """
    for name in [name for name in sys.modules if name.partition(".")[0] in ("qadapter", "tasks", "flows", "tests")]:
        del sys.modules[name]
    sys.path.insert(0, root)
    sys.argv = ["-c", *arguments]
    exec(compile(script, "<script>", "exec"), {"__name__": "__main__"})


def completed(
    target: Target, *arguments: Any, cwd: Path, env: Mapping[str, str], timeout: float = 180
) -> subprocess.CompletedProcess[str]:
    """Run a process to its end, as `subprocess.run` does with captured text."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder, "out"), Path(folder, "err")
        process = ForkedProcess(target, *arguments, cwd=cwd, env=env, stdout=out, stderr=err)
        code = process.wait(timeout)
        return subprocess.CompletedProcess(
            arguments, code, out.read_text(errors="replace"), err.read_text(errors="replace")
        )
