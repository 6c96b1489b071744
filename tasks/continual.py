"""Stages that only a sequence of preferences has: pairs of several steps, composed adapters, outcomes, the report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task

from qadapter.config.continual import Continual
from qadapter.files.artifacts import read_json
from qadapter.methods.table import SUBJECT
from tasks.candidate import train_candidate
from tasks.report import NOTE_TAG, Report, note_of
from tasks.stages.context import Cell, RunContext
from tasks.stages.prefect_artifacts import show_figure, show_page
from tasks.stages.stage_run import StageResult, run_stage, task_result
from tasks.stages.store import StageOutput
from tasks.stages.task_reads import questions_of
from tasks.train import Base, train_adapter

if TYPE_CHECKING:
    from qadapter.evaluation.sequence.measure import Ruler


@dataclass(frozen=True)
class Step(Cell):
    """One step of one way through a sequence.

    Attributes:
        way: of `qadapter.config.continual.Way`; `alone` for the adapters that several ways share.
        step: from 1.
    """

    way: str = ""
    step: int = 0

    @property
    def name(self) -> str:
        """The run's name: `replayed · 2 academy · seed 1`."""
        return f"{self.way} · {self.step} {self.domain} · seed {self.seed}"

    def tags(self) -> dict[str, str]:
        """MLflow tags; `tags.way = 'replayed'` finds the runs of one way."""
        return {**super().tags(), "way": self.way, "step": str(self.step)}


def step_of(way: str, step: int, domain: str, seed: int) -> Step:
    """A step of the Q-Adapter's."""
    return Step(domain, SUBJECT.name, seed, way, step)


_NAMED = "{cell.way}-{cell.step}-{cell.domain}-{cell.seed}"
train_alone = train_adapter.with_options(task_run_name=f"train-{_NAMED}")
train_on = train_candidate.with_options(task_run_name=f"train-{_NAMED}")


@dataclass(frozen=True)
class Measured:
    """The measurement of one step, or (no cell) of the base."""

    cell: Step | None
    stage: StageResult
    training: StageResult | None = None


@task(task_run_name="pairs-{cell.way}-{cell.step}-{cell.domain}-{cell.seed}")
def mix_with_past(
    context: RunContext, cell: Step, data: StageResult, earlier: Mapping[str, StageResult], share: float
) -> Any:
    """The new pairs, and a share of each earlier preference's."""
    assert cell.seed is not None
    seed = cell.seed

    def compute(out: Path, _: Path) -> None:
        from qadapter.preferences.past import mix_pairs

        old = [one.path / "train.jsonl" for one in earlier.values()]
        mix_pairs(data.path / "train.jsonl", old, out, share=share, seed=seed)

    result = run_stage(
        context,
        "sequence-pairs",
        label=cell.name,
        module="qadapter.preferences.past",
        config={"share": share, "seed": seed if share < 1 else 0, "order": list(earlier)},
        inputs={"new": data.output, **{f"old-{name}": one.output for name, one in earlier.items()}},
        compute=compute,
    )
    return task_result(result, result)


@dataclass(frozen=True)
class _Ruled:
    """A stage that measures policies by a ruler: what it has in common with the others of its kind.

    Attributes:
        context: of the stage.
        base: of the policies.
        ruler: how they are measured.
        config, inputs: the ruler, as a stage depends on it.
    """

    context: RunContext
    base: Base
    ruler: Ruler
    config: Mapping[str, Any]
    inputs: Mapping[str, StageOutput | Path]

    def run(
        self,
        name: str,
        run_name: str,
        cell: Step | None,
        compute: Callable[[Path, Path], None],
        *,
        config: Mapping[str, Any] | None = None,
        inputs: Mapping[str, StageOutput | Path],
    ) -> StageResult:
        """`run_stage` of one step, or (no cell) of the base, with what this stage alone depends on."""
        return run_stage(
            self.context,
            name,
            run_name=run_name,
            tags=cell.tags() if cell else None,
            module="qadapter.evaluation.sequence.measure",
            config={**self.config, **self.base.config(), **(config or {})},
            inputs={**self.base.inputs(), **self.inputs, **inputs},
            compute=compute,
        )


def _ruled(
    context: RunContext,
    base: Base,
    data: Mapping[str, StageResult],
    benchmarks: StageResult | None,
    world: StageResult | None,
) -> _Ruled:
    """How policies on a base are measured on some domains."""
    from qadapter.evaluation.sequence.measure import HeldOut, Ruler

    context = base.within(context)
    experiment = context.experiment
    retention = experiment.evaluation.retention
    asked = questions_of(retention, benchmarks.path if benchmarks else None, context.data)
    styles = {name: experiment.sources[experiment.domains[name].source].domain for name in data}
    ruler = Ruler(
        {name: HeldOut(one.path / "heldout.jsonl", styles[name]) for name, one in data.items()},
        experiment.evaluation.adaptation,
        retention,
        experiment.training.max_length,
        world.path if world else None,
        benchmarks.path if benchmarks else None,
        asked.official,
        asked.own,
    )
    inputs: dict[str, StageOutput | Path] = {f"data-{name}": one.output for name, one in data.items()}
    inputs |= asked.inputs
    if world is not None:
        inputs["world"] = world.output
    config = {
        "adaptation": experiment.evaluation.adaptation.measured(),
        "retention": retention.model_dump(exclude={"official_data", "own"}),
        "tasks": asked.definitions,
        "styles": styles,
        "model": experiment.model.key(),
        "max_length": experiment.training.max_length,
    }
    return _Ruled(context, base, ruler, config, inputs)


@task(task_run_name="base-outcome")
def measure_base_outcome(
    context: RunContext,
    base: Base,
    data: Mapping[str, StageResult],
    benchmarks: StageResult | None,
    world: StageResult | None,
) -> Any:
    """Measure the base on every preference of the sequence: what forgetting is measured from."""
    return _measured(context, None, base, None, data, benchmarks, world)


@task(task_run_name=f"outcome-{_NAMED}")
def measure_step(
    context: RunContext,
    cell: Step,
    base: Base,
    adapter: StageResult,
    data: Mapping[str, StageResult],
    benchmarks: StageResult | None,
    world: StageResult | None,
) -> Any:
    """Measure the policy of one step on every preference so far, and what it kept of the base."""
    return _measured(context, cell, base, adapter, data, benchmarks, world)


def _measured(
    context: RunContext,
    cell: Step | None,
    base: Base,
    adapter: StageResult | None,
    data: Mapping[str, StageResult],
    benchmarks: StageResult | None,
    world: StageResult | None,
) -> Any:
    ruled = _ruled(context, base, data, benchmarks, world)

    def compute(out: Path, _: Path) -> None:
        from qadapter.evaluation.sequence.measure import measure_outcome

        folder = adapter.path / "adapter" if adapter else None
        measure_outcome(base.location, folder, model=ruled.context.experiment.model, ruler=ruled.ruler, out=out)

    title = f"outcome · {cell.name if cell else 'base'}"
    inputs = {"adapter": adapter.output} if adapter else {}
    result = ruled.run("sequence-outcome", title, cell, compute, inputs=inputs)
    return task_result(Measured(cell, result, adapter), result)


@task(task_run_name="compose-{cell.step}-{cell.domain}-{cell.seed}", tags=["accelerator"])
def compose_adapters(
    context: RunContext,
    cell: Step,
    continual: Continual,
    base: Base,
    adapters: Sequence[StageResult],
    before: StageResult | None,
    of_base: Measured,
    data: Mapping[str, StageResult],
    benchmarks: StageResult | None,
    world: StageResult | None,
) -> Any:
    """Compose the adapters of all preferences so far with the weights that learn most within the budget."""
    ruled = _ruled(context, base, data, benchmarks, world)

    def compute(out: Path, _: Path) -> None:
        from qadapter.evaluation.sequence.measure import CHOICE, choose_weights
        from qadapter.evaluation.sequence.outcome import Outcome

        start = Outcome.read(of_base.stage.path)
        choose_weights(
            base.location,
            [one.path / "adapter" for one in adapters],
            model=ruled.context.experiment.model,
            ruler=ruled.ruler,
            before=read_json(before.path / CHOICE)["weights"] if before else (),
            budget=continual.budget,
            weights=continual.weights,
            factors=continual.factors,
            of_base=Outcome({name: start.learnt[name] for name in data}, start.kept),
            out=out,
        )

    result = ruled.run(
        "compose",
        f"compose · {cell.name}",
        cell,
        compute,
        config={
            "budget": continual.budget.model_dump(),
            "weights": continual.weights,
            "factors": continual.factors,
        },
        inputs={
            "base_outcome": of_base.stage.output,
            **({"before": before.output} if before else {}),
            **{f"adapter-{step}": one.output for step, one in enumerate(adapters, start=1)},
        },
    )
    return task_result(result, result)


@task(task_run_name="continual-report")
def write_continual(
    context: RunContext, continual: Continual, base: Measured, steps: Sequence[Measured], costs: Mapping[str, Any]
) -> Any:
    """Write the matrices of all ways, their figures of merit and the heat map.

    Args:
        context: the flow run's context.
        continual: the sequence.
        base: the base's measurement.
        steps: of every way, step and seed.
        costs: way → the trainings that it needs, as stages.
    """
    title = f"A sequence of preferences: {continual.name}"
    domains = list(context.experiment.domains)
    inputs: dict[str, StageOutput | Path] = {"base": base.stage.output}
    inputs |= {one.cell.name: one.stage.output for one in steps if one.cell}
    spent = {
        way: sum(one.output.metrics().get("cost/train_seconds", 0.0) for one in made) for way, made in costs.items()
    }
    trained = {
        way: sum(one.output.metrics().get("cost/train_tokens", 0.0) for one in made) for way, made in costs.items()
    }

    def compute(out: Path, _: Path) -> None:
        from qadapter.evaluation.sequence.matrix import Passage
        from qadapter.evaluation.sequence.outcome import Outcome
        from qadapter.report.sequence.build import Cost, build_continual_report

        reported = Outcome.read(base.stage.path).part(selection=False)
        passages: dict[str, Passage] = {}
        for way in continual.ways:
            outcomes = []
            for seed in context.experiment.seeds:
                own = [one for one in steps if one.cell and (one.cell.way, one.cell.seed) == (way, seed)]
                own.sort(key=lambda one: one.cell.step if one.cell else 0)
                outcomes.append(tuple(Outcome.read(one.stage.path).part(selection=False) for one in own))
            passages[way] = Passage(tuple(domains), tuple(outcomes), reported)
        per_seed = len(context.experiment.seeds)
        build_continual_report(
            passages,
            title=title,
            budget=continual.budget.max_forgetting,
            costs={way: Cost(spent[way] / per_seed, trained[way] / per_seed) for way in continual.ways},
            out=out,
        )

    result = run_stage(
        context,
        "continual-report",
        module="qadapter.report.sequence.build",
        config={"title": title, "ways": continual.ways, "domains": domains, "budget": continual.budget.model_dump()},
        inputs=inputs,
        compute=compute,
    )
    folder = result.path
    context.tracker.log_folder(context.parent_run_id, folder, "report")
    context.tracker.log_metrics(context.parent_run_id, result.output.metrics())
    context.tracker.log_table(context.parent_run_id, read_json(folder / "matrix.json"), "matrix.json")
    context.tracker.log_tags(context.parent_run_id, {NOTE_TAG: note_of(folder / "continual.md")})
    key = f"continual-{continual.name}".replace("_", "-")
    show_page(folder / "continual.md", key, title)
    show_figure(folder / "continual.png", f"{key}-figure", "accuracy after each step")
    return task_result(Report(folder, context.parent_run_id), result)
