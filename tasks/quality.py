"""The quality stage: problems of the data, reported before any training on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from prefect import task
from prefect.logging import get_run_logger

from qadapter.files.artifacts import read_json, write_json
from tasks.stages.context import RunContext
from tasks.stages.stage_run import StageResult, run_stage, task_result
from tasks.stages.store import StageOutput
from tasks.stages.task_reads import questions_of

QUALITY = "quality.json"


@task(task_run_name="quality-{source}")
def measure_quality(context: RunContext, source: str, data: StageResult, benchmarks: StageResult | None) -> Any:
    """Count the usual causes of a failed customization. Only the report reads it, so it never triggers a re-training.

    Args:
        context: the flow run's context.
        source: name of the source.
        data: its prepared pairs.
        benchmarks: the stage that built the run's benchmarks, if there is one.
    """
    retention = context.experiment.evaluation.retention
    folder = benchmarks.path if benchmarks else context.data
    asked = questions_of(retention, folder, context.data)

    def compute(out: Path, _: Path) -> None:
        from qadapter.evaluation.lm_eval.texts import benchmark_items
        from qadapter.evaluation.refusals import is_refusal
        from qadapter.preferences.quality import measure

        items, elsewhere = benchmark_items(retention.tasks, folder, asked.official, asked.own)
        summary = read_json(data.path / "summary.json")
        report = measure(data.path, items, is_refusal, summary)
        write_json(out / QUALITY, {**report, "benchmarks_not_looked_at": elsewhere})

    def log(run_id: str, output: StageOutput) -> None:
        from qadapter.preferences.quality import metrics

        report = read_json(output.path / QUALITY)
        numbers = {f"data/{source}/{name}": value for name, value in metrics(report).items()}
        for run in dict.fromkeys((run_id, context.parent_run_id)):
            context.tracker.log_metrics(run, numbers)
        names = sorted(numbers)
        context.tracker.log_table(
            run_id, {"figure": names, "value": [numbers[name] for name in names]}, f"quality-{source}.json"
        )

    inputs: dict[str, Any] = {"data": data.output, **asked.inputs}
    if benchmarks is not None:
        inputs["benchmarks"] = benchmarks.output
    elif context.data is not None and (there := context.data / "benchmarks").is_dir():
        inputs["benchmarks"] = there
    if asked.official is not None:
        inputs["official_data"] = asked.official
    result = run_stage(
        context,
        "quality",
        label=source,
        module="qadapter.preferences.quality",
        config={"tasks": [*retention.tasks, *asked.own], "definitions": asked.definitions},
        inputs=inputs,
        compute=compute,
        log=log,
    )
    _say(source, read_json(result.path / QUALITY))
    return task_result(result, result)


def _say(source: str, report: dict[str, Any]) -> None:
    from qadapter.preferences.quality import sentences

    logger = get_run_logger()
    logger.info("%s:%s", source, "".join(f"\n  {line}" for line in sentences(report)))
    if report["benchmarks_not_looked_at"]:
        logger.info("%s: items not on this machine: %s", source, ", ".join(report["benchmarks_not_looked_at"]))
    for line in report["warnings"]:
        logger.warning("%s: %s", source, line)
