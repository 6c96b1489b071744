"""The curve of an adapter as a stage: adaptation and retention at several values of its dial."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import task

from qadapter.config.curve import CurveSettings
from tasks.evaluate import Evaluation
from tasks.stages.context import Cell, RunContext
from tasks.stages.stage_run import StageResult, run_stage, task_result
from tasks.stages.store import StageOutput
from tasks.stages.task_reads import questions_of
from tasks.train import Base


@dataclass(frozen=True)
class MeasuredCurve:
    """The curve of one cell."""

    cell: Cell
    stage: StageResult


@task(task_run_name="curve-{cell.domain}-{cell.method}-{cell.seed}")
def measure_curve(
    context: RunContext,
    cell: Cell,
    row: Evaluation,
    base: Base,
    base_row: Evaluation,
    data: StageResult,
    benchmarks: StageResult | None,
    world: StageResult | None,
    old_texts: StageResult | None = None,
    settings: CurveSettings | None = None,
) -> Any:
    """Measure one adapter along its dial. What base and policy answered is known from their own evaluations.

    `settings` stand in for the experiment's own.
    """
    context = base.within(context)
    experiment, trained = context.experiment, row.training
    settings = settings or experiment.evaluation.curve
    assert settings is not None
    assert trained is not None
    style = experiment.sources[experiment.domains[cell.domain].source].domain
    retention = experiment.evaluation.retention
    asked = questions_of(retention, benchmarks.path if benchmarks else None, context.data)
    inputs: dict[str, StageOutput | Path] = {
        **base.inputs(),
        **asked.inputs,
        "adapter": trained.output,
        "data": data.output,
        "base_adaptation": base_row.adaptation.output,
        "base_retention": base_row.retention.output,
        "adaptation": row.adaptation.output,
        "retention": row.retention.output,
    }
    if world is not None:
        inputs["world"] = world.output
    if old_texts is not None:
        inputs["old_texts"] = old_texts.output

    def compute(out: Path, _: Path) -> None:
        from qadapter.evaluation.curve.measure import measure_curve as measure

        measure(
            base.location,
            trained.path / "adapter",
            data.path / "heldout.jsonl",
            model=experiment.model,
            adaptation=experiment.evaluation.adaptation,
            retention=retention,
            curve=settings,
            max_length=experiment.training.max_length,
            world=world.path if world else None,
            style=style,
            benchmarks=benchmarks.path if benchmarks else None,
            out=out,
            known_adaptation=(base_row.adaptation.path, row.adaptation.path),
            known_retention=(base_row.retention.path, row.retention.path),
            official_data=asked.official,
            own=asked.own,
            old_texts=old_texts.path / "heldout.jsonl" if old_texts else None,
        )

    def log(run_id: str, output: StageOutput) -> None:
        from qadapter.evaluation.curve.points import read_curves

        further = ("over_refusals", "answers_identical", "kl_per_token")
        names = ("dial", "value", "adaptation", "retention", *further)
        columns: dict[str, list[Any]] = {name: [] for name in names}
        for curve in read_curves(output.path):
            for point in curve.points:
                columns["dial"].append(curve.kind)
                columns["value"].append(point.value)
                columns["adaptation"].append(point.learnt.mean)
                columns["retention"].append(point.retention)
                for name in further:
                    columns[name].append(point.further().get(name))
        context.tracker.log_table(run_id, columns, "curve.json")

    result = run_stage(
        context,
        "curve",
        run_id=trained.run_id,
        module="qadapter.evaluation.curve.measure",
        config={
            "curve": settings.model_dump(),
            "adaptation": experiment.evaluation.adaptation.measured(),
            "retention": retention.model_dump(exclude={"official_data", "own"}),
            "tasks": asked.definitions,
            "model": experiment.model.key(),
            "max_length": experiment.training.max_length,
            "style": style,
            **base.config(),
        },
        inputs=inputs,
        compute=compute,
        log=log,
    )
    return task_result(MeasuredCurve(cell, result), result)
