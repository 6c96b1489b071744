"""`make plan`: everything that can be checked and estimated without running, and the stages as text.

The stages come from the flow itself (`experiment_stages`), run by a recorder in place of Prefect.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from flows.full_paper_repro import experiment_stages
from flows.running.run_request import RunRequest
from qadapter.config.experiment import Experiment
from qadapter.config.sources import Source
from qadapter.errors import QAdapterError
from qadapter.evaluation.benchmarks.own.items import read_own
from qadapter.evaluation.lm_eval.catalog import check_own
from qadapter.evaluation.old_text import unmeasured_on_old_text
from qadapter.evaluation.refusals import is_refusal
from qadapter.files.folders import resolve_path
from qadapter.judging.plan import judge_training, plan_judges
from qadapter.methods.method import Need, PairsPlan
from qadapter.methods.table import METHODS, method_named
from qadapter.planning import estimate as planning
from qadapter.planning.small import Knobs, too_small
from qadapter.preferences import sources
from qadapter.preferences.building import Choices
from qadapter.preferences.quality import Quality, sentences
from qadapter.preferences.reader import Rejected
from qadapter.preferences.shards import Findings
from qadapter.preferences.stream import no_usable_pair, stream_files
from qadapter.report.rows import listed
from qadapter.toyworld.world import ToyWorld
from tasks.stages.context import Cell

_MACHINES = (planning.TWO_CORES, planning.ONE_H200)


@dataclass(frozen=True, eq=False)
class PlannedStage:
    """A stage that would run, and the stages that feed it."""

    task: str
    name: str
    inputs: Mapping[str, Any]
    feeds_on: tuple[PlannedStage, ...]


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


@dataclass(frozen=True)
class SourcePlan:
    """What is known about a source before a run: pairs to train on, tokens per sequence, the basis, held-out pairs."""

    train_pairs: int
    tokens_per_sequence: float
    note: str
    heldout: int | None = None


def plan_text(profile: str, data: str | None, overrides: Sequence[str] | Mapping[str, Any] = ()) -> str:
    """The plan of an experiment.

    Raises:
        QAdapterError: the config or the data are invalid; a source that is only unreachable is reported in the plan.
    """
    from qadapter.config.experiment import parse_overrides

    request = RunRequest("full-paper-repro", profile, data, parse_overrides(overrides))
    experiment = request.check(remote=False)
    recorder = Recorder()
    experiment_stages(experiment, recorder)
    plans = {name: _plan_source(experiment, name, request.data_folder) for name in experiment.sources}
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
        "Judge of the answers\n" + "\n".join(f"  {line}" for line in judges),
        _assumptions(experiment),
        "Stages (each with its inputs)\n" + "\n".join(_dag(recorder.stages)),
    ]
    return "\n\n".join(sections)


def _plan_source(experiment: Experiment, name: str, folder: Path | None) -> SourcePlan:
    source = experiment.sources[name]
    longest = experiment.training.max_length
    if experiment.toy_world is not None:
        world = ToyWorld(experiment.toy_world.seed)
        pairs = len(world.harmful_requests()) if name == "harmless" else 240
        return SourcePlan(pairs, 25, f"generated; about {pairs} pairs of 25 tokens a sequence (assumed)")
    where = resolve_path(source.path, folder)
    remote = "://" in where or where.startswith("hub:")
    if remote:
        try:
            found = sources.check(where, split=source.split, revision=source.revision, config_name=source.config_name)
            reach = f"reachable ({found.kind}, {found.files} files)"
        except QAdapterError as error:
            reach = f"NOT REACHABLE now: {error}"
        pairs = source.expected_pairs or 0
        known = f"{pairs:,} pairs expected (config)" if pairs else "number of pairs unknown: set expected_pairs"
        return SourcePlan(
            max(0, pairs - source.judge_pairs),
            longest / 2,
            f"{reach}; {known}; half of max_length a sequence (assumed)",
        )
    return _plan_local(source, longest, sources.locate(where, cache_dir=Path(), **_of_set(source)))


def _of_set(source: Source) -> dict[str, str | None]:
    return {"split": source.split, "config_name": source.config_name}


def _plan_local(source: Source, longest: int, files: Sequence[Path]) -> SourcePlan:
    """Read the source's files as a stream, without keeping them in memory."""
    quality, characters, rejected = Quality(is_refusal), 0.0, Counter[str]()
    pairs = 0
    options: dict[str, Any] = {"domain": source.domain, "max_chars": source.max_chars, "choices": Choices.of(source)}
    for item in stream_files(files, Findings(), **options):
        if isinstance(item, Rejected):
            rejected[item.reason.value] += 1
            continue
        pair = item.pair
        quality.add(pair)
        pairs += 1
        length = sum(len(turn["content"]) for turn in pair.prompt) + (len(pair.chosen) + len(pair.rejected)) / 2
        characters += min(longest, length / planning.CHARS_PER_TOKEN)
    if not pairs:
        raise no_usable_pair(files, rejected)
    tokens = characters / pairs
    report = quality.report({"read": pairs + rejected.total(), "quarantined": rejected})
    prompts = report["prompts"]
    held_out = source.heldout if source.heldout < 1 else source.heldout / prompts
    elsewhere = source.heldout_path or source.heldout_split
    heldout = None if elsewhere else min(round(pairs * held_out), source.max_heldout_pairs or pairs)
    left = int(pairs * (1 - held_out)) - source.judge_pairs
    train = min(left, source.max_train_pairs or left)
    lines = [*sentences(report), *(f"WARNING: {line}" for line in report["warnings"])]
    return SourcePlan(
        train,
        tokens,
        f"{pairs:,} usable pairs on {prompts:,} prompts, {rejected.total()} quarantined; about {train:,} to "
        f"train on, {tokens:.0f} tokens a sequence" + "".join(f"\n{'':<16}{line}" for line in lines),
        heldout,
    )


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
        estimate = _estimate(experiment, stage, plans, size, folder)
        if estimate:
            groups.setdefault((stage.task, _kind(stage)), []).append(estimate)
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


def _kind(stage: PlannedStage) -> str:
    cell = stage.inputs.get("cell")
    if isinstance(cell, Cell):
        return f"{stage.task.split('_')[0]} {cell.method}"
    need = stage.inputs.get("need")
    return need.name if isinstance(need, Need) else stage.task


def _estimate(
    experiment: Experiment,
    stage: PlannedStage,
    plans: Mapping[str, SourcePlan],
    size: planning.ModelSize,
    folder: Path | None,
) -> tuple[int, float, float, float] | None:
    """Steps, tokens, operations and GB of a stage; None if its cost is negligible."""
    training = experiment.training
    weights = planning.weights_gb(size, experiment.model)
    if stage.task == "pretrain_base" and experiment.pretraining:
        settings = experiment.pretraining
        steps = planning.steps(20_000, settings)
        tokens = steps * settings.batch_size * settings.max_length * 0.6
        return steps, tokens, planning.training_flops(size, tokens, 3), weights * 4
    if stage.task == "fine_tune_base" and experiment.helpful_sft:
        plan = plans[experiment.helpful_sft.source]
        steps = planning.steps(plan.train_pairs, experiment.helpful_sft)
        tokens = steps * experiment.helpful_sft.batch_size * plan.tokens_per_sequence
        memory = planning.training_memory_gb(size, experiment.model, experiment.lora, experiment.helpful_sft)
        return steps, tokens, planning.training_flops(size, tokens, 2 if experiment.helpful_sft.lora else 3), memory
    if isinstance(need := stage.inputs.get("need"), Need):
        plan = plans[experiment.domains[str(stage.inputs["domain"])].source]
        work = need.work(need.settings, PairsPlan(plan.train_pairs, plan.tokens_per_sequence))
        memory = (
            planning.training_memory_gb(size, experiment.model, experiment.lora, training) if work.steps else weights
        )
        return work.steps, work.tokens, planning.training_flops(size, work.tokens, work.passes), memory
    if stage.task == "train_judge":
        domain = str(stage.inputs["domain"])
        name = experiment.domains[domain].source
        reward = judge_training(experiment, domain)
        steps = planning.steps(experiment.sources[name].judge_pairs, reward)
        tokens = steps * reward.batch_size * 2 * min(plans[name].tokens_per_sequence, reward.max_length)
        memory = planning.training_memory_gb(size, experiment.model, experiment.lora, reward)
        return steps, tokens, planning.training_flops(size, tokens, 2), memory
    cell = stage.inputs.get("cell")
    if isinstance(cell, Cell) and stage.task == "train_adapter":
        plan = plans[experiment.domains[cell.domain].source]
        training = experiment.training_of(cell.domain)
        steps = planning.steps(plan.train_pairs, training)
        tokens = steps * training.batch_size * 2 * plan.tokens_per_sequence
        passes = method_named(cell.method).passes
        memory = planning.training_memory_gb(size, experiment.model, experiment.lora, training)
        return steps, tokens, planning.training_flops(size, tokens, passes), memory
    measures = stage.task == "measure_base_retention"  # the base's rows reuse this measurement
    if measures or (stage.task == "evaluate" and isinstance(cell, Cell) and cell.method != "base"):
        retention = experiment.evaluation.retention
        own = [len(read_own(file, name).items) for name, file in retention.own_files(folder).items()]
        items = planning.benchmark_items(retention.tasks, retention.limit, own)
        tokens = items * training.max_length
        return 0, tokens, planning.training_flops(size, tokens, 1), weights
    return None


def _small(experiment: Experiment, plans: Mapping[str, SourcePlan]) -> list[str]:
    """What is too small to show anything, for each domain whose number of pairs is known."""
    lines = []
    for name, domain in experiment.domains.items():
        plan, training = plans[domain.source], experiment.training_of(name)
        if not plan.train_pairs:
            continue
        longer = "training.max_steps={}" if training.max_steps else "training.epochs={}"
        where = f"sources.{domain.source}.heldout"
        knobs = Knobs(longer, "training.batch_size", where + "={}", f"{where}_path")
        steps = planning.steps(plan.train_pairs, training)
        lines += [
            f"  WARNING: {name}: {sentence}"
            for sentence in too_small(
                knobs, pairs=plan.train_pairs, steps=steps, batch_size=training.batch_size, heldout=plan.heldout
            )
        ]
    return ["Too small to show anything\n" + "\n".join(lines)] if lines else []


def _own_benchmarks(experiment: Experiment, folder: Path | None) -> list[str]:
    lines = check_own(experiment.evaluation.retention.own_files(folder))
    return ["Own benchmarks\n" + "\n".join(f"  {line}" for line in lines)] if lines else []


def _assumptions(experiment: Experiment) -> str:
    return "Assumptions\n  " + "\n  ".join(
        [
            f"a token is {planning.CHARS_PER_TOKEN:g} characters of text; a longer sequence counts as max_length",
            "2 operations per parameter and token for each pass: forward 1, backward 1 through activations, 1 through",
            "  weights;",
            f"  {_passes(experiment)}pre-training 3",
            *(f"{machine.name} reaches {machine.flops / 1e12:,.2f} TFLOP/s" for machine in _MACHINES),
            "an lm-eval item reads max_length tokens; a task of unknown size has "
            f"{planning.ITEMS_OF_OTHER_TASKS:,} of them, or `limit`; answers to held-out prompts are not counted",
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
