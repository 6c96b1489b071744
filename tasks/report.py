"""The report stage: the comparison, in the store, in MLflow and as Prefect artifacts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_image_artifact, create_markdown_artifact

from qadapter.artifacts import read_json
from tasks.context import RunContext
from tasks.evaluate import Evaluation
from tasks.logged import StageResult, logged_stage, task_result
from tasks.stage import StageOutput

_COUNTS = ("read", "used", "duplicates", "cross_split_prompts", "train_pairs", "heldout_pairs")


@dataclass(frozen=True)
class Report:
    """Where the report is."""

    folder: Path
    parent_run_id: str

    def summary(self) -> dict[str, Any]:
        """What the command line prints and the flow returns, as plain values."""
        return {"report": str(self.folder / "report.md"), "mlflow_run": self.parent_run_id}


@task(task_run_name="report")
def write_report(context: RunContext, rows: Sequence[Evaluation], data: Mapping[str, StageResult]) -> Any:
    """Write the comparison of all rows."""
    title = f"Q-Adapter pipeline: {context.experiment.name}"
    summaries = {name: read_json(result.path / "summary.json") for name, result in data.items()}
    counts = {
        name: {**{key: summary[key] for key in _COUNTS}, "quarantined": sum(summary["quarantined"].values())}
        for name, summary in summaries.items()
    }
    inputs: dict[str, StageOutput | Path] = {}
    for row in rows:
        stages = {"training": row.training, "adaptation": row.adaptation, "retention": row.retention}
        inputs |= {f"{row.cell.name}/{name}": stage.output for name, stage in stages.items() if stage}

    def compute(out: Path, _: Path) -> None:
        from qadapter.report.build import build_report
        from qadapter.report.rows import Row

        measured = [Row(row.cell.domain, row.cell.method, row.cell.seed, metrics_of(row)) for row in rows]
        build_report(measured, title=title, data=counts, out=out)

    result = logged_stage(
        context,
        "report",
        module="qadapter.report.build",
        config={"title": title, "counts": counts},
        inputs=inputs,
        compute=compute,
    )
    folder = result.path
    context.tracker.log_folder(context.parent_run_id, folder, "report")
    context.tracker.log_metrics(context.parent_run_id, result.output.metrics())
    create_markdown_artifact(
        key=f"report-{context.experiment.name}".replace("_", "-"),
        markdown=(folder / "report.md").read_text(encoding="utf-8"),
        description=title,
    )
    create_image_artifact(
        key=f"retention-adaptation-{context.experiment.name}".replace("_", "-"),
        image_url=(folder / "retention_adaptation.png").as_uri(),
        description="retention against adaptation",
    )
    return task_result(Report(folder, context.parent_run_id), result)


def metrics_of(row: Evaluation) -> dict[str, float]:
    """Every measurement of a row, from its stages."""
    training = row.training.output.metrics() if row.training else {}
    return {**training, **row.adaptation.output.metrics(), **row.retention.output.metrics()}
