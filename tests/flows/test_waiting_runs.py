"""Which waiting flow runs a run ends as joined, on a real Prefect server."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from prefect import flow
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.states import AwaitingConcurrencySlot, Running, Scheduled

from flows.prefect_host.waiting_runs import JOINED, join_waiting_runs
from tests.support.prefect_away import prefect_away

SAME = {"config": "smoke", "force": False}


@flow
def a_flow(config: str = "smoke", force: bool = False) -> None:
    """It is never run."""


@pytest.fixture
def deployment(prefect_client: SyncPrefectClient, monkeypatch: pytest.MonkeyPatch) -> UUID:
    """The deployment that this process is said to run for."""
    made = prefect_client.create_deployment(prefect_client.create_flow(a_flow), "one", parameters={"config": "smoke"})
    monkeypatch.setenv("PREFECT__RUNTIME__DEPLOYMENT__ID", str(made))
    monkeypatch.setenv("PREFECT__RUNTIME__FLOW_RUN__NAME", "busy-bee")
    return made


def ask(prefect_client: SyncPrefectClient, deployment: UUID, state: Any, **parameters: Any) -> FlowRun:
    return prefect_client.create_flow_run_from_deployment(deployment, parameters=parameters, state=state)


def state_of(prefect_client: SyncPrefectClient, run: FlowRun) -> tuple[Any, ...]:
    state = prefect_client.read_flow_run(run.id).state
    assert state is not None
    return state.type, state.name, state.message


def test_runs_that_wait_for_the_same_are_ended(prefect_client: SyncPrefectClient, deployment: UUID) -> None:
    now = datetime.now(UTC)
    slot = AwaitingConcurrencySlot(scheduled_time=now + timedelta(seconds=30))
    waiting = [ask(prefect_client, deployment, Scheduled()), ask(prefect_client, deployment, Scheduled(), **SAME)]
    waiting.append(prefect_client.create_flow_run_from_deployment(deployment, state=Scheduled()))
    assert prefect_client.set_flow_run_state(waiting[2].id, slot).status == "ACCEPT"
    others = [
        ask(prefect_client, deployment, Scheduled(), force=True),
        ask(prefect_client, deployment, Scheduled(), config="another"),
        ask(prefect_client, deployment, Scheduled(scheduled_time=now + timedelta(hours=1))),  # next Monday's
        ask(prefect_client, deployment, Running()),
        ask(prefect_client, prefect_client.create_deployment(prefect_client.create_flow(a_flow), "two"), Scheduled()),
    ]
    before = [state_of(prefect_client, run) for run in others]
    joined = join_waiting_runs(SAME, datetime.now(UTC), "Promoted")
    assert sorted(joined) == sorted(run.name for run in waiting)
    for run in waiting:
        message = "busy-bee read the same data; its outcome: Promoted"
        assert state_of(prefect_client, run) == (StateType.CANCELLED, JOINED, message)
    assert [state_of(prefect_client, run) for run in others] == before
    assert join_waiting_runs(SAME, datetime.now(UTC), "Promoted") == []


def test_a_run_asked_for_while_this_one_works_is_left(prefect_client: SyncPrefectClient, deployment: UUID) -> None:
    """It may have been asked for because of data that came after this run had read."""
    asked_until = datetime.now(UTC)
    later = ask(prefect_client, deployment, Scheduled())
    assert join_waiting_runs(SAME, asked_until, "Promoted") == []
    assert state_of(prefect_client, later)[0] == StateType.SCHEDULED


def test_without_a_deployment_no_run_waits(prefect_client: SyncPrefectClient) -> None:
    assert join_waiting_runs(SAME, datetime.now(UTC), "Promoted") == []


def test_a_server_that_is_away_is_no_failure(
    deployment: UUID, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with prefect_away():
        assert join_waiting_runs(SAME, datetime.now(UTC), "Promoted") == []
    assert "could not be read" in caplog.text
