"""Shared fixtures: where the optional real data lies, and tiny models made on the spot."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from inspect import unwrap
from pathlib import Path
from types import CodeType, SimpleNamespace
from typing import TYPE_CHECKING, Any

import hypothesis
import pytest

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient

# No test may reach for the network, and two torch threads on two busy cores crawl.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("DO_NOT_TRACK", "1")
# Where Python must not keep what it compiles, each of a hundred processes would compile the project anew.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)

from flows.running import forking
from tests.support.own_servers import HarnessServer
from tests.support.paths import SHARED
from tests.support.prefect_tables import prefect_tables, shared_folder
from tests.support.real_runs import data_folder, data_server, prefect_server, undisturbed  # noqa: F401 - fixtures of several files
from tests.support.rewriting import rewrite_tests
from tests.support.zygote import VARIABLE, fork_from_zygote, share_certificates, zygote

sys.dont_write_bytecode = False

# The same examples in each run, so that a change fails by what it changes; HYPOTHESIS_PROFILE=default looks at others.
hypothesis.settings.register_profile("repeatable", derandomize=True)
hypothesis.settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# One process per test process that all others are forked from, whoever needs it first: it has imported everything.
forking.OF_EVERY_STAGE = "tests.support.forked_run"
fork_from_zygote()
share_certificates()


def _shared(name: str) -> Path:
    folder = SHARED / name
    if not folder.is_dir():
        pytest.skip(f"real {name} not present: this test reads ../shared/{name}, which only CI and the developers have")
    return folder


@pytest.fixture(scope="session")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A Prefect server and database for all flow runs inside this process; tests look only at what is theirs on it.

    One, because Prefect's sender of events is one for the whole process, and keeps the address that it first had. What
    an earlier test could not deliver to another server does not hold it up.
    """
    from prefect.events.worker import EventsWorker
    from prefect.server.api.server import SubprocessASGIServer
    from prefect.settings import PREFECT_API_AUTH_STRING, PREFECT_SERVER_API_AUTH_STRING, temporary_settings
    from prefect.testing.utilities import prefect_test_harness

    EventsWorker.drain_all(timeout=10)
    auth = {PREFECT_API_AUTH_STRING: "of-the-harness", PREFECT_SERVER_API_AUTH_STRING: "of-the-harness"}
    with pytest.MonkeyPatch.context() as patch, temporary_settings(auth):
        for setting, value in auth.items():  # the commands take no server that asks for none
            patch.setenv(setting.name, value)
        folder = tmp_path_factory.mktemp("harness")
        patch.setattr("prefect.testing.utilities.mkdtemp", lambda: str(folder))
        log = folder / "server.log"
        patch.setattr(SubprocessASGIServer, "_run_uvicorn_command", lambda server: HarnessServer(server, log))
        with ExitStack() as server:
            with prefect_tables(folder / "prefect-test.db", shared_folder(tmp_path_factory)):
                server.enter_context(prefect_test_harness(server_startup_timeout=90))
            yield


@pytest.fixture(scope="session")
def prefect_client(harness: None) -> Iterator[SyncPrefectClient]:
    """Of that server."""
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture(scope="session", autouse=True)
def no_list_of_packages() -> Iterator[None]:
    """lm-eval's command describes the machine in each file of results: `pip list` and five more programs, a second."""
    with pytest.MonkeyPatch.context() as patch:
        if "lm_eval" in sys.modules:
            patch.setattr("torch.utils.collect_env.get_pretty_env_info", lambda: "not asked in tests")
        yield


@pytest.fixture
def forked_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launches of several processes without their imports; a test of `test_process_launcher.py` runs the command."""
    from tests.support.forked_launch import ForkedLaunch

    forked = SimpleNamespace(**vars(subprocess) | {"Popen": ForkedLaunch})
    monkeypatch.setattr("tasks.stages.process_launcher.subprocess", forked)


_LONGEST = [
    f"test_{name}"
    for name in (
        *("deployments", "recurring_processes", "customize_deployments", "pipeline", "customize", "command"),
        *("prefect_access", "paper_profile", "wheel", "served_model", "outages", "killed", "served_without_network"),
        *("process_launcher", "mlflow_server", "sweep", "kill_needs", "architectures", "kill_matrices"),
        *("own_model_page", "announce", "security", "qadapter_distributed", "evaluation_processes", "lm_eval_command"),
        *("hub_watcher", "adding_a_method", "champions_files", "curve", "preference_tasks", "official_tasks"),
    )
]
_PROCESSES = Path(__file__).parent / "processes"
_SERVERS = frozenset({"harness", "prefect_client", "prefect_server", "data_server", "undisturbed"})


def _starts_processes(test: Callable[..., object], fixtures: set[str]) -> bool:
    """Whether a test, or a fixture or function of the tests that it needs, uses `subprocess`."""
    globals_of_test = unwrap(test).__globals__
    waiting: list[Any] = [test, *(globals_of_test[name] for name in fixtures & set(globals_of_test))]
    seen = set()
    while waiting:
        function = unwrap(waiting.pop())
        code = getattr(function, "__code__", None)
        if code is None or code in seen:
            continue
        seen.add(code)
        used = {name for part in (code, *code.co_consts) if isinstance(part, CodeType) for name in part.co_names}
        if "subprocess" in used:
            return True
        known = function.__globals__
        needed = (known[name] for name in used & set(known))
        waiting += [value for value in needed if str(getattr(value, "__module__", "")).startswith("tests.")]
    return False


@pytest.hookimpl(tryfirst=True)
def pytest_sessionstart(session: pytest.Session) -> None:
    """Fork the test processes of `make test` from one that has imported the libraries."""
    config = session.config
    if sys.platform != "linux" or config.getoption("dist", "no") != "loadfile" or set(config.option.tx) != {"popen"}:
        return
    python = _running.enter_context(zygote())
    os.environ[VARIABLE] = str(python)
    config.option.tx = [f"popen//python={python}" for _ in config.option.tx]
    rewrite_tests(config, Path(__file__).parent)  # while that process imports


_running = ExitStack()


@pytest.hookimpl(trylast=True)
def pytest_unconfigure() -> None:
    """End that process, after all that were forked from it."""
    _running.close()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files that share a server go to the test process that has it."""
    if config.getvalue("dist") != "loadfile":
        return None
    from tests.support.scheduling import SharedServers

    return SharedServers(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make test-quick` leaves out; files that take minutes go first, so that none is left alone at the end.

    A test needs processes if it lies in `tests/processes`, uses a server's fixture, starts a process or is slow.
    """
    for item in items:
        fixtures = set(getattr(item, "fixturenames", ()))
        if (
            item.path.is_relative_to(_PROCESSES)
            or fixtures & _SERVERS
            or item.get_closest_marker("slow")
            or (isinstance(item, pytest.Function) and _starts_processes(item.function, fixtures))
        ):
            item.add_marker(pytest.mark.processes)
    items.sort(key=lambda item: _LONGEST.index(item.path.stem) if item.path.stem in _LONGEST else len(_LONGEST))


def pytest_collection_finish() -> None:
    """Spare each new MLflow database the second in which its tables are made."""
    if "tasks.tracking.store" in sys.modules:
        from tests.support.mlflow_tables import share_tables

        share_tables()
    _leave_alone()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Between two files, leave alone what the first one imported."""
    if nextitem is not None and nextitem.path != item.path:
        _leave_alone()


def _leave_alone() -> None:
    """Let later garbage collections pass over what is there now, a million objects; each training has several."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real HH-RLHF, DSP, GSM8K and BBH rows; skips where it is absent."""
    return _shared("data")


@pytest.fixture(scope="session")
def shared_formats() -> Path:
    """Folder with invented records of each published layout and what each must give; skips where it is absent."""
    return _shared("formats")


@pytest.fixture(scope="session")
def shared_golden() -> Path:
    """Folder with the published code's own numbers; skips where it is absent."""
    return _shared("golden")


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Name bytes by their length: gzip writes the time into them, and all workers must name a test alike."""
    return f"{argname}-{len(val)}-bytes" if isinstance(val, bytes) else None
