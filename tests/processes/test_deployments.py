"""Deployments as Prefect understands them, the plugin through the real command line, and a real server and worker."""

from __future__ import annotations

import base64
import copy
import inspect
import json
import os
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from prefect.client.orchestration import SyncPrefectClient

from flows.commands.serve import keep_schedules
from flows.prefect_host import server_process
from flows.prefect_host.access import AUTH_FILE, AUTH_VARIABLE, SERVER_AUTH_VARIABLE, Standing, api_url, standing
from flows.prefect_host.dead_runs import close_dead_runs as close_dead_runs_of
from flows.prefect_host.deployment_names import DEFAULT_DEPLOYMENTS, expand
from qadapter.errors import QAdapterError
from qadapter.training.checkpoints import SEAL
from tests.processes.test_security import files_with_secrets
from tests.support import forked_serve
from tests.support.commands import subcommand
from tests.support.forked_process import ForkedProcess
from tests.support.modes import others_modes
from tests.support.paths import PROJECT_ROOT
from tests.support.prefect_tables import prefect_tables, shared_folder
from tests.support.real_runs import SECRETS, free_port

spread = subcommand("spread")

PREFECT = str(Path(sys.executable).with_name("prefect"))

# The whole experiment, as small as it gets: one domain, one method, a model of a few thousand parameters.
TINY = {
    "parallel": 1,
    "base_threads": None,
    "sources": {
        "harmless": {
            "path": "{data}/hh-rlhf/harmless.jsonl",
            "heldout_path": "{data}/hh-rlhf/harmless-heldout.jsonl",
        }
    },
    "domains": {"harmless": {"source": "harmless", "base": "pretrained"}},
    "helpful_sft": None,
    "toy_world.corpus_size": 200,
    "model.from_scratch.hidden_size": 16,
    "model.from_scratch.intermediate_size": 16,
    "model.from_scratch.layers": 1,
    "model.from_scratch.heads": 2,
    "pretraining.max_steps": 12,
    "pretraining.batch_size": 4,
    "training.max_steps": 12,
    "training.batch_size": 2,
    "methods.run": ["sft"],
    "evaluation.retention.tasks": ["toy_facts"],
    "evaluation.retention.max_new_tokens": 2,
    "evaluation.adaptation.max_new_tokens": 2,
}


@pytest.fixture(scope="module")
def deployments() -> list[dict[str, Any]]:
    return list(yaml.safe_load((PROJECT_ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"])


# ---- what the files say


def test_each_profile_has_its_deployment(deployments: list[dict[str, Any]]) -> None:
    from flows.full_paper_repro import full_paper_repro

    found = [entry for entry in deployments if entry["entrypoint"].endswith(":full_paper_repro")]
    assert [entry["name"] for entry in found] == ["smoke", "mini", "paper"]
    assert full_paper_repro.name == "full-paper-repro"
    for entry in found:
        assert entry["parameters"] == {"profile": entry["name"]}
        assert (PROJECT_ROOT / "configs" / f"{entry['name']}.yaml").is_file()
        assert f"profile:{entry['name']}" in entry["tags"]


def test_the_flow_takes_what_deployments_and_their_users_give() -> None:
    from flows.full_paper_repro import full_paper_repro

    signature = inspect.signature(full_paper_repro.fn)
    assert {name: parameter.default for name, parameter in signature.parameters.items()} == {
        "profile": "smoke",
        "data": None,
        "overrides": None,
    }
    given = {"profile": "mini", "data": "/data", "overrides": {"training.max_steps": 5}}
    assert full_paper_repro.validate_parameters(given) == given


def test_every_deployment_is_whole(deployments: list[dict[str, Any]]) -> None:
    for entry in deployments:
        file, _, function = entry["entrypoint"].partition(":")
        assert f"def {function}(" in (PROJECT_ROOT / file).read_text(encoding="utf-8")
        assert entry["work_pool"]["name"] == "qadapter-local"
        assert entry["concurrency_limit"] == {"limit": 1, "collision_strategy": "ENQUEUE"}
        assert len(entry["description"]) > 40


def test_the_plugin_knows_what_is_deployed(deployments: list[dict[str, Any]]) -> None:
    from flows.full_paper_repro import full_paper_repro

    deployed = {
        (full_paper_repro.name, entry["name"]) for entry in deployments if "full_paper_repro" in entry["entrypoint"]
    }
    assert set(DEFAULT_DEPLOYMENTS.items()) <= deployed


def test_prefect_toml_keeps_to_this_machine() -> None:
    settings = tomllib.loads((PROJECT_ROOT / "prefect.toml").read_text(encoding="utf-8"))
    assert settings["api"]["url"] == "http://127.0.0.1:4200/api"
    assert settings["server"]["analytics_enabled"] is False
    assert settings["plugins"] == {"enabled": True, "allow": "qadapter-deployments"}
    assert settings["server"]["concurrency"] == {"lease_storage": "flows.prefect_host.leases"}


def test_the_api_url_is_the_users_or_the_projects(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    assert api_url(PROJECT_ROOT) == "http://127.0.0.1:4200/api"
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:4999/api/")
    assert api_url(PROJECT_ROOT) == "http://127.0.0.1:4999/api"
    monkeypatch.setenv("PREFECT_API_URL", "")
    (tmp_path / "prefect.toml").write_text("[api]\n")
    with pytest.raises(QAdapterError, match="No Prefect API is configured"):
        api_url(tmp_path)


# ---- schedules, which people pause and resume on the server

WATCH, CHECK = "watch-preferences/smoke (*/15 * * * *)", "check-champion/smoke (0 5 * * 4)"


@pytest.mark.parametrize(
    ("on_server", "deployed", "kept"),
    [
        ({}, {}, {}),
        ({WATCH: False, CHECK: True}, {}, {}),
        ({WATCH: True, CHECK: False}, {}, {WATCH: True, CHECK: False}),
        ({WATCH: True, CHECK: False}, {WATCH: False, CHECK: True}, {WATCH: True, CHECK: False}),
        ({WATCH: True, CHECK: False}, {WATCH: False, CHECK: False}, {WATCH: True}),
        ({"watch-preferences/smoke (0 * * * *)": True}, {}, {}),
    ],
    ids=["a new server", "as the file", "an old note is missing", "both", "the file was changed since", "other times"],
)
def test_schedules_stay_as_they_are_on_the_server(
    on_server: dict[str, bool], deployed: dict[str, bool], kept: dict[str, bool]
) -> None:
    plan = yaml.safe_load((PROJECT_ROOT / "prefect.yaml").read_text(encoding="utf-8"))
    before = copy.deepcopy(plan)
    assert sorted(keep_schedules(plan, on_server, deployed)) == sorted(kept)
    changed = set()
    for entry, old in zip(plan["deployments"], before["deployments"], strict=True):
        for schedule, was in zip(entry.get("schedules", []), old.get("schedules", []), strict=True):
            assert schedule | {"active": None} == was | {"active": None}
            if schedule != was:
                changed.add((entry["entrypoint"].split(":")[1], schedule["active"]))
    flows = {WATCH: "watch_preferences", CHECK: "check_champion"}
    assert changed == {(flows[name], active) for name, active in kept.items()}


# ---- the plugin


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("deployment run full-paper-repro", "deployment run full-paper-repro/smoke"),
        ("deployments run full-paper-repro --watch", "deployments run full-paper-repro/smoke --watch"),
        (
            "deployment run -p data=x --watch full-paper-repro",
            "deployment run -p data=x --watch full-paper-repro/smoke",
        ),
        ("deployment run --param=data=x full-paper-repro", "deployment run --param=data=x full-paper-repro/smoke"),
        ("deployment run --tag t full-paper-repro -p a=1", "deployment run --tag t full-paper-repro/smoke -p a=1"),
        ("--no-prompt deployment run full-paper-repro", "--no-prompt deployment run full-paper-repro/smoke"),
        ("--profile p deployment run full-paper-repro", "--profile p deployment run full-paper-repro/smoke"),
    ],
)
def test_a_bare_name_is_completed(given: str, expected: str) -> None:
    assert expand(["prefect", *given.split()]) == ["prefect", *expected.split()]


@pytest.mark.parametrize(
    "line",
    [
        "",
        "deployment",
        "deployment run",
        "deployment run full-paper-repro/mini",
        "deployment run full-paper",
        "deployment run other-flow",
        "deployment run other-flow --tag full-paper-repro",
        "deployment run --flow-run-name full-paper-repro other-flow",
        "deployment run --tag full-paper-repro",
        "deployment inspect full-paper-repro",
        "flow-run ls --flow-name full-paper-repro",
        "deploy --name full-paper-repro",
        "config view deployment run full-paper-repro",
    ],
)
def test_nothing_else_is_touched(line: str) -> None:
    assert expand(["prefect", *line.split()]) == ["prefect", *line.split()]


def environment_for(url: str, home: Path) -> dict[str, str]:
    """Of a new shell, without what this process itself was given."""
    environment = os.environ | {"PREFECT_API_URL": url, "PREFECT_HOME": str(home)}
    return {name: value for name, value in environment.items() if name not in (AUTH_VARIABLE, SERVER_AUTH_VARIABLE)}


def command_line(*arguments: str, home: Path, url: str, timeout: float = 60) -> subprocess.CompletedProcess[str]:
    """Prefect's real command line in the project folder, where `prefect.toml` switches the plugin on."""
    environment = environment_for(url, home) | {"DO_NOT_TRACK": "1", "COLUMNS": "200"}
    return subprocess.run(
        [PREFECT, *arguments], cwd=PROJECT_ROOT, env=environment, capture_output=True, text=True, timeout=timeout
    )


@pytest.mark.parametrize(
    ("name", "outcome"),
    [("full-paper-repro", "ConnectError"), ("other-flow", "Invalid deployment name format: other-flow")],
)
def test_the_real_command_line_loads_the_plugin(tmp_path: Path, name: str, outcome: str) -> None:
    """No server listens on port 9: a completed name gets as far as trying to connect, any other is refused before."""
    result = command_line("deployment", "run", name, home=tmp_path, url="http://127.0.0.1:9/api")
    assert result.returncode != 0
    assert outcome in result.stdout + result.stderr
    assert "Failed to load plugin" not in result.stdout + result.stderr


# ---- `make serve`


@dataclass
class Served:
    """A running `make serve` of this project, with all it writes in a folder of its own."""

    process: subprocess.Popen[bytes] | ForkedProcess
    url: str
    folder: Path

    @property
    def log(self) -> str:
        return (self.folder / "serve.log").read_text(errors="replace")

    @property
    def environment(self) -> dict[str, str]:
        """Of a user's processes in the project folder: the plugin supplies the auth string."""
        return environment_for(self.url, self.folder / "prefect")

    @property
    def auth(self) -> str:
        """The auth string that `make serve` generated."""
        return (self.folder / "prefect" / AUTH_FILE).read_text().strip()

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Basic {base64.b64encode(self.auth.encode()).decode()}"}

    def close_dead_runs(self, *, no_worker_is_up: bool) -> list[str]:
        with SyncPrefectClient(self.url, auth_string=self.auth) as client:
            return close_dead_runs_of(client, no_worker_is_up=no_worker_is_up)

    def prefect(self, *arguments: str, timeout: float = 150) -> str:
        result = command_line(*arguments, home=self.folder / "prefect", url=self.url, timeout=timeout)
        assert result.returncode == 0, f"{result.stdout}\n{result.stderr}\n{self.log[-6000:]}"
        return result.stdout

    def post(self, path: str, body: dict[str, Any]) -> Any:
        return self.send("POST", path, body)

    def send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        """As Prefect's own client does, with another try when the server's database is busy (503)."""
        for _ in range(10):
            answer = httpx.request(method, self.url + path, json=body, timeout=120, headers=self.headers)
            if answer.status_code != 503:
                break
            time.sleep(1)
        answer.raise_for_status()
        return answer.json() if answer.content else None


def wait_until(condition: Any, seconds: float, what: str, served: Served) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert served.process.poll() is None, f"serve ended with {served.process.returncode}:\n{served.log[-6000:]}"
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds} s:\n{served.log[-6000:]}"
        time.sleep(0.3)


AS_IN_EARNEST = f"""
import sys
from flows.prefect_host import worker_process
from qadapter.command.parser import main
worker_process._NAME = {forked_serve.__name__!r}  # which forks the engines of flow runs
sys.exit(main(["up"]))
"""


@contextmanager
def serving(folder: Path, tables: Path, *, forked: bool) -> Iterator[Served]:
    """`make serve` with all that it writes in a folder.

    Args:
        folder: a new one.
        tables: see `prefect_tables`.
        forked: whether all its processes are forked; else only the engines of its flow runs.
    """
    url = f"http://127.0.0.1:{free_port()}/api"
    environment = environment_for(url, folder / "prefect") | {
        "QADAPTER_HOME": str(folder / "home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    environment.pop("MLFLOW_TRACKING_URI", None)
    (folder / "home").mkdir()
    log = folder / "serve.log"
    log.touch()
    process: subprocess.Popen[bytes] | ForkedProcess
    with prefect_tables(folder / "prefect" / "prefect.db", tables):
        if forked:
            process = ForkedProcess(forked_serve.be_up, cwd=PROJECT_ROOT, env=environment, stdout=log, own_group=True)
        else:
            with log.open("ab") as stream:
                process = subprocess.Popen(
                    [sys.executable, "-c", AS_IN_EARNEST],
                    cwd=PROJECT_ROOT,
                    env=environment,
                    stdout=stream,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
        served = Served(process, url, folder)
        try:
            wait_until(lambda: "Ready." in served.log, 240, "a ready server and worker", served)
        except BaseException:
            _stop(process)
            raise
    try:
        yield served
    finally:
        _stop(process)


def _stop(process: subprocess.Popen[bytes] | ForkedProcess) -> None:
    family = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.terminate()
    try:
        process.wait(timeout=60)
    except subprocess.TimeoutExpired:
        process.kill()
    for child in family:
        if child.is_running():
            child.kill()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with serving(tmp_path_factory.mktemp("serve"), shared_folder(tmp_path_factory), forked=False) as served:
        yield served


def newest_run(served: Served) -> dict[str, Any]:
    """The flow run that was asked for last."""
    return max(asked_for(served), key=lambda run: str(run["created"]))


def asked_for(served: Served) -> list[dict[str, Any]]:
    """All flow runs that somebody asked for; a schedule's own ones are in the future."""
    return [run for run in served.post("/flow_runs/filter", {}) if not run["auto_scheduled"]]


def secret_source(server: str) -> dict[str, dict[str, str]]:
    """The source of `TINY`, with its pairs behind a token."""
    return {
        "harmless": {**TINY["sources"]["harmless"], "path": f"{server}/harmless.jsonl?token=${{QADAPTER_DATA_TOKEN}}"}
    }  # type: ignore[index]


@pytest.mark.slow
def test_deployments_start_runs_that_complete(
    served: Served, deployments: list[dict[str, Any]], data_server: str
) -> None:
    """Slash form, then bare name: two real runs through server and worker, the second found in the cache.

    Their source is behind a token, which comes as docs/security.md says: saved as a block, put into the run's
    environment by the worker.
    """
    found = {(entry["entrypoint"], entry["name"]): entry for entry in served.post("/deployments/filter", {})}
    assert set(found) == {(entry["entrypoint"], entry["name"]) for entry in deployments}
    experiment = "flows/full_paper_repro.py:full_paper_repro"
    assert found[experiment, "mini"]["parameters"] == {"profile": "mini"}
    for entry in found.values():
        assert entry["work_pool_name"] == "qadapter-local"
        assert entry["global_concurrency_limit"]["limit"] == 1
        assert entry["concurrency_options"]["collision_strategy"] == "ENQUEUE"
    assert served.post("/work_pools/filter", {})[0]["type"] == "process"

    save = "import sys; from prefect.blocks.system import Secret; Secret(value=sys.argv[1]).save('data-token')"
    command = [sys.executable, "-c", save, SECRETS["QADAPTER_DATA_TOKEN"]]
    subprocess.run(command, env=served.environment, check=True, timeout=120)
    overrides = f"overrides={json.dumps(TINY | {'sources': secret_source(data_server)})}"
    variables = {"QADAPTER_DATA_TOKEN": "{{ prefect.blocks.secret.data-token }}"}
    for name, further in (("full-paper-repro/smoke", {forked_serve.BARE: "1"}), ("full-paper-repro", {})):
        environment = f"env={json.dumps(variables | further)}"
        served.prefect(
            "deployment", "run", name, "-p", overrides, "--job-variable", environment, "--watch", timeout=300
        )
        assert newest_run(served)["state_type"] == "COMPLETED", served.log[-6000:]

    smoke = found[experiment, "smoke"]["id"]
    assert {run["deployment_id"] for run in asked_for(served)} == {smoke}
    with sqlite3.connect(served.folder / "home" / "mlflow.db") as database:
        statuses = database.execute(
            "SELECT status, COUNT(*) FROM runs WHERE run_uuid NOT IN "
            "(SELECT run_uuid FROM tags WHERE key = 'mlflow.parentRunId') GROUP BY status"
        ).fetchall()
        cached = database.execute(
            "SELECT value, COUNT(*) FROM tags WHERE key LIKE 'cached.%' GROUP BY value"
        ).fetchall()
    assert statuses == [("FINISHED", 2)]
    assert dict(cached)["True"] == dict(cached)["False"], "what the first run computed, the second one found"


@pytest.mark.slow
@pytest.mark.parametrize(
    "process",
    [None, "999999999", "c0ffee0123ab"],
    ids=["before it had a process", "its process is gone", "a container, which only its worker can judge"],
)
def test_a_dead_run_does_not_block_its_deployment(served: Served, process: str | None) -> None:
    """The place that a run takes in the limit is given back when the run is reported as crashed."""
    mini = served.send("GET", "/deployments/name/full-paper-repro/mini")
    limit = f"/v2/concurrency_limits/{mini['global_concurrency_limit']['id']}"
    later = (datetime.now(UTC) + timedelta(hours=1)).isoformat()
    waiting = {"type": "SCHEDULED", "state_details": {"scheduled_time": later}}
    run = served.post(f"/deployments/{mini['id']}/create_flow_run", {"state": waiting})
    assert served.post(f"/flow_runs/{run['id']}/set_state", {"state": {"type": "PENDING"}})["status"] == "ACCEPT"
    if process is not None:
        assert (
            served.post(f"/flow_runs/{run['id']}/set_state", {"state": {"type": "RUNNING"}, "force": True})["status"]
            == "ACCEPT"
        )
        served.send("PATCH", f"/flow_runs/{run['id']}", {"infrastructure_pid": process})
        if not process.isdecimal():
            assert served.close_dead_runs(no_worker_is_up=True) == []
            assert served.send("GET", f"/flow_runs/{run['id']}")["state_type"] == "RUNNING"
            served.send("PATCH", f"/flow_runs/{run['id']}", {"infrastructure_pid": "999999999"})  # as a process' again
        assert served.close_dead_runs(no_worker_is_up=False) == [run["name"]]
    else:
        assert served.close_dead_runs(no_worker_is_up=False) == []
        assert served.send("GET", limit)["active_slots"] == 1
        assert served.close_dead_runs(no_worker_is_up=True) == [run["name"]]
    assert served.send("GET", f"/flow_runs/{run['id']}")["state_type"] == "CRASHED"
    assert served.send("GET", limit)["active_slots"] == 0


def child_of(served: Served, kind: str) -> psutil.Process:
    """The process of the worker, or of the server."""
    module = {"worker": forked_serve.__name__, "server": server_process.__name__}[kind]
    return next(child for child in psutil.Process(served.process.pid).children() if module in child.cmdline())


def wait_until_old_enough(process: psutil.Process) -> None:
    """One that is killed in its first ten seconds is not started again."""
    time.sleep(max(0.0, 11 - (time.time() - process.create_time())))


def checkpoints(served: Served) -> list[Path]:
    """Whole checkpoints of the trainings that are under way."""
    return list((served.folder / "home" / ".qadapter" / "scratch").glob(f"*/*/checkpoint-*/{SEAL}"))


@pytest.mark.slow
def test_a_killed_run_resumes_and_a_killed_worker_restarts(served: Served) -> None:
    """`kill -9` of a run in a training: the next one resumes it. Of the worker: the run goes on without it."""
    smoke = served.send("GET", "/deployments/name/full-paper-repro/smoke")["id"]
    overrides = TINY | {"base_seed": 3, "pretraining.max_steps": 300, "pretraining.save_steps": 20}
    body = {"parameters": {"profile": "smoke", "overrides": overrides}}
    killed = served.post(f"/deployments/{smoke}/create_flow_run", body)["id"]
    wait_until(lambda: checkpoints(served), 180, "a training that writes checkpoints", served)
    os.kill(int(served.send("GET", f"/flow_runs/{killed}")["infrastructure_pid"]), signal.SIGKILL)
    crashed = lambda: served.send("GET", f"/flow_runs/{killed}")["state_type"] == "CRASHED"  # noqa: E731
    wait_until(crashed, 60, "the worker's report", served)
    step = max(int(file.parent.name.split("-")[1]) for file in checkpoints(served))

    # With the pipes to its worker that it has in earnest: they break.
    body["job_variables"] = {"env": {forked_serve.BARE: "1"}}
    last = served.post(f"/deployments/{smoke}/create_flow_run", body)["id"]
    goes_on = f"pre-training: resumes after step {step}, where it was stopped"
    wait_until(lambda: goes_on in served.log, 180, "a training that goes on", served)
    wait_until_old_enough(child_of(served, "worker"))
    child_of(served, "worker").kill()
    again = "The Prefect worker was killed (signal 9) and is started again"
    wait_until(lambda: again in served.log, 30, "another worker", served)
    wait_until(lambda: newest_run(served)["state_type"] not in {"RUNNING", "PENDING"}, 240, "its end", served)
    assert newest_run(served)["id"] == last
    assert newest_run(served)["state_type"] == "COMPLETED", served.log[-6000:]
    assert checkpoints(served) == []


@pytest.mark.slow
def test_a_killed_server_is_started_again_and_its_runs_go_on(served: Served) -> None:
    """`kill -9` of the server in a training of a deployment, which holds a lease; it stays away for longer than that.

    The run's process stands still meanwhile, so that the server, once it is back, finds the lease overdue first; then
    the run renews it, and comes to its end with the same worker.
    """
    smoke = served.send("GET", "/deployments/name/full-paper-repro/smoke")
    kept = ("flow_id", "path", "pull_steps", "work_pool_name", "job_variables", "concurrency_options")
    body = {key: smoke[key] for key in kept} | {
        "name": "renewing",
        "entrypoint": "tests/support/renewing.py:full_paper_repro",
    }
    deployment = served.post("/deployments/", body | {"concurrency_limit": 1})
    folder = served.folder / "prefect" / "concurrency_leases"
    others = set(folder.glob("*.json"))  # of runs that an earlier test killed
    overrides = TINY | {"base_seed": 5, "pretraining.max_steps": 200, "pretraining.save_steps": 20}
    parameters = {"profile": "smoke", "overrides": overrides}
    run = served.post(f"/deployments/{deployment['id']}/create_flow_run", {"parameters": parameters})
    wait_until(lambda: checkpoints(served), 180, "a training that writes checkpoints", served)
    worker, server = child_of(served, "worker"), child_of(served, "server")
    wait_until_old_enough(server)
    process = int(served.send("GET", f"/flow_runs/{run['id']}")["infrastructure_pid"])

    os.kill(process, signal.SIGSTOP)
    server.kill()
    (lease,) = set(folder.glob("*.json")) - others - {folder / "expirations.json"}
    long_ago = (datetime.now(UTC) - timedelta(hours=1)).isoformat()
    lease.write_text(json.dumps(json.loads(lease.read_text()) | {"expiration": long_ago}))
    index = folder / "expirations.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {lease.stem: long_ago}))
    again = "The Prefect server was killed (signal 9) and is started again"
    wait_until(lambda: again in served.log, 30, "another server", served)
    home = served.folder / "prefect"
    wait_until(lambda: standing(served.url, home) is Standing.OURS, 120, "a server that answers", served)
    assert served.send("GET", f"/flow_runs/{run['id']}")["state_type"] == "RUNNING"
    os.kill(process, signal.SIGCONT)
    wait_until(lambda: json.loads(lease.read_text())["expiration"] != long_ago, 60, "a renewal", served)
    ends = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}
    wait_until(lambda: served.send("GET", f"/flow_runs/{run['id']}")["state_type"] in ends, 240, "its end", served)
    last = served.send("GET", f"/flow_runs/{run['id']}")
    assert (last["state_type"], last["run_count"]) == ("COMPLETED", 1), served.log[-6000:]
    assert "Concurrency lease renewal failed" not in served.log, "which ends a run"
    assert child_of(served, "worker") == worker
    assert not lease.exists(), "given back"
    limit = served.send("GET", f"/deployments/{deployment['id']}")["global_concurrency_limit"]
    assert limit["active_slots"] == 0


@pytest.mark.slow
def test_paused_and_resumed_schedules_survive_a_restart(served: Served) -> None:
    """Another `make serve` on the same server deploys everything once more."""

    def schedule(flow: str) -> tuple[str, dict[str, Any]]:
        deployment = served.send("GET", f"/deployments/name/{flow}/smoke")
        (found,) = deployment["schedules"]
        return f"/deployments/{deployment['id']}/schedules/{found['id']}", found

    for flow, active in (("watch-preferences", True), ("check-champion", False)):
        path, before = schedule(flow)
        assert before["active"] is not active, "the file's own"
        served.send("PATCH", path, {"active": active})  # what `prefect deployment schedule resume` and `pause` send
    log = served.folder / "again.log"
    environment = served.environment
    with log.open("wb") as stream:
        command = [sys.executable, "-m", "qadapter", "up"]
        process = subprocess.Popen(command, cwd=PROJECT_ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT)
    again = Served(process, served.url, log.parent)
    try:
        wait_until(lambda: "Ready." in log.read_text(errors="replace"), 120, "a second `make serve`", again)
    finally:
        process.terminate()
        assert process.wait(timeout=60) == 0, log.read_text(errors="replace")
    said = log.read_text(errors="replace")
    assert "using the one that answers" in said
    assert f"Schedule of {WATCH}: stays active, unlike in prefect.yaml" in said
    assert f"Schedule of {CHECK}: stays paused, unlike in prefect.yaml" in said
    assert [schedule(flow)[1]["active"] for flow in ("watch-preferences", "check-champion")] == [True, False]
    written = json.loads((served.folder / "prefect" / "deployed-schedules.json").read_text())
    assert (len(written), written[WATCH], written[CHECK]) == (4, False, True), "what the file says"


@pytest.mark.slow
def test_an_experiment_is_spread_over_a_work_pool(served: Served, capsys: pytest.CaptureFixture[str]) -> None:
    """Two methods as runs of their own, then the whole, which trains nothing."""
    overrides = TINY | {"methods.run": ["sft", "dpo"]}
    given = ["full-paper-repro/smoke", *(f"{key}={json.dumps(value)}" for key, value in overrides.items())]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFECT_API_URL", served.url)
        patch.setenv("PREFECT_HOME", str(served.folder / "prefect"))
        patch.delenv(AUTH_VARIABLE, raising=False)
        patch.setenv("QADAPTER_HOME", str(served.folder / "home"))
        assert spread(["full-paper-repro/nowhere", *given[1:]]) == 2
        assert "has no deployment 'full-paper-repro/nowhere'; it has check-champion/smoke" in capsys.readouterr().err
        before = len(asked_for(served))
        assert spread(given) == 0, served.log[-6000:]
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines if "ended as Completed" in line] == ["sft", "dpo", "comparison"]
    assert len(asked_for(served)) == before + 3
    with sqlite3.connect(served.folder / "home" / "mlflow.db") as database:
        (parent,) = database.execute(
            "SELECT run_uuid FROM tags WHERE key = 'prefect.flow_run_id' AND value = ?", (newest_run(served)["id"],)
        ).fetchone()
        found = database.execute(
            "SELECT t.key, t.value FROM tags t JOIN tags p ON p.run_uuid = t.run_uuid WHERE p.key = "
            "'mlflow.parentRunId' AND p.value = ? AND t.key LIKE 'cached.%'",
            (parent,),
        ).fetchall()
    assert len(found) > 8
    assert {name for name, cached in found if cached != "True"} <= {"cached.report"}


@pytest.mark.slow
def test_a_missing_secret_is_named(served: Served, data_server: str) -> None:
    """Without the block's variable; and what the runs above wrote does not hold the secret."""
    overrides = TINY | {"sources": secret_source(data_server), "base_seed": 9}
    command = ["deployment", "run", "full-paper-repro", "-p", f"overrides={json.dumps(overrides)}", "--watch"]
    refused = command_line(*command, home=served.folder / "prefect", url=served.url, timeout=300)
    assert refused.returncode != 0
    assert newest_run(served)["state_type"] == "FAILED"
    assert "QADAPTER_DATA_TOKEN" in served.log[-6000:]
    _, found = files_with_secrets([served.folder])
    assert found == {}


@pytest.mark.slow
def test_stopping_leaves_nothing_behind(served: Served) -> None:
    """TERM in the middle of a run: it is reported as crashed, every process ends, the port is free."""
    long_run = TINY | {"pretraining.max_steps": 1_000_000, "base_seed": 7}
    smoke = served.send("GET", "/deployments/name/full-paper-repro/smoke")["id"]
    body = {
        "parameters": {"profile": "smoke", "overrides": long_run},
        "job_variables": {"env": {forked_serve.BARE: "1"}},
    }
    served.post(f"/deployments/{smoke}/create_flow_run", body)
    wait_until(lambda: newest_run(served)["state_type"] == "RUNNING", 60, "a running flow", served)
    run_id = newest_run(served)["id"]
    family = psutil.Process(served.process.pid).children(recursive=True)
    assert len(family) >= 3, "server, worker and flow run"
    assert served.close_dead_runs(no_worker_is_up=True) == [], "it is alive"

    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(timeout=90) == 0, served.log[-6000:]

    assert [process.cmdline() for process in family if process.is_running()] == []
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", int(served.url.split(":")[2].split("/")[0]))) != 0
    with sqlite3.connect(served.folder / "prefect" / "prefect.db") as database:
        states = dict(database.execute("SELECT id, state_type FROM flow_run").fetchall())
    assert states[run_id] == "CRASHED"
    assert others_modes(served.folder / "prefect", *(served.folder / "home").iterdir()) == {}
    stored = list((served.folder / "prefect" / "storage").glob("*"))
    assert stored, "of the run that failed above"
    assert all(json.loads(file.read_text()).keys() == {"__exc_type__", "message"} for file in stored)


@pytest.mark.slow
def test_serve_starts_no_server_elsewhere() -> None:
    """A remote address that does not answer is an error, not a reason to listen on it."""
    result = subprocess.run(
        [sys.executable, "-m", "qadapter", "up"],
        cwd=PROJECT_ROOT,
        env=os.environ | {"PREFECT_API_URL": "http://192.0.2.1:4200/api"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert result.returncode == 2
    assert "loopback address only" in result.stderr
    assert "Traceback" not in result.stderr
