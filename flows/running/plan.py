"""`make plan`: everything that can be checked and estimated without running, and the stages as text.

The stages come from the flow itself (`experiment_stages`), run by a recorder in place of Prefect.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from pathlib import Path
from typing import Any

from flows.full_paper_repro import experiment_stages
from flows.running.left import kind_of
from flows.running.run_request import RunRequest
from flows.running.stage_costs import SECONDS_TO_BEGIN, PlannedStage, SourcePlan, estimate_of, plan_source
from qadapter.config.experiment import Experiment
from qadapter.evaluation.lm_eval.catalog import check_own
from qadapter.evaluation.old_text import unmeasured_on_old_text
from qadapter.judging.plan import plan_judges
from qadapter.methods.table import METHODS
from qadapter.planning import estimate as planning
from qadapter.planning.machine import measured_flops
from qadapter.planning.small import small_domains
from qadapter.report.rows import listed

_WORTH_MEASURING = 5e7  # parameters; smaller models' time goes into other things than products

_MACHINES = (planning.TWO_CORES, planning.ONE_H200)


@dataclass
class Recorder:
    """Replaces Prefect: records each stage in the order of submission."""

    stages: list[PlannedStage] = field(default_factory=list)

    def __call__(self, task: Any, **inputs: Any) -> PlannedStage:
        """Record a stage, and return it as the placeholder of its result."""
        named = task.task_run_name.format(**inputs)
        stage = PlannedStage(task.fn.__name__, named, inputs, tuple(dict.fromkeys(_stages_in(inputs.values()))))
        self.stages.append(stage)
        return stage


def _stages_in(values: Iterable[Any]) -> Iterable[PlannedStage]:
    for value in values:
        if isinstance(value, PlannedStage):
            yield value
        elif isinstance(value, Mapping):
            yield from _stages_in(value.values())
        elif isinstance(value, list | tuple):
            yield from _stages_in(value)


def plan_text(profile: str, data: str | None, overrides: Sequence[str] | Mapping[str, Any] = ()) -> str:
    """The plan of an experiment.

    Raises:
        QAdapterError: the config or the data are invalid; a source that is only unreachable is reported in the plan.
    """
    from qadapter.config.reading import parse_overrides

    request = RunRequest("full-paper-repro", profile, data, parse_overrides(overrides))
    experiment = request.check(remote=False)
    recorder = Recorder()
    experiment_stages(experiment, recorder)
    plans = {name: plan_source(experiment, name, request.data_folder) for name in experiment.sources}
    size = planning.model_size(experiment.model)
    model = experiment.model
    held = model.quantization if model.quantization != "none" else model.dtype
    judges = plan_judges(experiment, request.rows_to_judge(experiment))
    sections = [
        f"Plan of {experiment.name}: the config is valid, {len(recorder.stages)} stages.",
        "Data\n" + "\n".join(f"  {name:<14}{plan.note}" for name, plan in plans.items()),
        *(f"Old text\n  {sentence}" for sentence in unmeasured_on_old_text(experiment.model_dump())),
        f"Model\n  {size.parameters / 1e6:,.1f} M parameters ({size.assumption}), "
        f"held as {held}; "
        f"adapter of {planning.adapter_parameters(size, experiment.lora) / 1e6:,.2f} M",
        *_small(experiment, plans),
        *_own_benchmarks(experiment, request.data_folder),
        _costs(experiment, recorder.stages, plans, size, request.data_folder),
        *_on_this_machine(experiment, recorder.stages, plans, size, request.data_folder),
        "Judge of the answers\n" + "\n".join(f"  {line}" for line in judges),
        _assumptions(experiment),
        "Stages (each with its inputs)\n" + "\n".join(_dag(recorder.stages)),
    ]
    return "\n\n".join(sections)


def _small(experiment: Experiment, plans: Mapping[str, SourcePlan]) -> list[str]:
    """What is too small to show anything, for each domain whose number of pairs is known."""
    found = small_domains(experiment, {name: (plan.train_pairs, plan.heldout) for name, plan in plans.items()})
    return ["Too small to show anything\n" + "\n".join(f"  WARNING: {line}" for line in found)] if found else []


def _own_benchmarks(experiment: Experiment, folder: Path | None) -> list[str]:
    lines = check_own(experiment.evaluation.retention.own_files(folder))
    return ["Own benchmarks\n" + "\n".join(f"  {line}" for line in lines)] if lines else []


def _costs(
    experiment: Experiment,
    stages: Sequence[PlannedStage],
    plans: Mapping[str, SourcePlan],
    size: planning.ModelSize,
    folder: Path | None,
) -> str:
    """One line per kind of computing stage: number of runs, steps, tokens, memory, hours on each machine."""
    header = f"  {'stage':<22}{'runs':>5}{'steps':>10}{'tokens':>16}{'memory GB':>11}" + "".join(
        f"{'h on ' + machine.name:>19}" for machine in _MACHINES
    )
    lines, total = [header], dict.fromkeys(_MACHINES, 0.0)
    groups: dict[tuple[str, str], list[tuple[int, float, float, float]]] = {}
    for stage in stages:
        estimate = estimate_of(experiment, stage, plans, size, folder)
        if estimate:
            groups.setdefault((stage.task, kind_of(stage.task, stage.inputs)), []).append(estimate)
    for (_, kind), estimates in groups.items():
        steps = [str(count) for count in sorted({estimate[0] for estimate in estimates}) if count]
        tokens, memory = sum(estimate[1] for estimate in estimates), max(estimate[3] for estimate in estimates)
        hours = {machine: sum(e[2] for e in estimates) / machine.flops / 3600 for machine in _MACHINES}
        for machine in _MACHINES:
            total[machine] += hours[machine]
        lines.append(
            f"  {kind:<22}{len(estimates):>5}{'/'.join(steps) or '–':>10}{tokens:>16,.0f}{memory:>11.2f}"
            + "".join(f"{hours[machine]:>19.3f}" for machine in _MACHINES)
        )
    lines.append(
        f"  {'all':<22}{len(stages):>5}{'':>37}" + "".join(f"{total[machine]:>19.3f}" for machine in _MACHINES)
    )
    return "Cost (steps and memory of one run; tokens and hours of all runs)\n" + "\n".join(lines)


def _on_this_machine(
    experiment: Experiment,
    stages: Sequence[PlannedStage],
    plans: Mapping[str, SourcePlan],
    size: planning.ModelSize,
    folder: Path | None,
) -> list[str]:
    """The time of all stages on this machine's cores, whose rate is measured, if they can hold the model."""
    if size.parameters < _WORTH_MEASURING or planning.weights_gb(size, experiment.model) > 16:
        return []
    rate = measured_flops(
        size.hidden_size, experiment.parallel, experiment.threads_per_stage, experiment.model.matmul_precision
    )
    seconds = {}
    for stage in stages:
        if found := estimate_of(experiment, stage, plans, size, folder):
            seconds[stage] = SECONDS_TO_BEGIN + found[2] / (rate / experiment.parallel)
    hours = makespan(stages, seconds, experiment.parallel) / 3600
    return [
        f"This machine\n  {hours:.1f} h on its cores (parallel {experiment.parallel}, threads "
        f"{experiment.threads_per_stage}: {rate / 1e9:,.0f} GFLOP/s together, measured now)"
    ]


def makespan(stages: Sequence[PlannedStage], seconds: Mapping[PlannedStage, float], parallel: int) -> float:
    """Seconds from the first stage's start to the last one's end.

    Args:
        stages: in the order of submission.
        seconds: of each; those that are left out take no time.
        parallel: how many run side by side. Whichever has the results of all that it feeds on may start; the first
            submitted goes first.
    """
    clock, waiting, ended = 0.0, list(stages), set[PlannedStage]()
    place = {stage: number for number, stage in enumerate(stages)}
    running: list[tuple[float, int, PlannedStage]] = []
    while waiting or running:
        ready = [stage for stage in waiting if ended.issuperset(stage.feeds_on)][: parallel - len(running)]
        for stage in ready:
            waiting.remove(stage)
            heappush(running, (clock + seconds.get(stage, 0.0), place[stage], stage))
        clock, _, done = heappop(running)
        ended.add(done)
    return clock


def _assumptions(experiment: Experiment) -> str:
    return "Assumptions\n  " + "\n  ".join(
        [
            f"a token is {planning.CHARS_PER_TOKEN:g} characters of text, and a template adds {planning.TURN_TOKENS:g} "
            "to each turn; a longer sequence counts as max_length",
            "2 operations per parameter and token for each pass: forward 1, backward 1 through activations, 1 through",
            "  weights;",
            f"  {_passes(experiment)}pre-training 3",
            *(f"{machine.name}: {machine.flops / 1e12:,.2f} TFLOP/s" for machine in _MACHINES),
            "the head works on scored tokens only (replies, choices); a generated token counts twice;",
            "an item of an unknown lm-eval task reads max_length tokens, and there are "
            f"{planning.ITEMS_OF_OTHER_TASKS:,} of them, or `limit`",
            f"micro-batch {experiment.training.micro_batch} pairs, optimiser AdamW on the adapter only, in float32",
        ]
    )


def _passes(experiment: Experiment) -> str:
    """Passes per token of the methods that run: `q-adapter and dpo 3, sft and replay 2, `."""
    by_passes: dict[float, list[str]] = {}
    for method in METHODS:
        if method.name in experiment.methods.run:
            by_passes.setdefault(method.passes, []).append(method.name)
    return "".join(f"{listed(names)} {passes:g}, " for passes, names in by_passes.items())


def _dag(stages: Sequence[PlannedStage]) -> list[str]:
    lines = []
    for stage in stages:
        names = [other.name for other in stage.feeds_on]
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        lines.append(f"  {stage.name:<38}" + (f"← {shown}" if names else ""))
    return lines
