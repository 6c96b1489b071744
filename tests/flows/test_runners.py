"""The task runners that independent stages go to; Dask for real where it is installed."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any

import psutil
import pytest
from prefect import flow, task
from prefect.task_runners import ProcessPoolTaskRunner, ThreadPoolTaskRunner

from flows.full_paper_repro import full_paper_repro
from flows.running import prefect_run
from flows.running.forking import share_cores, start_forking
from flows.running.prefect_run import PrefectRun
from flows.running.runners import InterruptibleThread, task_runner
from flows.running.workers import ForkedWorkers
from qadapter.config.experiment import load_experiment
from qadapter.errors import QAdapterError
from tasks.stages.context import RunContext
from tasks.stages.store import StageStore
from tasks.tracking.tracker import Tracker
from tests.processes.test_deployments import TINY
from tests.support.forked_process import ForkedProcess
from tests.support.real_runs import wait_for


def runner(**overrides: Any) -> Any:
    return task_runner(load_experiment("smoke", {name.replace("__", "."): v for name, v in overrides.items()}))


def test_one_stage_at_a_time_is_a_thread_and_several_are_processes() -> None:
    assert isinstance(runner(parallel=1), ThreadPoolTaskRunner)
    several = runner(parallel=3)
    assert isinstance(several, ProcessPoolTaskRunner)
    assert several._max_workers == 3


def test_dask_is_a_cluster_of_this_machine_or_the_one_that_is_named() -> None:
    dask = pytest.importorskip("prefect_dask", reason='the extra is not installed: pip install -e ".[dask]"')
    here = runner(parallel=2, runner__engine="dask")
    assert isinstance(here, dask.DaskTaskRunner)
    assert here.cluster_kwargs["n_workers"] == 2
    assert here.cluster_kwargs["threads_per_worker"] == 1
    there = runner(runner__engine="dask", runner__address="tcp://scheduler:8786")
    assert there.address == "tcp://scheduler:8786"


def test_a_signal_does_not_wait_for_the_stages_that_run() -> None:
    """A training takes hours, and the next run resumes it."""
    workers = ForkedWorkers(max_workers=1)
    with pytest.raises(KeyboardInterrupt), workers:  # noqa: PT012 - the signal comes while a stage runs
        assert workers._executor is not None
        stage = workers._executor.submit(time.sleep, 600)
        while not stage.running():
            time.sleep(0.1)
        begin = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - begin < 30


def test_a_signal_interrupts_the_stage_in_this_process() -> None:
    """Also where it is in the thread of the only stage: the main thread alone gets the signal."""
    ended = []

    def stage() -> None:
        try:
            while True:
                time.sleep(0.05)
        except KeyboardInterrupt:
            ended.append("interrupted")
            raise

    with pytest.raises(KeyboardInterrupt), InterruptibleThread(max_workers=1) as one:  # noqa: PT012 - as above
        assert one._executor is not None
        running, waiting = one._executor.submit(stage), one._executor.submit(ended.append, "the next one ran")
        while not running.running():
            time.sleep(0.05)
        raise KeyboardInterrupt
    assert ended == ["interrupted"]
    assert isinstance(running.exception(), KeyboardInterrupt)
    assert waiting.cancelled()


@task
def waits_for(context: RunContext, told: threading.Event) -> bool:
    return told.wait(20)


def test_a_signal_that_reaches_another_thread_is_acted_on(
    harness: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As after Ctrl-Z: the thread that waits for the stages is not woken by it."""
    monkeypatch.setattr(prefect_run, "_SECONDS_TO_FIND_A_STAGE", 0.1)  # that wait has an end
    context = RunContext(load_experiment("smoke", {"parallel": 1}), StageStore(tmp_path), Tracker("no", "no"), "")
    told, interrupted = threading.Event(), threading.Event()

    def interrupts(*_: object) -> None:
        interrupted.set()
        told.set()

    def signals_itself() -> None:
        time.sleep(1)
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR1)

    @flow
    def waiting() -> list[bool]:
        with PrefectRun(context) as run:
            stage = run(waits_for, told=told)
            threading.Thread(target=signals_itself).start()
            run.settle()
            return run.finished([stage])

    before = signal.signal(signal.SIGUSR1, interrupts)
    try:
        assert waiting() == [True], "the handler ran while the flow waited"
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert interrupted.is_set()


def no_plan() -> None:
    raise QAdapterError("no plan")


def test_a_stage_that_ends_its_process_fails() -> None:
    """As Prefect's engine does. What Prefect chains to the pool's futures would wait for ever for a `SystemExit`."""
    with ForkedWorkers(max_workers=1) as workers:
        assert workers._executor is not None
        with pytest.raises(RuntimeError, match=r"Prefect gave a stage up \(exit code 3\).*Run it again"):
            workers._executor.submit(sys.exit, 3).result()
        assert workers._executor.submit(max, 1, 2).result() == 2
        own = workers._executor.submit(os.getpid).result()
        assert workers.apart(os.getpid) not in (own, os.getpid())
        with pytest.raises(QAdapterError, match="no plan"):
            workers.apart(no_plan)


def work(file: str) -> None:
    """Start a worker as `qadapter run` does, write down where it comes from, and go on."""
    start_forking(load_experiment("smoke"), computes=False)
    with ForkedWorkers(max_workers=2) as workers:
        assert workers._executor is not None
        parent, worker = workers._executor.submit(os.getppid).result(), workers._executor.submit(os.getpid).result()
        found = [parent, worker, psutil.Process(parent).ppid(), os.environ["OMP_NUM_THREADS"]]
        Path(f"{file}.part").write_text(json.dumps(found))
        Path(f"{file}.part").rename(file)
        time.sleep(600)


def ended(number: int) -> bool:
    """Whether a process has ended, even if no other has asked for its exit code."""
    try:
        return bool(psutil.Process(number).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def test_workers_come_from_a_fork_of_the_command_and_end_with_it(tmp_path: Path) -> None:
    """No further interpreter imports what the command has imported; after `kill -9` of the command none is left."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    file, log = tmp_path / "found", tmp_path / "log"
    command = ForkedProcess(work, str(file), cwd=tmp_path, env=environment, stdout=log)
    wait_for(file.exists, 120, "a worker", log.read_text)
    parent, worker, grandparent, threads = json.loads(file.read_text())
    assert grandparent == command.pid
    assert threads == "1"
    os.kill(command.pid, signal.SIGKILL)
    assert command.wait(30) == -signal.SIGKILL
    wait_for(lambda: ended(parent) and ended(worker), 30, "the end of its processes")


@pytest.mark.parametrize(
    ("cores", "settings", "given", "waits"),
    [
        (2, {"parallel": 2, "threads": 1, "base_threads": 2}, {}, {"GOMP_SPINCOUNT": "5000"}),
        (8, {"parallel": 2, "threads": None, "base_threads": 8}, {}, {"GOMP_SPINCOUNT": "5000"}),
        (2, {"parallel": 2, "threads": 2}, {}, {"OMP_WAIT_POLICY": "passive"}),
        (2, {"parallel": 2, "threads": 1, "base_threads": 4}, {}, {"OMP_WAIT_POLICY": "passive"}),
        (2, {"parallel": 2, "threads": 1}, {"OMP_WAIT_POLICY": "active"}, {}),
        (2, {"parallel": 2, "threads": 1}, {"GOMP_SPINCOUNT": "7"}, {}),
    ],
)
def test_threads_wait_asleep_only_where_others_need_the_core(
    monkeypatch: pytest.MonkeyPatch,
    cores: int,
    settings: dict[str, Any],
    given: dict[str, str],
    waits: dict[str, str],
) -> None:
    """Asleep at once is slow for small operations, and needed where there are more threads than cores."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(cores)))
    monkeypatch.setattr("os.environ", dict(given))
    share_cores(load_experiment("smoke", settings))
    assert os.environ == {**given, **waits, "OMP_NUM_THREADS": str(settings["threads"] or 4)}


class StandIn:
    """Takes what `prefect_ray.RayTaskRunner` takes, and nothing else, and keeps it as that does."""

    def __init__(self, address: str | None = None, init_kwargs: dict[str, Any] | None = None) -> None:
        self.address, self.init_kwargs = address, init_kwargs or {}


def test_ray_is_a_cluster_of_this_machine_or_the_one_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray itself is hundreds of megabytes: where it is not installed, a stand-in shows what it would be told."""
    if find_spec("prefect_ray") is None:
        ray: Any = ModuleType("prefect_ray")
        ray.RayTaskRunner = StandIn
        monkeypatch.setitem(sys.modules, "prefect_ray", ray)
    here = runner(parallel=2, runner__engine="ray")
    assert type(here).__name__ in ("RayTaskRunner", "StandIn")
    assert here.address is None
    assert here.init_kwargs.items() >= {"num_cpus": 2, "include_dashboard": False}.items()
    there = runner(parallel=2, runner__engine="ray", runner__address="ray://head:10001")
    assert there.address == "ray://head:10001"
    assert "num_cpus" not in there.init_kwargs, "a cluster that is there has its own"


@pytest.mark.parametrize("engine", ["dask", "ray"])
def test_an_engine_that_is_not_installed_is_refused(engine: str) -> None:
    settings = load_experiment("smoke", {"runner.engine": engine}).runner
    if find_spec(f"prefect_{engine}") is not None:
        pytest.skip(f"prefect-{engine} is installed here, so there is nothing to refuse")
    with pytest.raises(QAdapterError, match=rf"needs prefect-{engine}; install it .*\.\[{engine}\]"):
        settings.check()


@pytest.mark.slow
def test_the_experiment_runs_on_dask(harness: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers, each a process; the second run finds every stage that they made."""
    pytest.importorskip("prefect_dask", reason='the extra is not installed: pip install -e ".[dask]"')
    monkeypatch.setenv("QADAPTER_HOME", str(tmp_path))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    overrides = {**TINY, "methods.run": ["sft", "q-adapter"], "parallel": 2, "runner.engine": "dask"}
    first = full_paper_repro("smoke", None, overrides)
    made = stages(tmp_path)
    assert len([name for name in made if name.startswith("train/")]) == 2
    second = full_paper_repro("smoke", None, {**overrides, "runner.engine": "local", "parallel": 1})
    assert Path(first["report"]).is_file()
    assert Path(second["report"]).is_file()
    assert stages(tmp_path) == made


def stages(home: Path) -> list[str]:
    """What was computed and measured; the report shows the settings of its run, the runner among them."""
    found = (home / ".qadapter" / "stages").glob("*/*/manifest.json")
    return sorted(f"{file.parts[-3]}/{file.parts[-2]}" for file in found if file.parts[-3] != "report")
