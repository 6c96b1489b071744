"""What a stage costs, estimated without running it: from its settings, its source's size and the model's."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import fmean
from typing import Any

from qadapter.config.experiment import Experiment
from qadapter.config.sources import Source
from qadapter.errors import QAdapterError
from qadapter.evaluation.benchmarks.own.items import read_own
from qadapter.evaluation.refusals import is_refusal
from qadapter.files.artifacts import read_json
from qadapter.files.folders import resolve_path
from qadapter.judging.plan import judge_of, judge_training
from qadapter.methods.method import Need, PairsPlan
from qadapter.methods.table import method_named
from qadapter.planning import estimate as planning
from qadapter.preferences import sources
from qadapter.preferences.building import Choices
from qadapter.preferences.pair import LabelledReply, Message, PreferencePair, iter_pairs, load_single
from qadapter.preferences.quality import Quality, sentences
from qadapter.preferences.reader import Rejected
from qadapter.preferences.shards import Findings
from qadapter.preferences.stream import no_usable_pair, stream_files
from qadapter.toyworld.world import ToyWorld
from tasks.stages.context import Cell

# A generated token reads all weights for few rows, which takes about twice the time of its operations.
_GENERATING = 2

SECONDS_TO_BEGIN = 15.0
"""Of a stage: imports, the base from the disk, its files' digests, MLflow."""


@dataclass(frozen=True, eq=False)
class PlannedStage:
    """A stage that would run, and the stages that feed it."""

    task: str
    name: str
    inputs: Mapping[str, Any]
    feeds_on: tuple[PlannedStage, ...]


@dataclass(frozen=True)
class SourcePlan:
    """What is known about a source before a run.

    Attributes:
        train_pairs: how many there are to train on.
        tokens_per_sequence: of prompt and reply.
        reply_tokens: of the reply.
        note: the numbers and what they rest on, in words.
        heldout: held-out pairs; None where they are not known.
    """

    train_pairs: int
    tokens_per_sequence: float
    reply_tokens: float
    note: str
    heldout: int | None = None


def plan_source(experiment: Experiment, name: str, folder: Path | None) -> SourcePlan:
    """How much a source of an experiment holds: local files are read, remote ones only asked for."""
    source = experiment.sources[name]
    longest = experiment.training.max_length
    if experiment.toy_world is not None:
        world = ToyWorld(experiment.toy_world.seed)
        pairs = len(world.harmful_requests()) if name == "harmless" else 240
        return SourcePlan(pairs, 25, 12, f"generated; about {pairs} pairs of 25 tokens a sequence (assumed)")
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
            longest / 4,
            f"{reach}; {known}; half of max_length a sequence (assumed)",
        )
    return _plan_local(source, longest, sources.locate(where, cache_dir=Path(), **_of_set(source)))


def _of_set(source: Source) -> dict[str, str | None]:
    return {"split": source.split, "config_name": source.config_name}


def _plan_local(source: Source, longest: int, files: Sequence[Path]) -> SourcePlan:
    """Read the source's files as a stream, without keeping them in memory."""
    if source.pairing == "none":
        return _plan_single(source, longest, files)
    quality, characters, rejected = Quality(is_refusal), 0.0, Counter[str]()
    pairs, replies = 0, 0.0
    options: dict[str, Any] = {"domain": source.domain, "max_chars": source.max_chars, "choices": Choices.of(source)}
    for item in stream_files(files, Findings(), **options):
        if isinstance(item, Rejected):
            rejected[item.reason.value] += 1
            continue
        pair = item.pair
        quality.add(pair)
        pairs += 1
        sequence, reply = _lengths_of_pair(pair, longest)
        characters += sequence
        replies += reply
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
        replies / pairs,
        f"{pairs:,} usable pairs on {prompts:,} prompts, {rejected.total()} quarantined; about {train:,} to "
        f"train on, {tokens:.0f} tokens a sequence" + "".join(f"\n{'':<16}{line}" for line in lines),
        heldout,
    )


def _plan_single(source: Source, longest: int, files: Sequence[Path]) -> SourcePlan:
    """As `_plan_local` for single replies, two of which a training reads where others read a pair."""
    found: list[tuple[float, float]] = []

    def add(one: LabelledReply) -> None:
        found.append(_lengths(one.prompt, len(one.reply), longest))

    options: dict[str, Any] = {"domain": source.domain, "max_chars": source.max_chars, "choices": Choices.of(source)}
    items = stream_files(files, Findings(single=add), **options)
    rejected = Counter(item.reason.value for item in items if isinstance(item, Rejected))
    if not found:
        raise no_usable_pair(files, rejected)
    sequence, reply = _means(found)
    note = f"{len(found):,} single replies, {rejected.total()} quarantined; {sequence:.0f} tokens a sequence"
    return SourcePlan(len(found) // 2, sequence, reply, note)


def _lengths_of_pair(pair: PreferencePair, longest: int) -> tuple[float, float]:
    """Tokens of prompt and a reply, and of the reply: the mean of both replies."""
    return _lengths(pair.prompt, (len(pair.chosen) + len(pair.rejected)) / 2, longest)


def _lengths(prompt: Sequence[Message], reply_characters: float, longest: int) -> tuple[float, float]:
    """Tokens of prompt and reply, and of the reply, by their characters."""
    reply = reply_characters / planning.CHARS_PER_TOKEN
    read = sum(len(turn["content"]) for turn in prompt) / planning.CHARS_PER_TOKEN
    added = planning.TURN_TOKENS * (len(prompt) + 1)
    return min(longest, read + reply + added), min(longest, reply + 1)  # and the token that ends it


def _means(lengths: Sequence[tuple[float, float]]) -> tuple[float, float]:
    sequence, reply = (fmean(column) for column in zip(*lengths, strict=True))
    return sequence, reply


def _plan_prepared(folder: Path, longest: int) -> SourcePlan:
    """What a prepared source holds: its counts, and the lengths of its first rows, which lie in a random order."""
    summary, file = read_json(folder / "summary.json"), folder / "train.jsonl"
    lengths = [_lengths_of_pair(pair, longest) for pair in islice(iter_pairs(file), _ROWS_TO_MEASURE)]
    if lengths:
        return SourcePlan(summary["train_pairs"], *_means(lengths), "", summary["heldout_pairs"])
    single = load_single(file)  # of a source with `pairing: none`
    lengths = [_lengths(one.prompt, len(one.reply), longest) for one in single[:_ROWS_TO_MEASURE]]
    return SourcePlan(len(single) // 2, *_means(lengths), "", summary["heldout_pairs"])


def estimate_of(
    experiment: Experiment,
    stage: PlannedStage,
    plans: Mapping[str, SourcePlan],
    size: planning.ModelSize,
    folder: Path | None,
) -> tuple[int, float, float, float] | None:
    """Steps, tokens, operations and GB of a stage; None if its cost is negligible."""
    training = experiment.training
    weights = planning.weights_gb(size, experiment.model)

    def trained(
        settings: Any, pairs: int, sequences: int, plan: SourcePlan, passes: float, head: bool = True
    ) -> tuple[int, float, float, float]:
        """A training's estimate: `sequences` for each example of `settings`."""
        steps = planning.steps(pairs, settings)
        each = steps * settings.batch_size * sequences
        tokens = each * min(plan.tokens_per_sequence, settings.max_length)
        scored = each * min(plan.reply_tokens, settings.max_length) if head else 0.0
        memory = planning.training_memory_gb(size, experiment.model, experiment.lora, settings)
        return steps, tokens, planning.training_flops(size, tokens, passes, scored), memory

    if stage.task == "pretrain_base" and experiment.pretraining:
        settings = experiment.pretraining
        steps = planning.steps(20_000, settings)
        tokens = steps * settings.batch_size * settings.max_length * 0.6
        return steps, tokens, planning.training_flops(size, tokens, 3), weights * 4
    if stage.task == "fine_tune_base" and experiment.helpful_sft:
        plan = plans[experiment.helpful_sft.source]
        return trained(experiment.helpful_sft, plan.train_pairs, 1, plan, 2 if experiment.helpful_sft.lora else 3)
    if isinstance(need := stage.inputs.get("need"), Need):
        plan = plans[experiment.domains[str(stage.inputs["domain"])].source]
        work = need.work(need.settings, PairsPlan(plan.train_pairs, plan.tokens_per_sequence))
        steps, tokens = work.steps, work.tokens
        if need.trains:  # a training as long as the adapters'
            training = experiment.training_of(str(stage.inputs["domain"]))
            steps = planning.steps(plan.train_pairs, training)
            tokens = steps * training.batch_size * 2 * plan.tokens_per_sequence
        memory = planning.training_memory_gb(size, experiment.model, experiment.lora, training) if steps else weights
        return steps, tokens, planning.training_flops(size, tokens, work.passes), memory
    if stage.task == "train_judge":
        domain = str(stage.inputs["domain"])
        name = experiment.domains[domain].source
        pairs = experiment.sources[name].judge_pairs
        steps, tokens, operations, memory = trained(
            judge_training(experiment, domain), pairs, 2, plans[name], 2, head=False
        )
        read = (
            2 * _heldout(experiment, name, plans) * plans[name].tokens_per_sequence
        )  # how often it agrees with people
        return steps, tokens + read, operations + planning.training_flops(size, read, 1, 0.0), memory
    cell = stage.inputs.get("cell")
    if isinstance(cell, Cell) and stage.task == "train_adapter":
        plan = plans[experiment.domains[cell.domain].source]
        passes = method_named(cell.method).passes
        return trained(experiment.training_of(cell.domain), plan.train_pairs, 2, plan, passes)
    if stage.task == "measure_base_retention":  # the base's rows reuse this measurement
        tokens, scored = _retention_reads(experiment, plans, folder)
        return 0, tokens, planning.training_flops(size, tokens, 1, scored), weights
    if stage.task in ("evaluate", "measure_curve") and isinstance(cell, Cell):
        tokens, scored = _adaptation_reads(experiment, cell.domain, plans, of_base=cell.method == "base")
        if cell.method != "base":
            more, more_scored = _retention_reads(experiment, plans, folder)
            tokens, scored = tokens + more, scored + more_scored
        if stage.task == "measure_curve":
            passes = _curve_passes(experiment)
            tokens, scored = passes * tokens, passes * scored
        return 0, tokens, planning.training_flops(size, tokens, 1, scored), weights
    return None


def _curve_passes(experiment: Experiment) -> int:
    """How many evaluations a curve is worth: one for both ends and all weights on Q, one for each other scale."""
    curve = experiment.evaluation.curve
    if curve is None or "scale" not in curve.kinds:
        return 1
    return 1 + curve.points - 2 + len(curve.values)


def _retention_reads(
    experiment: Experiment, plans: Mapping[str, SourcePlan], folder: Path | None
) -> tuple[float, float]:
    """Tokens that a retention measurement reads, and those of them that are scored or generated."""
    settings = experiment.evaluation.retention
    own = {name: len(read_own(file, name).items) for name, file in settings.own_files(folder).items()}
    longest = experiment.training.max_length
    tokens, scored = planning.retention_tokens(settings, experiment.built_benchmarks, longest, own)
    if experiment.helpful_sft is not None:
        source = experiment.helpful_sft.source
        old, heldout = plans[source], _heldout(experiment, source, plans)
        texts = min(settings.limit or heldout, heldout)  # of the divergence: two passes
        tokens += 2 * texts * old.tokens_per_sequence + _generated(settings.answers, settings.max_new_tokens, old)
        scored += 2 * texts * old.reply_tokens + _generated(settings.answers, settings.max_new_tokens, None)
    return tokens, scored


def _adaptation_reads(
    experiment: Experiment, domain: str, plans: Mapping[str, SourcePlan], of_base: bool = False
) -> tuple[float, float]:
    """Tokens that an adaptation measurement reads, and those of them that are scored or generated."""
    source = experiment.domains[domain].source
    settings, plan = experiment.evaluation.adaptation, plans[source]
    sequences = 2 * _heldout(experiment, source, plans)
    answer = settings.max_new_tokens + plan.tokens_per_sequence - plan.reply_tokens
    kind = judge_of(experiment, domain)
    # The base's answers are read by both models for the divergence, the policy's by the base for their likelihood, and
    # those of both by the judge; the base reads its own
    read = settings.generate * (1 if of_base else 3)
    judged = 2 * settings.generate if kind and kind.training and not of_base else 0
    return (
        sequences * plan.tokens_per_sequence
        + _generated(settings.generate, settings.max_new_tokens, plan)
        + (read + judged) * answer,
        sequences * plan.reply_tokens
        + _generated(settings.generate, settings.max_new_tokens, None)
        + read * settings.max_new_tokens,
    )


def _heldout(experiment: Experiment, source: str, plans: Mapping[str, SourcePlan]) -> int:
    """Held-out pairs of a source: as read, else as many as the config allows, else a tenth of the training pairs."""
    known = plans[source].heldout
    return (
        known if known is not None else experiment.sources[source].max_heldout_pairs or plans[source].train_pairs // 10
    )


def _generated(answers: int, longest: int | None, plan: SourcePlan | None) -> float:
    """Tokens of so many generated answers, with their prompts where a plan is given; a step is worth two passes."""
    from qadapter.evaluation.old_answers import LONGEST_ANSWER  # torch takes seconds to import

    each = longest or LONGEST_ANSWER
    prompt = plan.tokens_per_sequence - plan.reply_tokens if plan else 0.0
    return answers * (_GENERATING * each + prompt)


_PAIRS_OF_AN_UNREAD_SOURCE = 10_000
_ROWS_TO_MEASURE = 200


def plain(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs of a stage that the plan reads; the others are placeholders, in a run futures of its process."""
    return {name: value for name, value in inputs.items() if isinstance(value, (str, Cell, Need))}


def seconds_of(
    stages: Sequence[tuple[Experiment, str, str, Mapping[str, Any]]],
    folder: Path | None,
    prepared: Mapping[str, Path] | None = None,
) -> dict[str, float]:
    """The plan's seconds for the stages of a run, each in a process of its own.

    Of data that are not prepared yet nothing is read: a sequence then counts as half of `max_length`.

    Args:
        stages: each with its experiment, the name of its task's function, its own name and its inputs.
        folder: the data folder.
        prepared: source → folder of its prepared pairs, as far as they are there.

    Returns:
        Name → seconds; stages of negligible cost are omitted.

    Raises:
        QAdapterError: the model's size is unknown.
    """
    import torch

    machine = planning.ONE_H200 if torch.cuda.is_available() else planning.TWO_CORES
    found: dict[str, float] = {}
    sizes: dict[str, planning.ModelSize] = {}
    for experiment, task, name, inputs in stages:
        model = experiment.model.model_dump_json()
        if model not in sizes:
            sizes[model] = planning.model_size(experiment.model)
        longest = experiment.training.max_length
        plans = {}
        for key, source in experiment.sources.items():
            if prepared and key in prepared:
                plans[key] = _plan_prepared(prepared[key], longest)
            elif experiment.toy_world:
                plans[key] = plan_source(experiment, key, None)
            else:
                pairs = source.max_train_pairs or source.expected_pairs or _PAIRS_OF_AN_UNREAD_SOURCE
                plans[key] = SourcePlan(pairs, longest / 2, longest / 4, "")
        if estimate := estimate_of(experiment, PlannedStage(task, name, inputs, ()), plans, sizes[model], folder):
            found[name] = SECONDS_TO_BEGIN + estimate[2] / machine.flops
    return found
