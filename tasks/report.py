"""The report stage: the comparison, in the store, in MLflow and as Prefect artifacts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prefect import task
from prefect.artifacts import create_markdown_artifact

from qadapter.files.artifacts import read_json
from qadapter.report.card_files import card_file
from tasks.curve import MeasuredCurve
from tasks.evaluate import Evaluation
from tasks.quality import QUALITY
from tasks.stages.context import RunContext
from tasks.stages.prefect_artifacts import show, show_figure, show_page
from tasks.stages.stage_run import StageResult, run_stage, task_result
from tasks.stages.store import StageOutput
from tasks.tracking.tracker import LONGEST_TAG

NOTE_TAG = "mlflow.note.content"
"""Tag of a run or an experiment that MLflow's page shows as its description."""
FIGURES = ("retention_adaptation", "training_curves")


@dataclass(frozen=True)
class Report:
    """The location of a report."""

    folder: Path
    parent_run_id: str

    def summary(self) -> dict[str, Any]:
        """The plain values that the command line prints and the flow returns."""
        return {"report": str(self.folder / "report.md"), "mlflow_run": self.parent_run_id}


@task(task_run_name="report")
def write_report(
    context: RunContext,
    rows: Sequence[Evaluation],
    data: Mapping[str, StageResult],
    quality: Mapping[str, StageResult] | None = None,
    curves: Sequence[MeasuredCurve] = (),
) -> Any:
    """Write the comparison of all rows, and of their curves where they were measured."""
    along = {curve.cell.name: curve.stage for curve in curves}
    inputs_of_curves = {f"{name}/curve": stage.output for name, stage in along.items()}
    title = f"Q-Adapter pipeline: {context.experiment.name}"
    summaries = {name: read_json(result.path / "summary.json") for name, result in data.items()}
    config = context.experiment.model_dump(mode="json", by_alias=True)
    inputs: dict[str, StageOutput | Path] = {
        f"quality/{name}": result.output for name, result in (quality or {}).items()
    }
    found = {name: read_json(result.path / QUALITY) for name, result in (quality or {}).items()}
    for row in rows:
        stages = {"training": row.training, "adaptation": row.adaptation, "retention": row.retention}
        inputs |= {f"{row.cell.name}/{name}": stage.output for name, stage in stages.items() if stage}
    inputs |= inputs_of_curves

    def compute(out: Path, _: Path) -> None:
        from qadapter.report.build import build_report
        from qadapter.report.rows import Row

        measured = [
            Row(
                row.cell.domain,
                row.cell.method,
                row.cell.seed,
                metrics_of(row),
                training=row.training.path if row.training else None,
                adaptation=row.adaptation.path,
                retention=row.retention.path,
                curve=along[row.cell.name].path if row.cell.name in along else None,
            )
            for row in rows
        ]
        build_report(measured, title=title, data=summaries, quality=found, config=config, out=out)

    result = run_stage(
        context,
        "report",
        module="qadapter.report.build",
        config={"title": title, "data": summaries, "experiment": config},
        inputs=inputs,
        compute=compute,
    )
    folder = result.path
    context.tracker.log_folder(context.parent_run_id, folder, "report")
    context.tracker.log_metrics(context.parent_run_id, result.output.metrics())
    for row in rows:
        card = card_file(folder, row.cell.domain, row.cell.method)
        if row.training is not None and card.is_file():
            context.tracker.log_file(row.training.run_id, card, "train/adapter")  # in place of PEFT's own
    context.tracker.log_tags(context.parent_run_id, {NOTE_TAG: note_of(folder / "report.md")})
    key = context.experiment.name.replace("_", "-")
    show_page(folder / "report.md", f"report-{key}", title)
    # Not a link: a browser does not follow links from Prefect's page to local files.
    show(
        create_markdown_artifact,
        key=f"report-page-{key}",
        markdown=(
            f"One page with everything: `{folder / 'report.html'}`, and in MLflow `report/report.html` of the run "
            f"`{context.parent_run_id}`."
        ),
        description=f"{title}, one page with everything",
    )
    for figure in [*FIGURES, *(["curves_of_the_dial"] if along else [])]:
        show_figure(folder / f"{figure}.png", f"{figure}-{key}".replace("_", "-"), figure.replace("_", " "))
    return task_result(Report(folder, context.parent_run_id), result)


def note_of(file: Path) -> str:
    """A report's beginning as the description of its MLflow run: what was found, and the first table.

    MLflow's page shows the first lines and folds the rest, and cannot show the figures, which lie beside the report.

    Args:
        file: `report.md` or `sweep.md`, whose sections begin with `## `.
    """
    lines = file.read_text(encoding="utf-8").split("\n")
    beginning, *sections = "\n".join(line for line in lines if not line.startswith("![")).split("\n## ")
    where = "The whole report is among this run's artifacts, under `report`."
    text = beginning.strip()
    if sections:
        title, _, section = sections[0].partition("\n")
        text = f"{text.partition(chr(10))[2].strip()}\n\n**{title}**\n{section.rstrip()}"
    room = LONGEST_TAG - len(where) - 2
    if len(text) > room:
        text = text[:room].rpartition("\n")[0]
    return f"{text}\n\n{where}"


def metrics_of(row: Evaluation) -> dict[str, float]:
    """All metrics of a row's stages and their durations in seconds, with their names in MLflow."""
    metrics: dict[str, float] = {}
    for stage in filter(None, (row.training, row.adaptation, row.retention)):
        metrics |= stage.output.metrics() | {f"cost/{stage.output.stage}_stage_seconds": stage.output.seconds}
    return metrics
