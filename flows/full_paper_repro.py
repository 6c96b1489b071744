"""The whole experiment: data, base, every method on every domain, evaluation, report.

qadapter run --profile smoke
prefect deployment run full-paper-repro/smoke
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

from prefect import flow

from flows.running.prefect_run import checked_run
from flows.running.run_request import RunRequest
from qadapter.config.experiment import Experiment
from qadapter.judging.plan import judge_of
from qadapter.methods.method import Need
from qadapter.methods.table import method_named
from tasks.curve import measure_curve
from tasks.data import build_benchmarks, generate_toy_world, prepare_data
from tasks.evaluate import evaluate, measure_base_retention
from tasks.judge import train_judge
from tasks.quality import measure_quality
from tasks.report import write_report
from tasks.stages.context import Cell
from tasks.train import fine_tune_base, prepare_need, pretrain_base, train_adapter


class Run(Protocol):
    """Runs stages: submits them to Prefect or, for `make plan`, only records them."""

    def __call__(self, task: Any, **inputs: Any) -> Any:
        """Run `task` when its inputs are available; returns a placeholder of its result."""


@dataclass(frozen=True)
class Common:
    """The stages that all cells of an experiment share; each entry is the placeholder of a stage's result."""

    world: Any
    data: Mapping[str, Any]
    benchmarks: Any
    bases: Mapping[str, Any]
    kept: Mapping[str, Any]
    old_texts: Any
    quality: Mapping[str, Any]


def common_stages(experiment: Experiment, run: Run) -> Common:
    """Data, bases, and the bases' retention: computed once for all domains, methods and seeds."""
    world = run(generate_toy_world) if experiment.toy_world else None
    data = {source: run(prepare_data, source=source, world=world) for source in experiment.sources}
    built = run(build_benchmarks, data=data, world=world) if experiment.built_benchmarks else None
    benchmarks = built or world
    quality = {name: run(measure_quality, source=name, data=data[name], benchmarks=benchmarks) for name in data}

    bases: dict[str, Any] = {"pretrained": run(pretrain_base, data=data, world=world, built=built)}
    if experiment.helpful_sft and any(domain.base == "helpful" for domain in experiment.domains.values()):
        bases["helpful"] = run(fine_tune_base, base=bases["pretrained"], data=data[experiment.helpful_sft.source])
    old_texts = data[experiment.helpful_sft.source] if experiment.helpful_sft else None
    kept: dict[str, Any] = {
        name: run(measure_base_retention, name=name, base=bases[name], old_texts=old_texts, benchmarks=benchmarks)
        for name in sorted({domain.base for domain in experiment.domains.values()})
    }
    return Common(world, data, benchmarks, bases, kept, old_texts, quality)


def evaluation_inputs(experiment: Experiment, run: Run, common: Common, name: str) -> dict[str, Any]:
    """The inputs of the evaluation that all rows of a domain share."""
    domain = experiment.domains[name]
    base, pairs = common.bases[domain.base], common.data[domain.source]
    kind = judge_of(experiment, name)
    return {
        "base": base,
        "data": pairs,
        "base_retention": common.kept[domain.base],
        "old_texts": common.old_texts,
        "benchmarks": common.benchmarks,
        "world": common.world,
        "judge": run(train_judge, domain=name, base=base, data=pairs) if kind and kind.training else None,
    }


def measured_bases(experiment: Experiment, run: Run, common: Common) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """For each domain its name, the inputs that its evaluations share, and the row of its base."""
    for name in experiment.domains:
        shared = evaluation_inputs(experiment, run, common, name)
        yield name, shared, run(evaluate, cell=Cell(name, "base"), trained=None, base_row=None, **shared)


def needed_stages(
    experiment: Experiment, run: Run, method: str, made: dict[Need, Any], **inputs: Any
) -> dict[str, Any]:
    """The stages that a method needs, by name. Each runs once per domain; `made` keeps those of one domain."""
    return _made(method_named(method).needs(experiment.methods.of(method)), run, made, **inputs)


def _made(needs: Sequence[Need], run: Run, made: dict[Need, Any], **inputs: Any) -> dict[str, Any]:
    """Run the needs that are not made yet, each after those that it needs itself."""
    for need in needs:
        if need not in made:
            made[need] = run(prepare_need, need=need, needs=_made(need.needs, run, made, **inputs), **inputs)
    return {need.name: made[need] for need in needs}


def experiment_stages(experiment: Experiment, run: Run) -> Any:
    """Run every stage of the experiment, each with its inputs; returns the report's placeholder."""
    common = common_stages(experiment, run)
    rows, curves = [], []
    for name, shared, base_row in measured_bases(experiment, run, common):
        base, pairs = shared["base"], shared["data"]
        rows.append(base_row)
        made: dict[Need, Any] = {}
        needs = {
            method: needed_stages(experiment, run, method, made, domain=name, base=base, data=pairs)
            for method in experiment.methods.run
        }
        for method, seed in product(experiment.methods.run, experiment.seeds):
            cell = Cell(name, method, seed)
            trained = run(train_adapter, cell=cell, base=base, data=pairs, needs=needs[method])
            row = run(evaluate, cell=cell, trained=trained, base_row=base_row, **shared)
            rows.append(row)
            if experiment.evaluation.curve:
                curves.append(run(measure_curve, cell=cell, row=row, base_row=base_row, **curve_inputs(shared)))
    return run(write_report, rows=rows, data=common.data, quality=common.quality, curves=curves)


def curve_inputs(shared: Mapping[str, Any]) -> dict[str, Any]:
    """Of the inputs of an evaluation those of the curve."""
    return {name: shared[name] for name in ("base", "data", "benchmarks", "world", "old_texts")}


@flow(name="full-paper-repro")
def full_paper_repro(
    profile: str = "smoke", data: str | None = None, overrides: dict[str, Any] | None = None
) -> dict[str, Any]:
    """Customize a base to new preferences with Q-Adapter and the baselines; compare what was learnt and forgotten.

    Args:
        profile: smoke (toy world), mini (real rows from `data`), paper (Llama-3.1-8B), or a YAML file.
        data: folder with the data, where the profile's paths say `{data}`.
        overrides: settings to change, for example {"training.max_steps": 50}.
    """
    with checked_run(RunRequest("full-paper-repro", profile, data, overrides or {})) as run:
        report = experiment_stages(run.experiment, run)
        return run.result(report).summary()
