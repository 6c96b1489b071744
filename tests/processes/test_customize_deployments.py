"""Deployments of a recurring customisation: what they say, and that an announcement starts a run on a real server."""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from mlflow import MlflowClient
from prefect.states import Cancelled, Completed, Crashed

from flows.check_champion import NAME as CHECK
from flows.check_champion import check_champion
from flows.commands.recurring import _run_flow
from flows.customize import NAME, _remember_what_was_killed, customize_on_new_preferences, request_of
from flows.prefect_host.waiting_runs import JOINED
from flows.watch_preferences import ANNOUNCED, watch_preferences
from qadapter.command.parser import main
from qadapter.config.customization import CONFIG_FOLDER, customizations, load_customization
from qadapter.errors import QAdapterError
from tasks.preferences import Seen
from tasks.tracking.registry import Version
from tests.processes.test_deployments import Served, checkpoints, serving, wait_until
from tests.support.forked_process import ForkedProcess, be_module
from tests.support.paths import PROJECT_ROOT
from tests.support.prefect_tables import shared_folder
from tests.support.tiny_deliveries import CONFIG, MODEL, deliver, evasions, refusals, write_config

FLOWS = {
    "customize_on_new_preferences": customize_on_new_preferences,
    "watch_preferences": watch_preferences,
    "check_champion": check_champion,
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """A server and a worker of this module's own."""
    with serving(tmp_path_factory.mktemp("serve"), shared_folder(tmp_path_factory), forked=True) as served:
        yield served


def deployments(function: str) -> list[dict[str, Any]]:
    entries = yaml.safe_load((PROJECT_ROOT / "prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    return [entry for entry in entries if entry["entrypoint"].endswith(f":{function}")]


def test_each_customization_has_a_schedule_and_a_trigger() -> None:
    entries = deployments("customize_on_new_preferences")
    assert sorted(entry["name"] for entry in entries) == customizations()
    for entry in entries:
        assert entry["parameters"] == {"config": entry["name"]}
        (schedule,) = entry["schedules"]
        assert schedule["cron"]
        assert schedule["active"] is (entry["name"] == "smoke"), "a template waits until somebody made it their own"
        (trigger,) = entry["triggers"]
        assert trigger["expect"] == [ANNOUNCED]
        name = load_customization(entry["name"]).name
        assert trigger["match"] == {"prefect.resource.id": f"qadapter.preferences.{name}"}


def test_every_deployment_names_a_config_that_its_flow_takes() -> None:
    for function, flow in FLOWS.items():
        assert deployments(function)
        for entry in deployments(function):
            assert entry["parameters"].items() <= flow.validate_parameters(entry["parameters"]).items()


def test_announcing_without_a_server_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", "http://127.0.0.1:9/api")
    assert main(["announce"]) == 2
    assert "No Prefect server answers at http://127.0.0.1:9/api" in capsys.readouterr().err


def test_a_workspace_that_cannot_be_written_to_is_refused_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    home = tmp_path / "file"
    home.write_text("no folder")
    monkeypatch.setenv("QADAPTER_HOME", str(home))
    for command in ("customize", "check"):
        assert main([command]) == 2
        assert f"nothing can be written to the workspace {home}" in capsys.readouterr().err


def test_a_customisation_is_checked_like_every_launch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The growing source may be empty; everything else is looked at before anything starts."""
    monkeypatch.setenv("QADAPTER_HOME", str(tmp_path))
    smoke = load_customization("smoke")
    assert request_of("smoke", smoke, "test").check() == smoke.experiment()
    assert request_of("smoke", smoke, "test").rows_to_judge(smoke.experiment()) == 2  # candidate and champion
    elsewhere = smoke.model_copy(update={"data": str(tmp_path / "nowhere")})
    with pytest.raises(QAdapterError, match=r"the data folder .* does not exist"):
        request_of("smoke", elsewhere, "test").check()


@pytest.mark.parametrize(("state", "code"), [(Completed(), 0), (Crashed(), 1), (Cancelled(), 1)])
def test_only_a_completed_run_is_a_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, state: Any, code: int
) -> None:
    monkeypatch.setenv("QADAPTER_HOME", str(tmp_path))
    monkeypatch.setattr("flows.commands.recurring.prefect_server", nullcontext)  # this flow asks none
    assert _run_flow(lambda config, return_state: state, "smoke") == code


def test_the_template_names_a_command_that_runs_it() -> None:
    first = (CONFIG_FOLDER / "example.yaml").read_text(encoding="utf-8").splitlines()[0]
    assert first == "# qadapter customize --config example"


def test_what_a_killed_run_registered_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also if another delivery has come in before the next run: its changes are counted from that ledger on."""
    monkeypatch.setenv("QADAPTER_HOME", str(tmp_path))
    smoke = load_customization("smoke")
    Seen.update(smoke, fingerprint="first", ledger="ledger 1", version=1, announced="second")
    tags = {"candidate": "digest", "data_fingerprint": "second", "ledger": "ledger 2", "reasons": "a\nb"}
    registry: Any = SimpleNamespace(versions=lambda: [Version(2, "run", "source", tags, (), 0.0)])
    assert _remember_what_was_killed(smoke, registry) is not None
    assert Seen.read(smoke) == Seen("second", "ledger 2", "version 2: a; b", 2, announced="second")
    assert _remember_what_was_killed(smoke, registry) is None, "once"


def runs_of(served: Served, flow: str) -> list[dict[str, Any]]:
    """Runs of a flow that were started by something else than its schedule, the oldest first."""
    body = {"flows": {"name": {"any_": [flow]}}, "sort": "EXPECTED_START_TIME_ASC"}
    found = served.post("/flow_runs/filter", body)
    return [run for run in found if not run["auto_scheduled"]]


def announce_at_once(served: Served, times: int) -> None:
    """Run the command that announces, several times side by side."""
    folder = served.folder
    started = [
        ForkedProcess(
            be_module,
            *("qadapter", "announce", "--config", "smoke"),
            cwd=PROJECT_ROOT,
            env=served.environment,
            stdout=folder / f"announced-{number}",
            stderr=folder / f"announced-{number}.err",
        )
        for number in range(times)
    ]
    for number, process in enumerate(started):
        assert process.wait(timeout=120) == 0, (folder / f"announced-{number}.err").read_text()
        said = folder / f"announced-{number}"
        assert said.read_text() == f"{ANNOUNCED} for smoke sent to {served.url}\n"
        said.unlink()


@contextmanager
def no_run_starts(served: Served) -> Iterator[None]:
    """In the block runs are asked for, and begin after it."""
    served.send("PATCH", "/work_pools/qadapter-local", {"is_paused": True})
    yield
    served.send("PATCH", "/work_pools/qadapter-local", {"is_paused": False})


def ended_runs(served: Served, count: int) -> list[dict[str, Any]]:
    """So many runs of the customisation, once all of them have ended; the first asked for first."""

    def ended() -> bool:
        found = runs_of(served, NAME)
        return len(found) == count and all(
            run["state_type"] in ("COMPLETED", "FAILED", "CRASHED", "CANCELLED") for run in found
        )

    wait_until(ended, 240, f"{count} ended runs", served)
    return sorted(runs_of(served, NAME), key=lambda run: str(run["created"]))


@pytest.mark.slow
def test_two_announcements_at_once_make_one_run(served: Served) -> None:
    """What arrived is broken on purpose: the runs are whole but train nothing."""
    incoming = served.folder / "home" / "preferences" / "incoming"
    incoming.mkdir(parents=True)
    (incoming / "broken.jsonl").write_text("<html>502 Bad Gateway</html>\n")
    with no_run_starts(served):
        announce_at_once(served, 2)
        wait_until(lambda: len(runs_of(served, NAME)) == 2, 60, "two runs", served)
    found = ended_runs(served, 2)
    assert sorted(run["state_name"] for run in found) == [JOINED, "Quarantined"], served.log[-6000:]
    joined, ran = sorted(found, key=lambda run: str(run["state_name"]) == "Quarantined")
    assert joined["run_count"] == 0, "it never ran"
    assert joined["state"]["message"] == f"{ran['name']} read the same data; its outcome: Quarantined"
    assert f"{joined['name']} was requested before this run read the data" in served.log

    announce_at_once(served, 1)
    last = ended_runs(served, 3)[-1]
    assert last["state_name"] == "NothingNew", served.log[-6000:]
    assert {str(run["parameters"]) for run in (ran, joined, last)} == {"{'config': 'smoke'}"}
    seconds = timedelta(seconds=float(last["total_run_time"]))
    assert seconds <= timedelta(seconds=5), f"nothing new took {seconds}"
    assert planned_for(served, NAME) == {(0, 3, 0)}, "the schedule is there too: Mondays"


def planned_for(served: Served, flow: str) -> set[tuple[int, int, int]]:
    """Weekday, hour and minute (UTC) of the runs that a flow's schedule has planned."""
    body = {"flows": {"name": {"any_": [flow]}}, "sort": "EXPECTED_START_TIME_ASC"}
    planned = [run for run in served.send("POST", "/flow_runs/filter", body) if run["auto_scheduled"]]
    times = [datetime.fromisoformat(str(run["expected_start_time"])).astimezone(UTC) for run in planned]
    return {(time.weekday(), time.hour, time.minute) for time in times}


# ---- a run that waits behind another one

HELD = {"training.max_steps": 120, "training.save_steps": 10, "training.learning_rate": 1e-3}
"""A training that lasts long enough to be stopped in it."""
ANY = {"adaptation": {"min_gain": -1.0, "beyond_noise": False}, "retention": {"max_drop": 1.0, "min_items": 8}}
"""A gate that lets everything pass: what is looked at here is who does the work."""
ENDED = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


def ask(served: Served, flow: str, config: str) -> str:
    """Ask for a run of a flow's deployment with another config; returns its id."""
    deployment = served.send("GET", f"/deployments/name/{flow}/smoke")["id"]
    run = served.send("POST", f"/deployments/{deployment}/create_flow_run", {"parameters": {"config": config}})
    return str(run["id"])


def run_of(served: Served, run: str) -> dict[str, Any]:
    return dict(served.send("GET", f"/flow_runs/{run}"))


def wait_for_end(served: Served, run: str) -> str:
    """Wait until a run has ended; returns the name of its state."""
    wait_until(lambda: run_of(served, run)["state_type"] in ENDED, 400, "the end of a run", served)
    return str(run_of(served, run)["state_name"])


def hold(served: Served, run: str) -> int:
    """Stop a run's process where it is; returns its id."""
    process = int(run_of(served, run)["infrastructure_pid"])
    os.kill(process, signal.SIGSTOP)
    return process


@dataclass
class Waited:
    """Three runs: two asked for at once, of which the first was killed, and one asked for while the second worked."""

    config: str
    home: Path
    runs: list[str]
    names: list[str]
    while_killed: list[str]
    while_asked: list[str]
    step: int


@pytest.fixture(scope="module")
def waited(served: Served) -> Waited:
    home = served.folder / "home"
    config = write_config(home, overrides=CONFIG["overrides"] | HELD, gate=ANY)
    deliver(home, "1-first.jsonl", refusals()[:40])
    runs = [ask(served, NAME, config), ask(served, NAME, config)]
    wait_until(lambda: checkpoints(served), 400, "a training that writes checkpoints", served)
    runs.sort(key=lambda run: str(run_of(served, run)["state_type"]))  # RUNNING before SCHEDULED
    first = hold(served, runs[0])
    while_killed = [run_of(served, run)["state_type"] for run in runs]
    os.kill(first, signal.SIGKILL)
    names = [wait_for_end(served, runs[0])]
    step = max(int(file.parent.name.split("-")[1]) for file in checkpoints(served))

    wait_until(lambda: "resumes after step" in served.log, 400, "a training that goes on", served)
    second = hold(served, runs[1])
    deliver(home, "2-better.jsonl", evasions()[:46])
    runs.append(ask(served, NAME, config))
    while_asked = [run_of(served, run)["state_type"] for run in runs]
    os.kill(second, signal.SIGCONT)
    names += [wait_for_end(served, run) for run in runs[1:]]
    return Waited(config, home, runs, names, while_killed, while_asked, step)


@pytest.mark.slow
def test_the_next_waiting_run_does_a_killed_runs_work(served: Served, waited: Waited) -> None:
    """Both were asked for at once: had the first come to its end, it would have ended the other one as joined."""
    assert waited.while_killed == ["RUNNING", "SCHEDULED"]
    assert waited.names[:2] == ["Crashed", "Promoted"], served.log[-6000:]
    assert f"resumes after step {waited.step}, where it was stopped" in served.log
    with sqlite3.connect(waited.home / "mlflow.db") as database:
        ended = dict(
            database.execute(
                "SELECT t.value, r.status FROM runs r JOIN tags t ON t.run_uuid = r.run_uuid "
                "WHERE t.key = 'prefect.flow_run_id'"
            )
        )
    assert [ended[run] for run in waited.runs] == ["KILLED", "FINISHED", "FINISHED"]


@pytest.mark.slow
def test_a_trigger_during_a_run_is_a_run_after_it_with_the_new_rows(served: Served, waited: Waited) -> None:
    assert waited.while_asked == ["CRASHED", "RUNNING", "SCHEDULED"], "the rows came while the second was at work"
    assert waited.names[2] == "Promoted", served.log[-6000:]
    second, third = (run_of(served, run) for run in waited.runs[1:])
    assert third["start_time"] >= second["end_time"]
    client = MlflowClient(f"sqlite:///{waited.home}/mlflow.db")
    versions = sorted(client.search_model_versions(f"name = '{MODEL}'"), key=lambda version: int(version.version))
    assert [version.tags["data_pairs"] for version in versions] == ["40 (40 new)", "86 (46 new)"]
    assert [version.tags["parent"] for version in versions] == ["", "1"]
    assert int(client.get_model_version_by_alias(MODEL, "champion").version) == 2


# ---- monitoring


def test_the_champion_is_checked_on_thursdays() -> None:
    (entry,) = deployments("check_champion")
    assert entry["schedules"] == [{"cron": "0 5 * * 4", "timezone": "UTC", "active": True}]


@pytest.mark.slow
def test_the_deployment_checks_the_champion(served: Served, waited: Waited) -> None:
    """Scheduled on the server, and run by its worker."""
    assert planned_for(served, CHECK) == {(3, 5, 0)}
    run = ask(served, CHECK, waited.config)
    assert wait_for_end(served, run) == "Steady", served.log[-6000:]
    assert f"version 2 of {MODEL} is as good as it was" in run_of(served, run)["state"]["message"]
