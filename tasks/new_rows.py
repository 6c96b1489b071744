"""Stage of a recurring customisation: what champion and candidate make of the pairs that are new."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task

from qadapter.config.experiment import Experiment
from tasks.evaluate import Evaluation
from tasks.stages.context import RunContext
from tasks.stages.process_launcher import ProcessLauncher
from tasks.stages.stage_run import StageResult, run_stage, task_result
from tasks.stages.store import StageOutput
from tasks.train import Base


@task(task_run_name="new-rows")
def look_at_new_rows(
    context: RunContext,
    base: Base,
    candidate: StageResult,
    champion: StageResult | None,
    champion_row: Evaluation | None,
    mixture: StageResult,
) -> Any:
    """Score the new pairs by champion and candidate, on the candidate's MLflow run."""
    context = base.within(context)
    experiment: Experiment = context.experiment
    settings = experiment.evaluation.adaptation
    inputs: dict[str, StageOutput | Path] = {
        **base.inputs(),
        "candidate": candidate.output,
        "fresh": mixture.path / "fresh.jsonl",
        "trained": mixture.path / "train.jsonl",
    }
    if champion is not None:
        inputs["champion"] = champion.output
    if champion_row is not None:
        inputs["champion_adaptation"] = champion_row.adaptation.output

    launcher = ProcessLauncher.for_evaluation(experiment.launch, experiment.model)

    def compute(out: Path, scratch: Path) -> None:
        from qadapter.evaluation.new_rows import measure_new_rows

        launcher(
            measure_new_rows,
            base.location,
            champion.path / "adapter" if champion else None,
            candidate.path / "adapter",
            mixture.path / "fresh.jsonl",
            champion_row.adaptation.path if champion_row else None,
            model=experiment.model,
            max_length=experiment.training.max_length,
            batch_size=settings.batch_size,
            out=out,
            scratch=scratch,
            trained=mixture.path / "train.jsonl",
        )

    result = run_stage(
        context,
        "new-rows",
        run_id=candidate.run_id,
        module="qadapter.evaluation.new_rows",
        config={
            "batch_size": settings.batch_size,
            "model": experiment.model.key(),
            "max_length": experiment.training.max_length,
            **base.config(),
        },
        inputs=inputs,
        compute=compute,
    )
    return task_result(result, result)
