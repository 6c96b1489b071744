"""`qadapter spread`: one experiment over a work pool: one deployment run per method, then the comparison.

The first method's run trains the base; the others start when it has finished. The runs share finished stages through
the workspace or store, so the last run computes only the comparison.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from flows.commands.arguments import Overrides

if TYPE_CHECKING:
    from qadapter.config.experiment import Experiment


def spread(
    deployment: Annotated[
        str, typer.Argument(help="of the experiment, flow/deployment; its work pool decides where runs go")
    ],
    overrides: Overrides = None,
    profile: Annotated[str, typer.Option(help="a name in configs/, or a YAML file that the runs can read")] = "smoke",
    data: Annotated[str | None, typer.Option(help="folder with the data, as the runs see it")] = None,
) -> int:
    """Run each method of an experiment separately, then the whole; returns 0, or 1 if a run did not complete."""
    from qadapter.config.reading import parse_overrides

    return asyncio.run(spread_methods(deployment, profile, data, parse_overrides(overrides or [])))


async def spread_methods(deployment: str, profile: str, data: str | None, overrides: Mapping[str, Any]) -> int:
    """Run each method of an experiment separately, then the whole; returns 0, or 1 if a run did not complete.

    Args:
        deployment: `flow/deployment` on the server of `PREFECT_API_URL`.
        profile: profile of `full-paper-repro`.
        data: the data folder.
        overrides: dotted keys to values.

    Raises:
        QAdapterError: the config is invalid, no server answers, or it has no such deployment.
    """
    from flows.prefect_host.server import server_access
    from qadapter.config.experiment import load_experiment

    experiment = load_experiment(profile, overrides)
    methods = experiment.methods.run
    with server_access() as url:
        await _refuse_unknown(deployment, url)
        parameters = {"profile": profile, "data": data, "overrides": dict(overrides)}
        return await _spread(deployment, methods, parameters, of_each_run(experiment))


def of_each_run(experiment: Experiment) -> dict[str, Any]:
    """The settings of the run of one method: of a judge's budget it has its part."""
    from qadapter.judging.endpoint_settings import NAME

    if getattr(experiment.evaluation.adaptation, NAME) is None:  # it is not asked
        return {}
    return {f"evaluation.adaptation.{NAME}.runs": len(experiment.methods.run)}


async def _refuse_unknown(deployment: str, url: str) -> None:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    from qadapter.errors import QAdapterError

    async with get_client() as client:
        try:
            await client.read_deployment_by_name(deployment)
        except (ObjectNotFound, ValueError) as error:
            deployments = await client.read_deployments()
            known = sorted([f"{(await client.read_flow(d.flow_id)).name}/{d.name}" for d in deployments])
            raise QAdapterError(
                f"the server at {url} has no deployment {deployment!r}; it has {', '.join(known) or 'none'}"
            ) from error


async def _spread(
    deployment: str, methods: Sequence[str], parameters: Mapping[str, Any], of_each: Mapping[str, Any]
) -> int:
    async def run(name: str, **changes: Any) -> bool:
        return await _completed(deployment, name, {**parameters, "overrides": {**parameters["overrides"], **changes}})

    async def run_alone(method: str) -> bool:
        return await run(method, **{**of_each, "methods.run": [method]})

    first, *others = methods
    if others and not await run_alone(first):
        return 1
    done = await asyncio.gather(*map(run_alone, others))
    return 0 if all(done) and await run("comparison") else 1


async def _completed(deployment: str, name: str, parameters: Mapping[str, Any]) -> bool:
    """Request a run, wait for its end, and print its final state."""
    from prefect.client.schemas.objects import FlowRun
    from prefect.deployments.flow_runs import arun_deployment
    from prefect.flow_runs import wait_for_flow_run

    asked = await arun_deployment(deployment, parameters=dict(parameters), timeout=0, as_subflow=False)
    _say(f"{name}: requested flow run {asked.name}")
    ended: FlowRun = await wait_for_flow_run(asked.id, timeout=None, poll_interval=2)
    state = ended.state
    assert state is not None
    seconds = ended.total_run_time.total_seconds()
    _say(
        f"{name}: {asked.name} ended as {state.name} after {seconds:.0f} s"
        + (f": {state.message}" if not state.is_completed() else "")
    )
    return state.is_completed()


def _say(text: str) -> None:
    print(text, flush=True)  # noqa: T201 - this is a command
