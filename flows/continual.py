"""Preferences one after the other: four ways to take up the next one, each measured on all earlier ones.

qadapter continual --sequence smoke
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from prefect import flow

from flows.full_paper_repro import Run, common_stages
from flows.running.prefect_run import checked_run
from flows.running.run_request import RunRequest
from flows.sweep import RunOfMany
from qadapter.config.continual import Continual, load_continual
from qadapter.config.experiment import Experiment
from qadapter.planning.preflight import require_accuracy
from tasks.continual import (
    Step,
    compose_adapters,
    measure_base_outcome,
    measure_step,
    mix_with_past,
    step_of,
    train_alone,
    train_on,
    write_continual,
)


@dataclass(frozen=True)
class _ContinualRequest(RunRequest):
    """A run of a sequence: no answer is judged."""

    continual: Continual | None = None

    def load(self) -> Experiment:
        experiment = super().load()
        assert self.continual is not None
        self.continual.check(experiment)
        return experiment

    def rows_to_judge(self, experiment: Experiment) -> int:
        return 0


def check_continual(
    sequence: str, profile: str | None, data: str | None, overrides: Mapping[str, Any], *, remote: bool = True
) -> tuple[Continual, RunRequest, Experiment]:
    """Read a sequence and its profile and refuse what cannot work.

    Args:
        sequence: a name in `configs/continual/`, or a YAML file.
        profile: replaces the sequence's own profile.
        data: the data folder.
        overrides: settings to change.
        remote: also check sources on the network.

    Raises:
        QAdapterError: the sequence is invalid; the message says what to correct.
    """
    loaded = load_continual(sequence)
    request = _ContinualRequest("continual", profile or loaded.profile, data, loaded.overrides(overrides), loaded)
    experiment = request.check(remote=remote)
    require_accuracy(experiment, "what a sequence forgets of the base is a mean of accuracies")
    return loaded, request, experiment


def continual_stages(experiment: Experiment, continual: Continual, run: RunOfMany) -> Any:
    """Run every stage of a sequence; returns the report's placeholder."""
    common = common_stages(experiment, run)
    domains = tuple(experiment.domains)
    base = common.bases[next(iter(experiment.domains.values())).base]
    data = {name: common.data[domain.source] for name, domain in experiment.domains.items()}
    shared = {"base": base, "benchmarks": common.benchmarks, "world": common.world}
    of_base = run(measure_base_outcome, data=data, **shared)
    steps: list[Any] = []
    paid: dict[str, list[Any]] = {way: [] for way in continual.ways}
    for seed in experiment.seeds:
        alone = _alone(continual, run, domains, seed, base, data)
        for way in continual.ways:
            composed: Any = None
            adapter: Any = None
            for step, domain in enumerate(domains, start=1):
                cell = step_of(way, step, domain, seed)
                so_far = {name: data[name] for name in domains[:step]}
                if way == "composed":
                    paid[way].append(alone[domain])
                    composed = adapter = run(
                        compose_adapters,
                        cell=cell,
                        continual=continual,
                        adapters=[alone[name] for name in domains[:step]],
                        before=composed,
                        of_base=of_base,
                        data=so_far,
                        **shared,
                    )
                else:
                    adapter = (
                        alone[domain] if step == 1 else _next(experiment, continual, run, cell, base, so_far, adapter)
                    )
                    paid[way].append(adapter)
                steps.append(run(measure_step, cell=cell, adapter=adapter, data=so_far, **shared))
    return run(write_continual, continual=continual, base=of_base, steps=steps, costs=paid)


def _alone(
    continual: Continual,
    run: Run,
    domains: Sequence[str],
    seed: int,
    base: Any,
    data: Mapping[str, Any],
) -> dict[str, Any]:
    """The adapter of each preference, trained from the base on its own pairs; of the first one for every way."""
    wanted = domains if "composed" in continual.ways else domains[:1]
    return {
        name: run(train_alone, cell=step_of("alone", step, name, seed), base=base, data=data[name], needs={})
        for step, name in enumerate(wanted, start=1)
    }


def _next(
    experiment: Experiment,
    continual: Continual,
    run: RunOfMany,
    cell: Step,
    base: Any,
    so_far: Mapping[str, Any],
    before: Any,
) -> Any:
    """The adapter of a step behind the first, of the ways that have one adapter."""
    earlier = {name: one for name, one in so_far.items() if name != cell.domain}
    pairs = so_far[cell.domain]
    if cell.way == "continued":
        return run(train_on, cell=cell, base=base, data=pairs, champion=before)
    share = continual.old_share if cell.way == "replayed" else 1.0
    mixed = run(mix_with_past, cell=cell, data=pairs, earlier=earlier, share=share)
    if cell.way == "replayed":
        return run(train_on, cell=cell, base=base, data=mixed, champion=before)
    return run.of(_longer(experiment, cell.step))(train_alone, cell=cell, base=base, data=mixed, needs={})


def _longer(experiment: Experiment, steps: int) -> Experiment:
    """As many optimiser steps per preference for a training on several; epochs already count all pairs."""
    training = experiment.training
    if training.max_steps is None:
        return experiment
    longer = training.model_copy(update={"max_steps": training.max_steps * steps})
    return experiment.model_copy(update={"training": longer})


@flow(name="continual")
def continual(
    sequence: str = "smoke",
    profile: str | None = None,
    data: str | None = None,
    overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Take up one preference after the other in four ways; after each step measure all earlier ones and the base.

    Args:
        sequence: smoke (toy world), small (real rows from `data`), or a YAML file.
        profile: another one than the sequence's own.
        data: folder with the data, where the profile's paths say `{data}`.
        overrides: settings to change, for example {"seeds": [0]}.
    """
    loaded, request, _ = check_continual(sequence, profile, data, overrides or {})
    with checked_run(request) as run:
        report = continual_stages(run.experiment, loaded, run)
        folder = run.result(report).folder
    return {"report": str(folder / "continual.md"), "mlflow_run": run.result(report).parent_run_id}
