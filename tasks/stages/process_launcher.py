"""Run a training or an evaluation in this process, or in several processes through `accelerate launch`."""

from __future__ import annotations

import gc
import logging
import os
import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from qadapter.config.execution import LaunchSettings
from qadapter.config.model import ModelSettings
from qadapter.errors import QAdapterError
from qadapter.files.artifacts import read_json
from qadapter.progress.reports import listener
from qadapter.training.worker import PROGRESS, REPORT, pass_on, write_job

_LOGGER = logging.getLogger(__name__)
_ROOT = Path(__file__).resolve().parents[2]
_LAST_LINES = 30
_GRACE = 10.0  # seconds between SIGTERM and SIGKILL


class TrainingProcessError(RuntimeError):
    """A training process failed for a reason that is not the user's; the message contains its last lines."""


@dataclass(frozen=True)
class ProcessLauncher:
    """Calls a function in the processes that the experiment's `launch` section asks for.

    An instance rather than a function, so that a stage's code digest ends here: `keyed` adds the engine to the key.
    """

    settings: LaunchSettings

    @classmethod
    def for_evaluation(cls, settings: LaunchSettings, model: ModelSettings) -> ProcessLauncher:
        """The launcher of evaluation and generation: as many processes as trainings have, each with the whole base.

        They share the batches (`qadapter.progress.kept`), whose results are those of one process: no part of a key. A
        base that is spread over all devices (`model.device_map`) is one process's.
        """
        if settings.engine == "in-process" or model.device_map is not None:
            return cls(LaunchSettings())
        whole = settings.accelerate_config()["distributed_type"] == "MULTI_GPU"
        return cls(settings if whole else settings.model_copy(update={"config": "ddp.yaml"}))

    def keyed(self) -> dict[str, Any]:
        """The engine as part of a stage's config; empty for `in-process`, which is the reference."""
        if self.settings.engine == "in-process":
            return {}
        return {"launch": {"processes": self.settings.processes, "config": self.settings.accelerate_config()}}

    def __call__(self, function: Callable[..., None], *positional: Any, out: Path, scratch: Path, **named: Any) -> None:
        """Call `function(*positional, out=out, scratch=scratch, **named)`.

        Raises:
            QAdapterError: the function raised it, in this or another process.
            TrainingProcessError: a training process failed or was killed.
        """
        named = {**named, "out": out, "scratch": scratch}
        if self.settings.engine == "in-process":
            function(*positional, **named)
            return
        _free_accelerator()
        folder = scratch / "job"  # may contain training data, which a killed process must not leave elsewhere
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        try:
            job = folder / "job.json"
            write_job(job, function, positional, named)
            self._run(job)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _run(self, job: Path) -> None:
        command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(self.settings.file)]
        command += ["--num_processes", str(self.settings.processes), "--num_machines", "1", "--main_process_port", "0"]
        command += ["-m", "qadapter.training.worker", str(job)]
        paths = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH")]))
        threads = int(os.environ.get("OMP_NUM_THREADS") or len(os.sched_getaffinity(0))) // self.settings.processes
        process = subprocess.Popen(
            command,
            env={**os.environ, "PYTHONPATH": paths, "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": str(max(1, threads))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        last: deque[str] = deque(maxlen=_LAST_LINES)
        try:
            assert process.stdout is not None
            for line in map(str.rstrip, process.stdout):
                if line.startswith(REPORT):
                    pass_on(line.removeprefix(REPORT), listener())
                elif line.startswith(PROGRESS):
                    _LOGGER.info("%s", line.removeprefix(PROGRESS))
                else:
                    _LOGGER.debug("%s", line)
                    last.append(line)
            code = process.wait()
        finally:  # also when this process is interrupted; if it is killed, the children notice and end
            _end(process)
        if code:
            raise self._failure(job.parent, code, "\n".join(last))

    def _failure(self, folder: Path, code: int, last: str) -> Exception:
        """The error of the process that failed first; the others fail because of it."""
        told = sorted(folder.glob("failure-*.json"), key=lambda file: file.stat().st_mtime_ns)
        first = read_json(told[0]) if told else {"refused": False, "traceback": last}
        if first["refused"]:
            return QAdapterError(first["message"])
        count = self.settings.processes
        launched = f"{self.settings.config}, {count} process{'' if count == 1 else 'es'}"
        return TrainingProcessError(
            f"accelerate launch ({launched}) ended with code {code}; "
            f"checkpoints are kept. Its last words:\n{first['traceback']}"
        )


def _free_accelerator() -> None:
    """Release GPU memory that torch still caches from earlier stages of this process."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def _end(process: subprocess.Popen[str]) -> None:
    """End the launcher and its descendants. torchrun's workers have their own sessions, so no process group has all."""
    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    if process.poll() is None:
        process.terminate()  # torchrun ends its workers on this
        try:
            process.wait(_GRACE)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    for child in psutil.wait_procs(family, timeout=1.0)[1]:
        child.kill()
    if process.stdout is not None:
        process.stdout.close()
