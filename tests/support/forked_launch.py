"""`accelerate launch` without the imports: launcher and workers are forked from a process that has imported everything.

Accelerate's command and torchrun's agent run as they are. Only the three starts of an interpreter per launch are
spared, which take longer than what these tests train.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

from flows.running.forking import forking

_MODULE = "accelerate.commands.launch"


class ForkedLaunch:
    """Stands for `subprocess.Popen` in `tasks.stages.process_launcher`."""

    def __init__(self, command: list[str], *, env: dict[str, str], **_: Any) -> None:
        assert command[:3] == [sys.executable, "-m", _MODULE], command
        # A process that was forked itself has no threads yet: it is the parent of its launcher, as in earnest.
        forked = multiprocessing.parent_process() is not None
        context: Any = multiprocessing.get_context("fork") if forked else forking()
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "output"
            os.mkfifo(output)
            self._process = context.Process(target=launch, args=(_MODULE, command[3:], env, str(output)))
            self._process.start()
            self.stdout: TextIO = output.open(encoding="utf-8", errors="replace")
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code; None while it runs."""
        return self._process.exitcode  # type: ignore[no-any-return]

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end."""
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(_MODULE, timeout or 0.0)
        return int(self._process.exitcode)

    def terminate(self) -> None:
        """Signal 15."""
        self._process.terminate()

    def kill(self) -> None:
        """Signal 9."""
        self._process.kill()


def launch(module: str, arguments: list[str], environment: dict[str, str], output: str) -> None:
    """Be `python -m module arguments`, where the module is Accelerate's command or torchrun's."""
    import accelerate.commands.launch
    import torch.distributed.run as torchrun

    _print_to(output)
    os.environ.clear()
    os.environ.update(environment)
    real = torchrun.elastic_launch

    def elastic_launch(config: Any, entrypoint: str) -> Callable[..., Any]:
        def start(*arguments: str) -> Any:
            assert arguments[:2] == ("-u", "-m"), (entrypoint, arguments)
            return real(config=replace(config, start_method="fork"), entrypoint=_work)(*arguments[2:])

        return start

    torchrun.elastic_launch = elastic_launch  # type: ignore[assignment,misc]
    sys.argv = [module, *arguments]
    (accelerate.commands.launch if module == _MODULE else torchrun).main()


def _work(module: str, *arguments: str) -> None:
    """Be `python -m module arguments` in a process that torchrun's agent forked."""
    sys.argv = [module, *arguments]
    sys.modules.pop(module, None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _print_to(output: str) -> None:
    """Print into a pipe or file, and log as a process that has not set up anything."""
    pipe = os.open(output, os.O_WRONLY | os.O_APPEND)
    for number in (1, 2):
        os.dup2(pipe, number)
    for name in ("", "qadapter", "tasks"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True


def drive(base: Path, pairs: Path, out: Path, scratch: Path, steps: int, log: Path) -> None:
    """Be a pipeline's process that launches a Q-Adapter's training as two processes, with checkpoints."""
    from types import SimpleNamespace

    from qadapter.config.execution import LaunchSettings
    from qadapter.config.training import OptimizerSettings
    from qadapter.methods.q_adapter import train
    from qadapter.training.adapt import train_adapter
    from tasks.stages import process_launcher
    from tests.support.tiny_toy import CHOICES, LORA, MODEL

    log.touch()
    _print_to(str(log))
    logging.basicConfig(level=logging.INFO)
    process_launcher.subprocess = SimpleNamespace(**vars(subprocess) | {"Popen": ForkedLaunch})  # type: ignore[assignment]
    out.mkdir(parents=True)
    training = OptimizerSettings(
        learning_rate=1e-2, max_steps=steps, batch_size=4, max_length=64, logging_steps=1, save_steps=10
    )
    process_launcher.ProcessLauncher(LaunchSettings(engine="accelerate", processes=2))(
        train_adapter,
        train,
        CHOICES["q-adapter"],
        base,
        pairs,
        model=MODEL,
        lora=LORA,
        training=training,
        seed=3,
        needs={},
        out=out,
        scratch=scratch,
    )
