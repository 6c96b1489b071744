"""One process that imports the libraries once, for a run of the tests in several processes; they are forked from it.

`make test` has three test processes, and each of them a process that servers, workers and launches are forked from.
The imports of each take a dozen seconds of CPU time. This module forks them all from one process.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import os
import selectors
import shlex
import signal
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from importlib import import_module
from multiprocessing import spawn
from pathlib import Path
from types import ModuleType
from typing import Any

from tests.support.paths import PROJECT_ROOT

VARIABLE = "QADAPTER_TESTS_PYTHON"
"""Environment variable with the path of an executable that runs code as a fork of the zygote."""

LIBRARIES = (
    *("torch", "torch.distributed.run", "torch.utils.checkpoint", "transformers", "transformers.trainer"),
    *("accelerate.commands.launch", "peft", "trl.trainer.dpo_trainer", "datasets", "bitsandbytes"),
    *("pandas", "scipy.stats", "matplotlib.pyplot", "openai", "fastapi.testclient", "hypothesis.strategies"),
    *("lm_eval.evaluator", "lm_eval.models.huggingface", "lm_eval.tasks"),
    *(
        "mlflow",
        "mlflow.cli",
        "mlflow.pyfunc.model",
        "mlflow.server.fastapi_app",
        "mlflow.store.tracking.sqlalchemy_store",
    ),
    *("prefect", "prefect.testing.utilities", "prefect.server.api.server", "prefect.workers.process", "prefect.cli"),
)
"""What most test processes import sooner or later. One that is missing here is imported where it is needed."""

OWN = (
    *("flows.customize", "flows.full_paper_repro", "flows.commands.table"),
    *("qadapter.command.parser", "qadapter.evaluation.measure", "qadapter.report.build", "qadapter.serving.app"),
    *("qadapter.judging.reward_training", "qadapter.training.adapt", "qadapter.training.pretraining"),
    *("qadapter.training.supervised", "qadapter.training.trainer"),
)
"""Of the project. The tests' own modules are imported by each process: pytest compiles them."""

_SECONDS_TO_END = 20
"""Seconds that the forks have to end, once those who asked for them have ended."""


@contextlib.contextmanager
def zygote(libraries: Sequence[str] = (*LIBRARIES, *OWN)) -> Iterator[Path]:
    """A zygote that begins to import `libraries`; the executable that `VARIABLE` is to name."""
    launcher = Path(__file__).with_name("zygote_python.py")
    with tempfile.TemporaryDirectory(prefix="zygote-") as folder:
        address, python = f"{folder}/socket", Path(folder, "python")
        python.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, "-S", "-E", str(launcher), address])} "$@"\n')
        python.chmod(0o700)
        alive, ours = os.pipe()
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(address)
            listener.listen(64)
            numbers = (listener.fileno(), alive)
            command = [sys.executable, "-m", "tests.support.zygote", *map(str, numbers), *libraries]
            process = subprocess.Popen(command, cwd=PROJECT_ROOT, stdin=subprocess.DEVNULL, pass_fds=numbers)
        os.close(alive)
        try:
            yield python
        finally:
            os.close(ours)
            process.wait()


def fork_from_zygote() -> None:
    """Let `multiprocessing` start its processes from the zygote, where there is one."""
    if VARIABLE in os.environ:
        spawn.set_executable(os.environ[VARIABLE])


class _Forks:
    """The processes that were forked, each for a process that waits for its end at the other end of a connection."""

    def __init__(self, listener: socket.socket, alive: int) -> None:
        self._listener, self._alive = listener, alive
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ)
        self._selector.register(alive, selectors.EVENT_READ)
        self._forks: set[int] = set()

    def next(self) -> tuple[dict[str, Any], list[int]]:
        """Fork as asked; returns in each fork, with the request and the files that came with it."""
        while self._forks or self._alive in self._selector.get_map():
            for key, _ in self._selector.select():
                if key.fd not in self._selector.get_map():  # closed in this round
                    continue
                if key.fileobj is self._listener:
                    connection, _ = self._listener.accept()
                    request, files = _received(connection)
                    if request and not (pid := os.fork()):
                        connection.close()
                        self._close()
                        return request, files
                    for file in files:
                        os.close(file)
                    if request:
                        self._forks.add(pid)
                        process = os.pidfd_open(pid)
                        self._selector.register(process, selectors.EVENT_READ, (pid, connection))
                        self._selector.register(connection, selectors.EVENT_READ, (pid, process))
                elif key.fd == self._alive:
                    signal.alarm(_SECONDS_TO_END)
                    self._selector.unregister(self._alive)
                    self._selector.unregister(self._listener)
                elif isinstance(key.fileobj, socket.socket):  # who waited was killed
                    os.kill(key.data[0], signal.SIGKILL)
                    self._selector.unregister(key.fileobj)
                else:
                    self._end(key.fd, *key.data)
        os._exit(0)

    def _end(self, process: int, pid: int, connection: socket.socket) -> None:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        self._forks.remove(pid)
        for file in (process, connection):
            with contextlib.suppress(KeyError):
                self._selector.unregister(file)
        os.close(process)
        with connection, contextlib.suppress(OSError):
            connection.sendall(str(code).encode())

    def _close(self) -> None:
        self._forks.clear()
        for key in list(self._selector.get_map().values()):
            key.fileobj.close() if isinstance(key.fileobj, socket.socket) else os.close(key.fd)
        self._selector.close()


def _received(connection: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """A request and the files that came with it; nothing if who asked was killed."""
    length, files, *_ = socket.recv_fds(connection, 8, 250)
    size = int.from_bytes(length, "big")
    sent = connection.recv(size, socket.MSG_WAITALL) if size else b""
    return (json.loads(sent) if size and len(sent) == size else {}), files


def _become(request: dict[str, Any], files: list[int]) -> None:
    """Be `python -c`, with the environment, folder and open files of the process that asked for it."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    above = max([*files, *request["files"]]) + 1
    for number, file in zip(request["files"], [_moved(file, above) for file in files], strict=True):
        os.dup2(file, number, inheritable=True)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
    sys.argv = ["-c", *request["arguments"]]
    sys.path[0] = ""
    sys.modules["__main__"] = main = ModuleType("__main__")
    exec(compile(request["code"], "<string>", "exec"), vars(main))


def read_once() -> None:
    """Let this process and its forks share what each would read first.

    What stages' digests are made of; the certificates of each HTTP client, though no server of a test has any; and
    which packages are installed, which MLflow looks up when it logs a model.
    """
    from mlflow.utils import requirements_utils

    from tasks.stages.code_version import code_digest

    for name in OWN:
        code_digest(name)
    requirements_utils._init_packages_to_modules_map()
    share_certificates()


def share_certificates() -> None:
    """Let all HTTP clients of this process have one TLS context for the same certificates."""
    if not hasattr(ssl.create_default_context, "cache_info"):
        ssl.create_default_context = cache(ssl.create_default_context)  # type: ignore[assignment]


def _moved(file: int, above: int) -> int:
    moved = fcntl.fcntl(file, fcntl.F_DUPFD, above)
    os.close(file)
    return moved


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for those that it forks; it ends with the last of them
    _error = os.dup(2)
    with Path(os.devnull).open("w") as _nothing:  # of libraries that warn when they are imported
        os.dup2(_nothing.fileno(), 2)
        for _name in sys.argv[3:]:
            with contextlib.suppress(ImportError):
                import_module(_name)
        if "mlflow" in sys.argv[3:]:
            read_once()
    os.dup2(_error, 2)
    os.close(_error)
    gc.collect()
    gc.freeze()
    _become(*_Forks(socket.socket(fileno=int(sys.argv[1])), int(sys.argv[2])).next())
