"""Stages that only a sweep has: changing α0 after training, and the table of all settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect import task

from qadapter.config.sweep import Variant
from qadapter.methods.table import knobs
from tasks.curve import MeasuredCurve, measure_curve
from tasks.evaluate import Evaluation, evaluate
from tasks.report import NOTE_TAG, Report, metrics_of, note_of
from tasks.stages.context import Cell, RunContext
from tasks.stages.prefect_artifacts import show_figure, show_page
from tasks.stages.stage_run import StageResult, run_stage, task_result
from tasks.stages.store import StageOutput
from tasks.train import log_adapter, train_adapter

if TYPE_CHECKING:
    from qadapter.report.rows import Row


@dataclass(frozen=True)
class SweptCell(Cell):
    """A cell with one setting of a sweep."""

    variant: str = ""
    groups: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The run's name: `academy · dpo β=1 · seed 1`."""
        return f"{self.domain} · {self.variant} · seed {self.seed}"

    def tags(self) -> dict[str, str]:
        """MLflow tags; `tags.variant = 'dpo β=1'` finds the runs of one setting."""
        return {**super().tags(), "variant": self.variant, "groups": ", ".join(self.groups)}


def cell_of(variant: Variant, domain: str, seed: int) -> SweptCell:
    """A variant's cell in a domain with a seed."""
    return SweptCell(domain, variant.method, seed, variant.name, variant.groups)


train_variant = train_adapter.with_options(task_run_name="train-{cell.domain}-{cell.variant}-{cell.seed}")
measure_variant = measure_curve.with_options(task_run_name="curve-{cell.domain}-{cell.variant}-{cell.seed}")
evaluate_variant = evaluate.with_options(task_run_name="evaluate-{cell.domain}-{cell.variant}-{cell.seed}")


@task(task_run_name="dial-{cell.domain}-{cell.variant}-{cell.seed}")
def move_dial(context: RunContext, cell: SweptCell, trained: StageResult, alpha_0: float) -> Any:
    """The same trained adapter with another α0; its MLflow run later holds the evaluation."""

    def compute(out: Path, _: Path) -> None:
        from qadapter.policy.files import copy_turned

        copy_turned(trained.path / "adapter", out / "adapter", alpha_0=alpha_0)

    result = run_stage(
        context,
        "dial",
        run_name=cell.name,
        tags=cell.tags(),
        module="qadapter.policy.files",
        config={"alpha_0": alpha_0},
        params={"domain": cell.domain},
        inputs={"adapter": trained.output},
        compute=compute,
        log=lambda run_id, output: log_adapter(context, run_id, cell, output, {"alpha_0": alpha_0}),
    )
    return task_result(result, result)


@task(task_run_name="sweep-report")
def write_sweep(
    context: RunContext,
    name: str,
    variants: Sequence[Variant],
    rows: Sequence[Evaluation],
    expected: int,
    curves: Sequence[MeasuredCurve] = (),
    confirm_seeds: Sequence[int] = (),
) -> Any:
    """Write the table and the figure of all settings.

    Args:
        context: the flow run's context.
        name: the sweep's name.
        variants: the planned variants.
        rows: the measured rows: those of the bases, and one per variant, domain and seed.
        expected: number of cells of a complete variant.
        curves: of trained variants, where they were measured: they are compared at equal forgetting budgets.
        confirm_seeds: those of the rows with which only chosen variants were trained.
    """
    along = {curve.cell.name: curve.stage for curve in curves}
    title = f"Sweep: {name}"
    inputs: dict[str, StageOutput | Path] = {}
    for row in rows:
        stages = {"training": row.training, "adaptation": row.adaptation, "retention": row.retention}
        inputs |= {f"{row.cell.name}/{stage}": found.output for stage, found in stages.items() if found}
    inputs |= {f"{name}/curve": stage.output for name, stage in along.items()}
    described = _described(variants, rows)

    def compute(out: Path, _: Path) -> None:
        from qadapter.report.sweep.build import build_sweep_report
        from qadapter.report.sweep.points import Setting

        build_sweep_report(
            _measured(rows, {name: stage.path for name, stage in along.items()}),
            [Setting(**entry) for entry in described],
            expected=expected,
            title=title,
            out=out,
            confirm_seeds=confirm_seeds,
        )

    result = run_stage(
        context,
        "sweep-report",
        module="qadapter.report.sweep.build",
        config={"title": title, "variants": described, "expected": expected, "confirm_seeds": list(confirm_seeds)},
        params={},
        inputs=inputs,
        compute=compute,
    )
    folder = result.path
    context.tracker.log_folder(context.parent_run_id, folder, "report")
    context.tracker.log_metrics(context.parent_run_id, result.output.metrics())
    context.tracker.log_tags(context.parent_run_id, {NOTE_TAG: note_of(folder / "sweep.md")})
    key = f"sweep-{name}".replace("_", "-")
    show_page(folder / "sweep.md", key, title)
    show_figure(folder / "sweep.png", f"{key}-figure", "retention against adaptation")
    return task_result(Report(folder, context.parent_run_id), result)


def chosen_variants(variants: Sequence[Variant], rows: Sequence[Evaluation], expected: int) -> list[Variant]:
    """The variant of each tuned method that is best on the half of the held-out items that chooses.

    Args:
        variants, rows, expected: see `write_sweep`.
    """
    from qadapter.report.sweep.halves import chosen_on_a_half
    from qadapter.report.sweep.points import Setting

    settings = [Setting(**entry) for entry in _described(variants, rows)]
    chosen = {point.setting.name for point in chosen_on_a_half(_measured(rows, {}), settings, expected).values()}
    return [variant for variant in variants if variant.name in chosen]


def _measured(rows: Sequence[Evaluation], curves: Mapping[str, Path]) -> list[Row]:
    """The report's rows; `curves`: the folders of the curves, by the name of the cell."""
    from qadapter.report.rows import Row

    return [
        Row(
            row.cell.domain,
            getattr(row.cell, "variant", "base"),
            row.cell.seed,
            metrics_of(row),
            adaptation=row.adaptation.path,
            retention=row.retention.path,
            curve=curves.get(row.cell.name),
        )
        for row in rows
    ]


def _described(variants: Sequence[Variant], rows: Sequence[Evaluation]) -> list[dict[str, Any]]:
    """The fields of each variant's `Setting`."""
    return [
        {
            "name": variant.name,
            "family": variant.family,
            "method": variant.method,
            "groups": list(variant.groups),
            "tuning": variant.tuning,
            "settings": _settings(variant, rows),
            "trained_as": variant.trained_as,
        }
        for variant in variants
    ]


def _settings(variant: Variant, rows: Sequence[Evaluation]) -> dict[str, float]:
    """A variant's settings: those that its training recorded (with the preset filled in), else those of the config."""
    given: Mapping[str, Any] = variant.experiment.methods.of(variant.method).model_dump(exclude_none=True)
    found: dict[str, Any] = {"learning_rate": variant.experiment.training.learning_rate, **given}
    for row in rows:
        if row.training and getattr(row.cell, "variant", None) == variant.trained_as:
            found |= dict(row.training.output.params().get("objective", {}))
            break
    if variant.alpha_0 is not None:
        found["alpha_0"] = variant.alpha_0
    return {knob.name: float(found[knob.name]) for knob in knobs().values() if knob.label and knob.name in found}
