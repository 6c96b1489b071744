"""Flow runs that wait behind one that has already done what they were started for.

Two triggers at once (schedule and event, or an announcement sent twice) are two flow runs of a deployment, and its
concurrency limit lets one work. Where that one read the data after the others were asked for, they have nothing to do.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from datetime import datetime
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import (
    DeploymentFilter,
    DeploymentFilterId,
    FlowRunFilter,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import PrefectHTTPStatusError
from prefect.runtime import deployment, flow_run
from prefect.states import State

JOINED = "Joined"


def due_runs(client: SyncPrefectClient, until: datetime, *states: StateType, **filters: Any) -> list[FlowRun]:
    """Runs in one of some states that were to start by then: not those that a schedule has planned for later.

    Args:
        client: of the server to ask.
        until: with time zone.
        states: types of state.
        filters: further ones, as `read_flow_runs` takes them.
    """
    wanted = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(states))),
        expected_start_time=FlowRunFilterExpectedStartTime.model_validate({"before_": until}),
    )
    return client.read_flow_runs(flow_run_filter=wanted, **filters)


def join_waiting_runs(same: Mapping[str, Any], asked_until: datetime, outcome: str) -> list[str]:
    """End the waiting runs of this run's deployment that this run has done the work of.

    To be called last: until then they wait, and if this run is killed, the next of them does its work.

    Args:
        same: parameter → value that a run must have been given (or left out) to be one of them; runs with further
            parameters are left alone.
        asked_until: when this run began to read its data, with time zone: a run asked for later may be for newer data.
        outcome: what this run came to; the others say it too.

    Returns:
        Names of the runs; they end as `Joined`. None without a deployment. A server that does not answer is no reason
        to fail: the runs then start, and find nothing new.
    """
    if deployment.id is None:
        return []
    joined = []
    try:
        with get_client(sync_client=True) as client:
            own = DeploymentFilter(id=DeploymentFilterId(any_=[UUID(deployment.id)]))
            for run in due_runs(client, asked_until, StateType.SCHEDULED, deployment_filter=own):
                if not run.parameters.items() <= same.items():
                    continue
                message = f"{flow_run.name} read the same data and came to: {outcome}"
                client.set_flow_run_state(run.id, State(type=StateType.CANCELLED, name=JOINED, message=message))
                joined.append(run.name)
    except (httpx.TransportError, PrefectHTTPStatusError) as error:
        logging.getLogger(__name__).warning("runs that wait for this one could not be looked at: %s", error)
    return joined
