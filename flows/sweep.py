"""A sweep: every setting of every method on the same base and data, and one table and figure of all.

qadapter sweep --sweep smoke
prefect deployment run sweep/smoke
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Protocol

from prefect import flow
from prefect.logging import get_run_logger

from flows.full_paper_repro import Run, common_stages, curve_inputs, measured_bases, needed_stages
from flows.running.prefect_run import PrefectRun, StagesFailedError, checked_run
from flows.running.run_request import RunRequest
from qadapter.config.experiment import Experiment
from qadapter.config.sweep import Sweep, Variant, expand, load_sweep, merged_overrides
from qadapter.errors import QAdapterError
from qadapter.judging.plan import plan_judges
from qadapter.methods.method import Need
from qadapter.planning.preflight import require_accuracy
from qadapter.report.rows import listed
from tasks.curve import MeasuredCurve
from tasks.sweep import (
    cell_of,
    chosen_variants,
    evaluate_variant,
    measure_variant,
    move_dial,
    train_variant,
    write_sweep,
)


class RunOfMany(Run, Protocol):
    """Runs stages whose settings differ."""

    def of(self, experiment: Experiment) -> Run:
        """The same run with another experiment's settings."""


@dataclass(frozen=True)
class _SweepRequest(RunRequest):
    """A run of a sweep: the answers of every setting are judged, not those of every method."""

    sweep: Sweep | None = None

    def rows_to_judge(self, experiment: Experiment) -> int:
        assert self.sweep is not None
        variants = expand(self.sweep, experiment)
        confirming = len({variant.method for variant in variants if variant.tuning}) * len(self.sweep.confirm_seeds)
        return len(experiment.domains) * (len(variants) * len(experiment.seeds) + confirming)


@dataclass(frozen=True)
class CheckedSweep:
    """A sweep that passed all checks."""

    sweep: Sweep
    request: RunRequest
    experiment: Experiment
    variants: list[Variant]

    @property
    def cells(self) -> int:
        """How often a complete setting is trained: domains × seeds."""
        return len(self.experiment.seeds) * len(self.experiment.domains)

    def judges(self) -> list[str]:
        """Lines on the judges of all settings' answers and their cost."""
        return plan_judges(self.experiment, self.request.rows_to_judge(self.experiment))


def check_sweep(
    sweep: str, profile: str | None, data: str | None, overrides: dict[str, Any], *, remote: bool = True
) -> CheckedSweep:
    """Read a sweep and its profile and refuse what cannot work.

    Args:
        sweep: a name in `configs/sweep/`, or a YAML file.
        profile: replaces the sweep's own profile.
        data: the data folder.
        overrides: settings to change for all.
        remote: also check sources on the network.

    Raises:
        QAdapterError: the sweep is invalid; the message says what to correct.
    """
    loaded = load_sweep(sweep)
    used = profile or loaded.profile
    request = _SweepRequest("sweep", used, data, merged_overrides(loaded, used, overrides), loaded)
    experiment = request.check(remote=remote)
    require_accuracy(experiment, "a sweep compares adaptation with the retained share of an accuracy")
    if loaded.confirm_seeds and experiment.toy_world:
        raise QAdapterError(
            f"sweep {loaded.name}: confirm_seeds train what one half of the held-out items chooses, and a toy world's "
            "policies are scored by its rule, without halves. Leave confirm_seeds out, or name all seeds in seeds."
        )
    if repeated := sorted(set(loaded.confirm_seeds) & set(experiment.seeds)):
        raise QAdapterError(f"sweep {loaded.name}: {repeated} are among seeds and confirm_seeds; keep each in one")
    return CheckedSweep(loaded, request, experiment, expand(loaded, experiment))


@dataclass(frozen=True)
class SweptDomain:
    """A domain whose base was measured.

    Attributes:
        name: of the domain.
        shared: the inputs that its evaluations share.
        base_row: the base's.
        made: what methods need, once made.
    """

    name: str
    shared: dict[str, Any]
    base_row: Any
    made: dict[Need, Any] = field(default_factory=dict)

    def train(self, variant: Variant, seed: int, run: Run) -> Any:
        """Train a variant; returns the adapter's placeholder."""
        inputs = {"base": self.shared["base"], "data": self.shared["data"]}
        needs = needed_stages(variant.experiment, run, variant.method, self.made, domain=self.name, **inputs)
        return run(train_variant, cell=cell_of(variant, self.name, seed), needs=needs, **inputs)

    def evaluate(self, variant: Variant, seed: int, adapter: Any, run: Run) -> Any:
        """Measure a variant; returns the row's placeholder."""
        cell = cell_of(variant, self.name, seed)
        return run(evaluate_variant, cell=cell, trained=adapter, base_row=self.base_row, **self.shared)


def swept_domains(experiment: Experiment, run: RunOfMany) -> list[SweptDomain]:
    """Run the stages that all settings share."""
    common = common_stages(experiment, run)
    return [SweptDomain(*found) for found in measured_bases(experiment, run, common)]


def sweep_stages(
    experiment: Experiment, domains: Sequence[SweptDomain], variants: Sequence[Variant], run: RunOfMany
) -> list[Any]:
    """Train and measure every setting; returns the placeholders of the table's rows and of the curves."""
    rows = []
    for domain in domains:
        rows.append(domain.base_row)
        trained: dict[tuple[str, int], Any] = {}
        for variant, seed in product(variants, experiment.seeds):
            run_variant, cell = run.of(variant.experiment), cell_of(variant, domain.name, seed)
            if variant.alpha_0 is not None:
                adapter = run_variant(
                    move_dial, cell=cell, trained=trained[variant.trained_as, seed], alpha_0=variant.alpha_0
                )
            else:
                adapter = trained[variant.name, seed] = domain.train(variant, seed, run_variant)
            row = domain.evaluate(variant, seed, adapter, run_variant)
            rows.append(row)
            if experiment.evaluation.curve and variant.alpha_0 is None:  # another α0 is a point of the same curve
                of_curve = curve_inputs(domain.shared)
                rows.append(run_variant(measure_variant, cell=cell, row=row, base_row=domain.base_row, **of_curve))
    return rows


def confirming_stages(
    domains: Sequence[SweptDomain], chosen: Sequence[Variant], seeds: Sequence[int], run: RunOfMany
) -> list[Any]:
    """Train and measure the chosen settings with further seeds; returns the placeholders of their rows."""
    rows = []
    for domain, variant, seed in product(domains, chosen, seeds):
        run_variant = run.of(variant.experiment)
        rows.append(domain.evaluate(variant, seed, domain.train(variant, seed, run_variant), run_variant))
    return rows


@flow(name="sweep")
def sweep(
    sweep: str = "smoke",
    profile: str | None = None,
    data: str | None = None,
    overrides: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Compare many settings of every method: one table, one figure, the Pareto front, the best setting.

    Args:
        sweep: smoke (toy world), mini (real rows from `data`), or a YAML file.
        profile: another one than the sweep's own.
        data: folder with the data, where the profile's paths say `{data}`.
        overrides: settings to change for all, for example {"seeds": [0]}.
    """
    checked = check_sweep(sweep, profile, data, overrides or {})
    get_run_logger().info("judge of the answers: %s", "; ".join(checked.judges()))
    with checked_run(checked.request) as run:
        domains = swept_domains(checked.experiment, run)
        rows = sweep_stages(checked.experiment, domains, checked.variants, run)
        failed = run.settle()
        if checked.sweep.confirm_seeds and not failed:
            evaluations = [row for row in run.finished(rows) if not isinstance(row, MeasuredCurve)]
            chosen = chosen_variants(checked.variants, evaluations, checked.cells)
            get_run_logger().info("chosen, and trained with further seeds: %s", listed([v.name for v in chosen]))
            rows += confirming_stages(domains, chosen, checked.sweep.confirm_seeds, run)
        return _report(checked, rows, run)


def _report(checked: CheckedSweep, rows: Sequence[Any], run: PrefectRun) -> dict[str, Any]:
    """Write the table of all measured settings, even if some stages failed.

    Raises:
        StagesFailedError: a stage failed. The message lists the failures and, if there is one, the table's path.
    """
    failed = run.settle()
    measured = run.finished(rows)
    if failed and not any(row.cell.method == "base" for row in measured):
        raise failed
    curves = [found for found in measured if isinstance(found, MeasuredCurve)]
    evaluations = [found for found in measured if not isinstance(found, MeasuredCurve)]
    report = run(
        write_sweep,
        name=checked.sweep.name,
        variants=checked.variants,
        rows=evaluations,
        expected=checked.cells,
        curves=curves,
        confirm_seeds=checked.sweep.confirm_seeds,
    )
    failed = run.settle()
    written = run.finished([report])
    if failed and written:
        raise StagesFailedError(f"{failed}\nThe settings that were measured: {written[0].folder / 'sweep.md'}")
    if failed:
        raise failed
    folder = written[0].folder
    return {"report": str(folder / "sweep.md"), "mlflow_run": written[0].parent_run_id}
