"""Waiting flow runs whose work another run has already done.

Two triggers at the same time (schedule and event, or a repeated announcement) start two flow runs of a deployment. Its
concurrency limit admits one. If that one reads the data after the others were requested, they have nothing to do.
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
    """Runs in the given states that were due by `until`, excluding those scheduled for later.

    Args:
        client: client of the server.
        until: a time with time zone.
        states: types of states.
        filters: further filters of `read_flow_runs`.
    """
    wanted = FlowRunFilter(
        state=FlowRunFilterState(type=FlowRunFilterStateType(any_=list(states))),
        expected_start_time=FlowRunFilterExpectedStartTime.model_validate({"before_": until}),
    )
    return client.read_flow_runs(flow_run_filter=wanted, **filters)


def join_waiting_runs(same: Mapping[str, Any], asked_until: datetime, outcome: str) -> list[str]:
    """End the waiting runs of this run's deployment whose work this run has done.

    Call it last: until then they wait, and if this run is killed, the next of them does the work.

    Args:
        same: parameter → value that a run must have (or leave out) to be ended; runs with further parameters are kept.
        asked_until: when this run started to read its data, with time zone; later requests may be for newer data.
        outcome: this run's outcome, which is also reported for the others.

    Returns:
        The names of the ended runs; their state is `Joined`. Empty without a deployment, or if the server does not
        answer: the runs then start and find nothing new.
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
                message = f"{flow_run.name} read the same data; its outcome: {outcome}"
                client.set_flow_run_state(run.id, State(type=StateType.CANCELLED, name=JOINED, message=message))
                joined.append(run.name)
    except (httpx.TransportError, PrefectHTTPStatusError) as error:
        logging.getLogger(__name__).warning("runs that wait for this one could not be read: %s", error)
    return joined
