"""Evaluation stages: adaptation and retention of a policy."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import task
from prefect.logging import get_run_logger

from qadapter.config.evaluation import AdaptationSettings
from qadapter.evaluation.distance import far_from_base
from qadapter.evaluation.speech import SPEAKS, faults_of
from qadapter.files.artifacts import read_json_lines
from qadapter.judging.plan import case_of, judge_of
from qadapter.judging.table import NO_JUDGE
from tasks.data import heldout_data, log_pairs
from tasks.judge import judge_material
from tasks.stages.context import Cell, RunContext
from tasks.stages.process_launcher import ProcessLauncher
from tasks.stages.stage_run import StageResult, run_stage, task_result
from tasks.stages.store import StageOutput
from tasks.stages.task_reads import questions_of
from tasks.train import Base


@dataclass(frozen=True)
class Evaluation:
    """One row of the comparison: the folders that the report reads.

    Attributes:
        cell: domain, method, seed.
        training: the adapter's stage; None for the base.
        adaptation, retention: the stages of the evaluation's two halves.
    """

    cell: Cell
    training: StageResult | None
    adaptation: StageResult
    retention: StageResult


@task(task_run_name="retention-{name}")
def measure_base_retention(
    context: RunContext, name: str, base: Base, old_texts: StageResult | None, benchmarks: StageResult | None
) -> Any:
    """Measure a base's retention: the reference of every difference."""
    result = _retention(context, base, None, None, old_texts, benchmarks, run_name=f"retention · {name} base")
    return task_result(result, result)


@task(task_run_name="evaluate-{cell.domain}-{cell.method}-{cell.seed}")
def evaluate(
    context: RunContext,
    cell: Cell,
    base: Base,
    trained: StageResult | None,
    base_row: Evaluation | None,
    data: StageResult,
    base_retention: StageResult,
    old_texts: StageResult | None,
    benchmarks: StageResult | None,
    world: StageResult | None,
    judge: StageResult | None,
) -> Any:
    """Measure adaptation and retention for one row. The base's own retention is measured once and used in its rows."""
    context = base.within(context)
    experiment = context.experiment
    source = experiment.domains[cell.domain].source
    style = experiment.sources[source].domain
    adapter = trained.path / "adapter" if trained else None
    kind = judge_of(experiment, cell.domain)
    case = case_of(experiment, cell.domain, kind) if kind else None
    # A plain function of the judge's own module, so that the stage's code digest covers that judge's code only.
    open_judge = kind.open if kind else None
    material = judge_material(context, base, judge, world)
    inputs: dict[str, StageOutput | Path] = {**base.inputs(), "data": data.output}
    if trained is not None:
        inputs["adapter"] = trained.output
    if base_row is not None:
        inputs["base_adaptation"] = base_row.adaptation.output
    if world is not None:
        inputs["world"] = world.output
    if judge is not None:
        inputs["judge"] = judge.output

    launcher = ProcessLauncher.for_evaluation(experiment.launch, experiment.model)

    def compute(out: Path, scratch: Path) -> None:
        from qadapter.judging.comparing import measure_judged

        launcher(
            measure_judged,
            open_judge,
            case,
            material,
            experiment.evaluation.adaptation.generate,
            base.location,
            adapter,
            data.path / "heldout.jsonl",
            base_row.adaptation.path if base_row else None,
            model=experiment.model,
            settings=AdaptationSettings(**experiment.evaluation.adaptation.measured()),
            max_length=experiment.training.max_length,
            world=world.path if world else None,
            style=style,
            out=out,
            scratch=scratch,
        )

    def log(run_id: str, output: StageOutput) -> None:
        log_pairs(context, run_id, source, data.output, "heldout")
        log_answers(context, run_id, output.path / "answers.jsonl")

    adaptation = run_stage(
        context,
        "adaptation",
        run_id=trained.run_id if trained else None,
        run_name=cell.name,
        tags=cell.tags(),
        module="qadapter.evaluation.measure",
        config={
            "settings": experiment.evaluation.adaptation.measured(),
            "judge": kind.name if kind else NO_JUDGE,
            **(kind.cache_key(case) if kind and case else {}),
            "model": experiment.model.key(),
            "max_length": experiment.training.max_length,
            "style": style,
            **base.config(),
        },
        params={"method": cell.method, "domain": cell.domain, "base": base.name},
        inputs=inputs,
        compute=compute,
        log=log,
        model_data=heldout_data(source, data.output) if trained else None,
    )
    if trained is None:
        retention = base_retention
        context.tracker.log_metrics(adaptation.run_id, retention.output.metrics())
    else:
        retention = _retention(context, base, trained, base_retention, old_texts, benchmarks, run_id=trained.run_id)
        _warn(cell, adaptation, retention)
    return task_result(Evaluation(cell, trained, adaptation, retention), adaptation, retention)


def _warn(cell: Cell, adaptation: StageResult, retention: StageResult) -> None:
    """Say in the run's own log what makes a policy useless, not only in the report at its end."""
    if adaptation.output.metrics().get(SPEAKS, 1.0) == 0:
        faults = faults_of(adaptation.path) or "most of its replies are broken"
        get_run_logger().warning("%s does not speak: %s", cell.name, faults)
    if far := far_from_base(retention.output.metrics().get("forgetting/kl_per_token")):
        get_run_logger().warning("%s is %s", cell.name, far)


def log_answers(context: RunContext, run_id: str, file: Path) -> None:
    """Log judged answers as a table, which MLflow's UI compares across runs."""
    if not file.exists():
        return
    rows = read_json_lines(file)
    columns = {name: [row[name] for row in rows] for name in ("base", "reply", "verdict", "judge")}
    prompts = ["\n\n".join(f"{turn['role']}: {turn['content']}" for turn in row["prompt"]) for row in rows]
    context.tracker.log_table(run_id, {"prompt": prompts, **columns}, "answers.json")


def _retention(
    context: RunContext,
    base: Base,
    trained: StageResult | None,
    base_retention: StageResult | None,
    old_texts: StageResult | None,
    benchmarks: StageResult | None,
    run_id: str | None = None,
    run_name: str | None = None,
) -> StageResult:
    context = base.within(context)
    experiment = context.experiment
    inputs: dict[str, StageOutput | Path] = {**base.inputs()}
    for name, result in (("adapter", trained), ("base_retention", base_retention), ("old_texts", old_texts)):
        if result is not None:
            inputs[name] = result.output
    settings = experiment.evaluation.retention
    asked = questions_of(settings, benchmarks.path if benchmarks else None, context.data)
    inputs |= asked.inputs

    launcher = ProcessLauncher.for_evaluation(experiment.launch, experiment.model)

    def compute(out: Path, scratch: Path) -> None:
        from qadapter.evaluation.measure import measure_retention

        launcher(
            measure_retention,
            base.location,
            trained.path / "adapter" if trained else None,
            base_retention.path if base_retention else None,
            model=experiment.model,
            settings=settings,
            benchmarks=benchmarks.path if benchmarks else None,
            old_texts=old_texts.path / "heldout.jsonl" if old_texts else None,
            max_length=experiment.training.max_length,
            out=out,
            official_data=asked.official,
            scratch=scratch,
            own=asked.own,
        )

    return run_stage(
        context,
        "retention",
        run_id=run_id,
        run_name=run_name,
        module="qadapter.evaluation.measure",
        config={
            # The key covers the content that the tasks read and the digest of their definitions, not the paths.
            "settings": settings.model_dump(exclude={"official_data", "own"}),
            "tasks": asked.definitions,
            "model": experiment.model.key(),
            "max_length": experiment.training.max_length,
            **base.config(),
        },
        inputs=inputs,
        compute=compute,
        model_data=(None, None) if trained else None,
    )
