"""What the processes of `real_runs.py` do; importing this is what takes their time, so it is done once."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import transformers
from prefect.context import refresh_global_settings_context

from flows.environment import prepare_environment
from qadapter.progress.kept import Kept
from tasks.stages.code_version import code_digest
from tasks.stages.store import StageStore
from tasks.tracking.tracker import Tracker
from tests.support.forked_process import fresh_prefect
from tests.support.mlflow_tables import make_tables, share_tables
from tests.support.zygote import fork_from_zygote

prepare_environment()
fork_from_zygote()
for _module in (
    "flows.customize",
    "flows.full_paper_repro",
    "flows.commands.table",
    "accelerate.commands.launch",
    "mlflow.server.fastapi_app",
    "mlflow.store.tracking.sqlalchemy_store",
    "prefect.cli.deploy",
    "prefect.cli.worker",
    "prefect.runner._workspace_supervisor",
    "prefect.server.api.server",
    "prefect.workers.process",
    "qadapter.evaluation.measure",
    "qadapter.report.build",
    "qadapter.judging.reward_training",
    "qadapter.training.adapt",
    "qadapter.training.pretraining",
    "qadapter.training.supervised",
    "qadapter.training.trainer",
    "torch.distributed.run",
    "trl.trainer.dpo_trainer",
):
    import_module(_module)
    if _module.startswith("flows."):
        code_digest(_module)  # reads and keeps what every stage's digest is made of
# Both may have been imported before, without the environment that a command prepares.
fresh_prefect()
transformers.logging.set_verbosity_error()
share_tables()
make_tables()
gc.collect()
gc.freeze()  # a process that trains collects garbage several times: it need not look at a million objects each time


def run(module: str, arguments: list[str], environment: dict[str, str], log: str, doom: tuple[str, str] | None) -> None:
    """Be a module's `main`, in a process group of its own.

    Args:
        module: `qadapter.command.parser`, or another one with a `main`.
        arguments: of the command.
        environment: what is added to this process's.
        log: file for what it prints.
        doom: (stage, moment) at which the group is killed with signal 9. Moments: `started`, its folder is there and
            empty; `written`, its files are there and not renamed; `renamed`, it is finished and nobody knows;
            `step-N`, in the training's N-th step; `saving-N`, while its N-th checkpoint is half written; `batch-N`,
            before the N-th batch of an evaluation is kept. Or (`mlflow`,
            `before METHOD` or `after METHOD`): at the first call of that method of MLflow's client;
            `after METHOD 2`: at the second one. (`mlflow is away`, the same): it is MLflow's server that is killed
            then, the process group of the environment's `SERVER_GROUP`.
    """
    os.setsid()
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(environment)
    for name in set(os.environ) & {"MLFLOW_TRACKING_URI"} - set(environment):
        del os.environ[name]
    refresh_global_settings_context()
    if doom and doom[0] == "mlflow":
        _at_call(_die, *doom[1].split())
    elif doom and doom[0] == "mlflow is away":
        _at_call(lambda: os.killpg(int(environment["SERVER_GROUP"]), signal.SIGKILL), *doom[1].split())
    elif doom:
        _arrange(*doom)
    code = import_module(module).main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _die() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os.killpg(0, signal.SIGKILL)


def _arrange(stage: str, moment: str) -> None:
    real = StageStore._compute

    def compute_and_die(self: StageStore, manifest: Any, folder: Path, scratch: Path, compute: Any) -> Any:
        if manifest.stage != stage:
            return real(self, manifest, folder, scratch, compute)

        def dying(out: Path, scratch: Path) -> None:
            if moment == "started":
                _die()
            if "-" in moment:
                _die_at_work(*moment.split("-"))
            compute(out, scratch)
            if moment == "written":
                _die()

        finished = real(self, manifest, folder, scratch, dying)
        if moment == "renamed":
            _die()
        return finished

    StageStore._compute = compute_and_die  # type: ignore[method-assign]


def _at_call(happen: Callable[[], None], when: str, method: str, number: str = "1") -> None:
    real, calls = Tracker.call, 0

    def call(self: Tracker, name: str, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += name == method
        due = name == method and calls == int(number)
        if due and when == "before":
            happen()
        result = real(self, name, *arguments, **options)
        if due and when == "after":
            happen()
        return result

    Tracker.call = call  # type: ignore[method-assign]


def _die_at_work(kind: str, number: str) -> None:
    place, method = {
        "step": (transformers.Trainer, "training_step"),
        "saving": (transformers.Trainer, "_save_rng_state"),
        "batch": (Kept, "put"),
    }[kind]
    real = getattr(place, method)
    calls = 0

    def counted(self: Any, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == int(number):
            _die()
        return real(self, *arguments, **options)

    setattr(place, method, counted)
