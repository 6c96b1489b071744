"""The two halves of an evaluation, each as files: what a policy learnt, and what it kept of its base."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from qadapter.config.evaluation import AdaptationSettings, RetentionSettings
from qadapter.config.model import ModelSettings
from qadapter.errors import QAdapterError
from qadapter.evaluation.divergence import kl_per_token, replies_entropy
from qadapter.evaluation.drift import DRIFT, REWORDED, drift_metrics, trait_rows
from qadapter.evaluation.hearing import heard
from qadapter.evaluation.items import items_digests, known_by
from qadapter.evaluation.lm_eval.catalog import expand_suites, require_scores
from qadapter.evaluation.lm_eval.harness import evaluate_tasks
from qadapter.evaluation.old_answers import answer_metrics, answer_old_prompts
from qadapter.evaluation.preference import PairScores, askable_pairs, preference_metrics, score_pairs
from qadapter.evaluation.rewording import reworded, reworded_rows
from qadapter.evaluation.speech import SPEECH, Speech
from qadapter.files.artifacts import read_json, read_json_lines, write_json, write_json_lines
from qadapter.inference.generate import decoding_speed, generate_with_ends
from qadapter.policy.loading import load_base, load_policy
from qadapter.preferences.pair import Message, PreferencePair, load_pairs
from qadapter.progress.kept import keeping, leads
from qadapter.toyworld.rules import exact_measures
from qadapter.toyworld.world import ToyWorld

Compare = Callable[
    [Sequence[Sequence[Message]], Sequence[str], Sequence[str]], tuple[list[dict[str, Any]], dict[str, float]]
]
"""Prompts, the base's answers and the policy's → rows {prompt, base, reply, verdict, judge}, and metrics."""
_SPEED_TOKENS = 16  # of which the decoding speed is taken: a few seconds of an evaluation that takes minutes


def measure_adaptation(
    base: str | Path,
    adapter: Path | None,
    heldout_file: Path,
    base_adaptation: Path | None,
    *,
    model: ModelSettings,
    settings: AdaptationSettings,
    max_length: int,
    world: Path | None,
    style: str | None,
    compare: Compare,
    out: Path,
    scratch: Path | None = None,
) -> None:
    """Score held-out pairs and answer held-out prompts.

    Args:
        base: folder or hub id of the base model.
        adapter: the adapter's folder, None for the base itself.
        heldout_file: prepared pairs.
        base_adaptation: folder this function wrote for the base: implied rewards are relative to its log-probs, and
            verdicts to its answers. None where `adapter` is.
        model, settings: of the experiment.
        max_length: tokens, as in training.
        world: folder of the toy world the data is from, None for real data.
        style: the domain's style in the toy world, None for harmless.
        compare: compares the policy's answers with the base's (`qadapter.judging.verdicts.comparison`).
        out: gets `metrics.json` (`adaptation/…`, `cost/…`), `pairs.jsonl` (per pair: log-probs, and which prompt),
            `answers.jsonl` (prompt, the base's reply, reply, verdict, judge; as `compare` gives them) and
            `speech.jsonl` (per reply: whether it ended, its likelihood under the base, why it is broken).
        scratch: keeps log-probs and answers: a killed measurement goes on, and several processes share its batches; the
            first one compares and writes. None keeps nothing.

    `adaptation/score` is the headline: the exact rule where there is one, else the share of pairs whose implied reward
    (the log-ratio to the base) prefers the chosen reply; a tie counts one half, so the base has 0.5.
    """
    network, tokenizer = load_base(base, model)
    pairs = load_pairs(heldout_file)
    policy = load_policy(network, adapter)
    asked = askable_pairs(tokenizer, pairs, None if world else settings.generate)
    with keeping(scratch):
        scores = score_pairs(policy, tokenizer, pairs, max_length=max_length, batch_size=settings.batch_size)
        said = _answer(policy, tokenizer, asked, base_adaptation, settings, max_length) if asked else None
        distance = _new_divergence(policy, tokenizer, asked, base_adaptation, settings, max_length)
        if not leads():
            return
    base_scores = _read_scores(base_adaptation / "pairs.jsonl") if base_adaptation else scores
    metrics = {f"adaptation/{name}": value for name, value in preference_metrics(scores, base_scores).items()}
    if said is not None:
        if not math.isnan(distance):
            metrics["adaptation/kl_per_token"] = distance
        if said.tokens_per_second is not None:
            metrics["cost/decoding_tokens_per_second"] = said.tokens_per_second
        if world is not None:
            metrics |= exact_measures(ToyWorld.read(world), style, said.prompts, said.replies)
        before = _read_replies(base_adaptation)[0] if base_adaptation else said.replies
        with keeping(scratch / "judge" if scratch else None, share=(0, 1)):
            answers, judged = compare(said.prompts, before, said.replies)
        metrics |= judged
        write_json_lines(out / "answers.jsonl", answers)
        write_json_lines(out / SPEECH, said.speech.rows())
        metrics |= {f"adaptation/{name}": value for name, value in said.speech.metrics().items()}
    metrics["adaptation/score"] = metrics.get("adaptation/exact_rule", metrics["adaptation/implied_reward_accuracy"])
    write_json_lines(out / "pairs.jsonl", _pair_rows(scores, base_scores, pairs))
    write_json(out / "metrics.json", metrics)


class _Said(NamedTuple):
    """Held-out prompts, the answers to them, how they read, and how fast one process decodes."""

    prompts: list[list[Message]]
    replies: list[str]
    speech: Speech
    tokens_per_second: float | None


def _answer(
    policy: Any,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[PreferencePair],
    base_adaptation: Path | None,
    settings: AdaptationSettings,
    max_length: int,
) -> _Said:
    prompts = [list(pair.prompt) for pair in asked]
    generated = generate_with_ends(
        policy, tokenizer, prompts, max_new_tokens=settings.max_new_tokens, batch_size=settings.batch_size
    )
    replies = [reply.text for reply in generated]
    speech = heard(
        policy,
        tokenizer,
        prompts,
        generated,
        _read_replies(base_adaptation) if base_adaptation else None,
        wanted=[pair.chosen for pair in asked],
        max_length=max_length,
        batch_size=settings.batch_size,
    )
    speed = decoding_speed(policy, tokenizer, prompts, tokens=min(_SPEED_TOKENS, settings.max_new_tokens))
    return _Said(prompts, replies, speech, speed)


def _new_divergence(
    policy: Any,
    tokenizer: PreTrainedTokenizerBase,
    asked: Sequence[PreferencePair],
    base_adaptation: Path | None,
    settings: AdaptationSettings,
    max_length: int,
) -> float:
    """KL(base ‖ policy) per token on the base's own answers to held-out prompts; 0 for the base itself.

    NaN where the base answers nothing.
    """
    if base_adaptation is None or not asked:
        return 0.0
    replies = _read_replies(base_adaptation)[0]
    conversations = [(pair.prompt, reply) for pair, reply in zip(asked, replies, strict=True)]
    batch_size = settings.batch_size
    found = kl_per_token(None, policy, tokenizer, conversations, max_length=max_length, batch_size=batch_size)
    return found.per_token


def _read_replies(base_adaptation: Path) -> tuple[list[str], list[float]]:
    """The base's replies and their likelihoods, as `measure_adaptation` wrote them."""
    replies = [row["reply"] for row in read_json_lines(base_adaptation / "answers.jsonl")]
    likelihood = [row["nll"] for row in read_json_lines(base_adaptation / SPEECH)]
    return replies, [math.nan if value is None else value for value in likelihood]


def _pair_rows(
    scores: PairScores, base_scores: PairScores, pairs: Sequence[PreferencePair]
) -> list[dict[str, float | str]]:
    """Per scored pair its numbers, and which prompt it has (16 hex digits of its digest)."""
    columns = {
        "pair": scores.indices,
        "chosen_log_prob": scores.chosen,
        "rejected_log_prob": scores.rejected,
        "base_chosen_log_prob": base_scores.chosen,
        "base_rejected_log_prob": base_scores.rejected,
        "chosen_tokens": scores.chosen_tokens,
        "rejected_tokens": scores.rejected_tokens,
    }
    numbers = [
        {name: value.item() for name, value in zip(columns, values, strict=True)}
        for values in zip(*columns.values(), strict=True)
    ]
    return [{**row, "prompt": pairs[int(row["pair"])].prompt_digest[:16]} for row in numbers]


def _read_scores(file: Path) -> PairScores:
    """The scores that `_pair_rows` wrote."""
    rows = read_json_lines(file)

    def column(name: str) -> Any:
        return np.array([row[name] for row in rows])

    return PairScores(
        chosen=column("chosen_log_prob"),
        rejected=column("rejected_log_prob"),
        chosen_tokens=column("chosen_tokens"),
        rejected_tokens=column("rejected_tokens"),
        indices=column("pair"),
    )


def measure_retention(
    base: str | Path,
    adapter: Path | None,
    base_retention: Path | None,
    *,
    model: ModelSettings,
    settings: RetentionSettings,
    benchmarks: Path | None,
    old_texts: Path | None,
    max_length: int,
    out: Path,
    official_data: Path | None = None,
    scratch: Path | None = None,
    own: Mapping[str, Path] | None = None,
) -> None:
    """Score a policy on what its base could do.

    Args:
        base, adapter, model: as in `measure_adaptation`.
        base_retention: folder this function wrote for the base; its scores are what forgetting is measured from. None
            where this is the base: it has forgotten nothing, 0 in every measure.
        settings: which lm-eval tasks, how many items.
        benchmarks: folder with `benchmarks/` for the project's own tasks.
        old_texts: prepared pairs of the old distribution (held-out helpful pairs): the divergence of the policy from
            the base is taken on their chosen replies, and some of their prompts are answered.
        max_length: tokens, as in training.
        out: gets `metrics.json` (`retention/…`, `forgetting/…`), `items.jsonl` (per item: score and answer),
            `old_answers.jsonl` (prompt, the base's reply, reply), `drift.jsonl` (the traits of each of these replies),
            `reworded.jsonl` (the questions that were asked in other words) and `directions.json` (which metrics are
            better when higher).
        official_data: folder with the items of lm-eval's own tasks (`qadapter.evaluation.lm_eval.official_files`), None
            for those in `benchmarks` and else the hub's.
        scratch: as in `measure_adaptation`.
        own: the files of `settings.own`, name → file.

    Raises:
        QAdapterError: see `evaluate_tasks` and `require_scores`.

    `retention/mean` averages one accuracy a task; measures in other units (bits per byte) are not averaged with them.
    `forgetting/…` is base minus policy, or policy minus base where lower is better: positive is forgotten.
    """
    named, _ = expand_suites(settings.tasks)
    require_scores(named)
    tasks = [*named, *(own or {})]
    network, tokenizer = load_base(base, model)
    policy = load_policy(network, adapter)
    known = base_retention / "old_answers.jsonl" if base_retention else None
    answers: list[dict[str, Any]] = []
    described: list[dict[str, Any]] = []
    again: list[dict[str, Any]] = []
    divergence = 0.0
    with keeping(scratch):
        ask = partial(
            evaluate_tasks,
            policy,
            tokenizer,
            data=benchmarks,
            official_data=official_data,
            batch_size=settings.batch_size,
            plain_tasks=settings.plain_tasks,
            max_gen_toks=settings.max_new_tokens,
        )
        scores = ask(settings.tasks, own=own, limit=settings.limit, limits=settings.limits)
        items = [{"task": task, **item} for task, rows in scores.samples.items() for item in rows]
        if base_retention:
            _refuse_other_items(items, read_json_lines(base_retention / "items.jsonl"))
        if settings.reworded:
            asking = _with_questions([*settings.tasks, *(own or {})], items)
            some = [name for name in asking if name in settings.tasks]
            ours = {name: file for name, file in (own or {}).items() if name in asking}
            if asking:
                limits = _reworded_of(settings, asking)
                again = reworded_rows(items, ask(some, own=ours, limits=limits, in_words=reworded).samples)
        if old_texts is not None and settings.answers:
            base_answers = [row["reply"] for row in read_json_lines(known)] if known else None
            answers, ended = answer_old_prompts(policy, tokenizer, old_texts, base_answers, settings)
            described = _traits(policy, tokenizer, answers, ended, max_length, settings)
        if old_texts is not None and base_retention and adapter:
            divergence = _divergence(policy, tokenizer, settings, old_texts, max_length)
        if not leads():
            return
    metrics = {f"retention/{name}": value for name, value in scores.metrics.items()}
    directions = {f"retention/{name}": higher for name, higher in scores.higher_is_better.items()}
    headline = {task: headline_metric(task, metrics) for task in tasks}
    accuracies = [metrics[name] for name in headline.values() if name and directions.get(name, True)]
    if other := [name for name in filter(None, headline.values()) if directions.get(name, True) and metrics[name] > 1]:
        score = f"{other[0].removeprefix('retention/')} is {metrics[other[0]]:.4g}"
        raise QAdapterError(
            f"{score}, and retention averages scores from 0 to 1. Leave the task out, or name one with an accuracy."
        )
    if accuracies:
        metrics["retention/mean"] = sum(accuracies) / len(accuracies)
    if old_texts is not None and settings.answers:
        write_json_lines(out / "old_answers.jsonl", answers)
        write_json_lines(out / DRIFT, described)
    if settings.reworded:
        write_json_lines(out / REWORDED, again)
    metrics |= _drift(described, again, base_retention)
    metrics |= answer_metrics(answers, items)
    directions |= {"retention/answers_identical": True, "retention/over_refusals": False}
    before = read_json(base_retention / "metrics.json") if base_retention else metrics
    for name in [*filter(None, headline.values()), "retention/mean", "retention/over_refusals"]:
        if name in before and name in metrics:
            sign = 1 if directions.get(name, True) else -1
            forgotten = sign * (before[name] - metrics[name]) + 0.0  # + 0.0: never -0.0
            metrics[name.replace("retention/", "forgetting/", 1)] = forgotten
    if old_texts is not None and not math.isnan(divergence):
        metrics["forgetting/kl_per_token"] = divergence
    write_json_lines(out / "items.jsonl", items)
    write_json(out / "metrics.json", metrics)
    write_json(out / "directions.json", directions)


def _drift(
    described: list[dict[str, Any]], again: list[dict[str, Any]], base_retention: Path | None
) -> dict[str, float]:
    """The drift from the base; of the base from itself, all zeros."""

    def of_base(name: str, own: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return read_json_lines(base_retention / name) if base_retention and own else own

    return drift_metrics(described, of_base(DRIFT, described), again, of_base(REWORDED, again))


def _with_questions(names: Sequence[str], items: Sequence[Mapping[str, Any]]) -> list[str]:
    """The tasks that ask something; BLiMP's sentences and whole texts are scored behind an empty prompt.

    Args:
        names: tasks, groups and suites, whose tasks' names begin with theirs.
        items: what was asked.
    """
    prompts: dict[str, list[str]] = defaultdict(list)
    for item in items:
        prompts[item["task"]].append(item["prompt"].strip())
    # Around an empty question a chat template writes the same text each time
    asking = [task for task, found in prompts.items() if len(set(found)) > 1 or (len(found) == 1 and found[0])]
    return [
        name
        for name in names
        if any(t == one or t.startswith(f"{one}_") for one in expand_suites([name])[0] for t in asking)
    ]


def _reworded_of(settings: RetentionSettings, names: Sequence[str]) -> dict[str, int]:
    """How many items of each task are asked in other words: the first ones."""
    most = {name: settings.items_of(name) or settings.reworded for name in names}
    return {name: min(count, settings.reworded) for name, count in most.items()}


def _traits(
    policy: Any,
    tokenizer: PreTrainedTokenizerBase,
    answers: Sequence[Mapping[str, Any]],
    ended: Sequence[bool],
    max_length: int,
    settings: RetentionSettings,
) -> list[dict[str, Any]]:
    """The traits of the answers to old prompts."""
    entropy = replies_entropy(
        policy,
        tokenizer,
        [(row["prompt"], row["base"]) for row in answers],
        max_length=max_length,
        batch_size=8 if settings.batch_size == "auto" else settings.batch_size,
    )
    replies = [row["reply"] for row in answers]
    ids = tokenizer(replies, add_special_tokens=False)["input_ids"] if replies else []
    return trait_rows(
        replies,
        ended,
        [row[0] if row else None for row in ids],
        [None if math.isnan(value) else value for value in entropy],
    )


def headline_metric(task: str, metrics: dict[str, float]) -> str | None:
    """The one metric a task is known by (`known_by`), by its full name."""
    present = {name.split("/")[2]: name for name in metrics if name.split("/")[1] == task}
    found = known_by(present)
    return None if found is None else present[found]


def _divergence(
    policy: Any, tokenizer: PreTrainedTokenizerBase, settings: RetentionSettings, old_texts: Path, max_length: int
) -> float:
    """KL(base ‖ policy) per token, NaN without one; the base is the policy without its adapter."""
    conversations = [(pair.prompt, pair.chosen) for pair in load_pairs(old_texts)[: settings.limit]]
    batch_size = 8 if settings.batch_size == "auto" else settings.batch_size
    return kl_per_token(None, policy, tokenizer, conversations, max_length=max_length, batch_size=batch_size).per_token


def _refuse_other_items(items: Sequence[dict[str, Any]], base_items: Sequence[dict[str, Any]]) -> None:
    """A difference between scores on different questions is none.

    Raises:
        QAdapterError: the base was measured on other items.
    """
    asked, before = (items_digests(rows) for rows in (items, base_items))
    if other := sorted(task for task in asked.keys() | before.keys() if asked.get(task) != before.get(task)):
        raise QAdapterError(
            f"The base was measured on other items of {', '.join(other)} than the policy: what they read changed "
            "in between. Start the run anew, so that the base is measured again."
        )
