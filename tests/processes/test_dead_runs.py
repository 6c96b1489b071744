"""What killed processes and other machines left open, closed on a real Prefect server and a real MLflow."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.settings import PREFECT_API_URL, PREFECT_CLIENT_MAX_RETRIES, temporary_settings
from prefect.states import Cancelled, Completed, Crashed, Failed, Paused, Pending, Running, Scheduled, State

from flows.prefect_host.dead_runs import ended_flow_runs
from flows.running.prefect_run import close_abandoned
from qadapter.files.process_tags import ProcessTag
from tasks.tracking.tracker import FLOW_RUN_TAG, Tracker

pytestmark = pytest.mark.slow

UNKNOWN = "0d7c5d6e-0000-4000-8000-000000000000"


@flow
def a_flow() -> None:
    """It is never run."""


def run_in(prefect_client: SyncPrefectClient, state: State) -> str:
    return str(prefect_client.create_flow_run(a_flow, state=state).id)


def test_which_flow_runs_have_ended(prefect_client: SyncPrefectClient) -> None:
    ended = {run_in(prefect_client, state) for state in (Completed(), Failed(), Crashed(), Cancelled())}
    others = {run_in(prefect_client, state) for state in (Scheduled(), Pending(), Running(), Paused())}
    assert ended_flow_runs({*ended, *others, UNKNOWN, "no id", ""}) == ended
    assert ended_flow_runs({"no id"}) == ended_flow_runs(set()) == set()
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api", PREFECT_CLIENT_MAX_RETRIES: 0}):
        assert ended_flow_runs(ended) == set()


def test_what_is_left_open_is_closed_on_both_sides(
    prefect_client: SyncPrefectClient, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed here: closed in MLflow and Prefect. Of elsewhere: closed in MLflow once Prefect knows of the end."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    tracker = Tracker.for_project(tmp_path)
    own = ProcessTag.own()
    dead, away = replace(own, start=own.start - 86_400), replace(own, host="elsewhere")
    tags = {"here": dead, "alive": own, "elsewhere": away, "over there": away, "tried again": dead}
    flows = {name: run_in(prefect_client, Completed() if name == "over there" else Running()) for name in tags}
    runs = {
        name: tracker.start_parent(
            "left", name, tags={FLOW_RUN_TAG: flows[name], "qadapter.process": tags[name].text()}
        )
        for name in tags
    }
    unknown = tracker.start_parent("left", "unknown", tags={FLOW_RUN_TAG: UNKNOWN, "qadapter.process": away.text()})
    monkeypatch.setenv("PREFECT__FLOW_RUN_ID", flows["tried again"])
    close_abandoned(tracker, "left")

    states = {run: tracker.call("get_run", run).info.status for run in [*runs.values(), unknown]}
    closed = {name for name in runs if states[runs[name]] == "KILLED"}
    assert closed == {"here", "over there", "tried again"}
    assert set(states.values()) == {"KILLED", "RUNNING"}
    assert states[unknown] == "RUNNING", "another Prefect server's, perhaps"
    in_prefect = {name: prefect_client.read_flow_run(run).state_type.value for name, run in flows.items()}  # type: ignore[arg-type]
    assert in_prefect == {
        "here": "CRASHED",
        "alive": "RUNNING",
        "elsewhere": "RUNNING",
        "over there": "COMPLETED",
        "tried again": "RUNNING",  # the run that closes: an earlier try of it was killed
    }
