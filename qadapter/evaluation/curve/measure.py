"""Measure one adapter at several values of its dial: adaptation and retention item by item."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase

from qadapter.config.curve import CurveSettings
from qadapter.config.evaluation import AdaptationSettings, RetentionSettings
from qadapter.config.model import ModelSettings
from qadapter.errors import QAdapterError
from qadapter.evaluation.curve.both_rows import WeightedTexts
from qadapter.evaluation.curve.lm import DialledLM
from qadapter.evaluation.curve.points import (
    Curve,
    Measure,
    Point,
    content_digest,
    next_value,
    prompt_digest,
    write_curves,
)
from qadapter.evaluation.curve.scaled import DialledTexts, ScaledTexts
from qadapter.evaluation.lm_eval.catalog import expand_suites
from qadapter.evaluation.lm_eval.harness import TaskScores, opened_tasks
from qadapter.evaluation.measure import headline_metric
from qadapter.evaluation.old_answers import HOWTOS
from qadapter.evaluation.preference import distinct_prompts, encode_usable
from qadapter.files.artifacts import read_json_lines, write_json
from qadapter.inference.generate import context_of
from qadapter.inference.pair_scores import mean_margin, won
from qadapter.policy.dial import AS_TRAINED, Dial
from qadapter.policy.guided import GuidedForCausalLM
from qadapter.policy.loading import load_base, load_policy
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.preferences.pair import Message, PreferencePair, load_pairs
from qadapter.preferences.render import end_ids
from qadapter.preferences.tokenize import padding_id, prompt_ids
from qadapter.toyworld.rules import follows_rule
from qadapter.toyworld.world import ToyWorld

Known = tuple[Path | None, Path | None]
"""Folders that `measure_adaptation` and `measure_retention` wrote for the base and for the policy as trained."""
_KNOWN_AT = (0.0, 1.0)


def measure_curve(
    base: str | Path,
    adapter: Path,
    heldout_file: Path,
    *,
    model: ModelSettings,
    adaptation: AdaptationSettings,
    retention: RetentionSettings,
    curve: CurveSettings,
    max_length: int,
    world: Path | None,
    style: str | None,
    benchmarks: Path | None,
    out: Path,
    known_adaptation: Known = (None, None),
    known_retention: Known = (None, None),
    official_data: Path | None = None,
    own_tokenizer: PreTrainedTokenizerBase | None = None,
    own: Mapping[str, Path] | None = None,
) -> None:
    """Measure the curve of one adapter, for each kind of dial that is asked for, and write them.

    Args:
        base: folder or hub id of the base model.
        adapter: the adapter's folder.
        heldout_file: prepared pairs.
        model, adaptation, retention: of the experiment.
        curve: which dials and how many points.
        max_length: tokens, as in training.
        world: folder of the toy world the data is from, None for real data.
        style: the domain's style in the toy world, None for harmless.
        benchmarks: folder with `benchmarks/` for the project's own tasks.
        out: gets `curve.json` (`points.read_curves`) and `metrics.json`.
        known_adaptation, known_retention: where the answers of base and policy were written down already; each is
            looked at once to see at which weights it stays the same.
        official_data: as in `measure_retention`.
        own_tokenizer: the policy's, where it is not its base's.
        own: as in `measure_retention`.
    """
    network, of_base = load_base(base, model)
    tokenizer = own_tokenizer or of_base
    policy = dialled(load_policy(network, adapter))
    batch_size = 8 if retention.batch_size == "auto" else int(retention.batch_size)
    options = {"pad": padding_id(tokenizer), "batch_size": max(batch_size, 1)}
    clocks = time.perf_counter(), time.process_time()
    pairs = load_pairs(heldout_file)
    named, _ = expand_suites(retention.tasks)
    tasks = [*named, *(own or {})]
    found: list[Curve] = []
    metrics: dict[str, float] = {}
    generated = reused = 0
    before: DialledTexts | None = None
    with opened_tasks(
        tokenizer,
        retention.tasks,
        own=own,
        data=benchmarks,
        official_data=official_data,
        limit=retention.limit,
        limits=retention.limits,
        plain_tasks=retention.plain_tasks,
        max_gen_toks=retention.max_new_tokens,
    ) as score:

        def lm_at(texts: DialledTexts, value: float) -> Callable[[bool], DialledLM]:
            return lambda chat: DialledLM(
                texts, value, tokenizer=tokenizer, batch_size=batch_size, apply_chat_template=chat
            )

        for kind in curve.kinds:
            start = time.perf_counter()
            texts: DialledTexts = (
                WeightedTexts(policy, curve.all_values, **options)
                if kind == "q-weight"
                else ScaledTexts(policy, **options)
            )
            learnt = _Adaptation(texts, tokenizer, pairs, adaptation, max_length, world, style, known_adaptation)
            _learn_retention(texts, lm_at(texts, 0.0), tokenizer, set(retention.plain_tasks), known_retention)
            for value_before, answers in (before.known() if before else {}).items():
                texts.learn(answers, value_before)
            points = [point for one in found[:1] for point in one.points if point.value in (0.0, 1.0)]
            while (value := next_value(points, curve)) is not None:
                points.append(_point(value, learnt.at(value), score(lm_at(texts, value)), tasks))
            found.append(Curve(kind, tuple(sorted(points, key=lambda point: point.value))))
            metrics |= found[-1].metrics()
            metrics[f"cost/curve_{kind}_seconds"] = time.perf_counter() - start
            generated, reused, before = generated + texts.generated, reused + texts.reused, texts
    policy.dial = AS_TRAINED
    write_curves(out, found)
    wall, cpu = time.perf_counter() - clocks[0], time.process_time() - clocks[1]
    metrics |= {"cost/curve_seconds": wall, "cost/curve_cpu_seconds": cpu}
    metrics["cost/curve_answers_reused"] = reused / max(1, generated + reused)
    write_json(out / "metrics.json", metrics)


def dialled(policy: Any) -> QAdapterForCausalLM:
    """A policy of `load_policy` as one whose dial can be moved.

    Raises:
        QAdapterError: it guides the base's decoding, so that base and policy share no pass.
    """
    if isinstance(policy, GuidedForCausalLM):
        raise QAdapterError("an adapter that guides the base's decoding has no curve; measure it at other guidances")
    return QAdapterForCausalLM.around(policy).eval() if isinstance(policy, PeftModel) else policy


def _point(value: float, learnt: Measure, scores: TaskScores, tasks: Sequence[str]) -> Point:
    metrics = {f"retention/{name}": number for name, number in scores.metrics.items()}
    kept = {}
    for task in tasks:
        name = headline_metric(task, metrics)
        rows = [(other, row) for other, items in scores.samples.items() if _belongs(other, task) for row in items]
        if name is None or not rows:
            continue
        higher = scores.higher_is_better.get(name.removeprefix("retention/"), True)
        kept[name] = _task(rows, higher)
    howtos = [ToyWorld.is_refusal(str(row["response"])) for row in scores.samples.get(HOWTOS, ())]
    refused = Measure((), tuple(map(float, howtos))) if howtos else None
    return Point(value, learnt, kept, refused)


def _belongs(task: str, of: str) -> bool:
    """Whether a task is a headline task or one of a group's."""
    return task == of or task.startswith(f"{of}_")


def _task(named: Sequence[tuple[str, dict[str, Any]]], higher: bool) -> Measure:
    ids = tuple(content_digest(task, row["doc_id"], row["prompt"], row["target"]) for task, row in named)
    rows = [row for _, row in named]
    if isinstance(rows[0]["score"], list | tuple):  # lm-eval's (log-likelihood, bytes)
        values = tuple(-row["score"][0] / row["score"][1] / math.log(2) for row in rows)
        return Measure(ids, values, tuple(float(row["score"][1]) for row in rows), higher)
    return Measure(ids, tuple(float(row["score"]) for row in rows), None, higher)


def _learn_retention(
    texts: DialledTexts,
    lm_of: Callable[[bool], DialledLM],
    tokenizer: PreTrainedTokenizerBase,
    plain: set[str],
    known: Known,
) -> None:
    """Take in the answers that base and policy gave to the benchmarks' generated questions."""
    models: dict[bool, DialledLM] = {}
    for value, folder in zip(_KNOWN_AT, known, strict=True):
        if folder is None:
            continue
        found = []
        for row in read_json_lines(folder / "items.jsonl"):
            if not isinstance(row["response"], str) or not row["response"]:
                continue
            chat = row["task"] not in plain
            lm = models[chat] if chat in models else models.setdefault(chat, lm_of(chat))
            found.append((lm.prompt_ids(row["prompt"]), _ended(tokenizer, row["response"])))
        texts.learn(found, value)


def _ended(tokenizer: PreTrainedTokenizerBase, answer: str) -> tuple[int, ...]:
    """An answer's tokens with the end of a turn. Where it was written otherwise, it is found out when it is learnt."""
    ids: Any = tokenizer(answer, add_special_tokens=False)["input_ids"]
    end: Any = tokenizer.eos_token_id
    return (*ids, int(end))


class _Adaptation:
    """Adaptation at each value: the toy world's rule on answers, or pairs won by log-probability per token."""

    def __init__(
        self,
        texts: DialledTexts,
        tokenizer: PreTrainedTokenizerBase,
        pairs: Sequence[PreferencePair],
        settings: AdaptationSettings,
        max_length: int,
        world: Path | None,
        style: str | None,
        known: Known,
    ) -> None:
        self._texts, self._tokenizer, self._settings, self._style = texts, tokenizer, settings, style
        self._world = ToyWorld.read(world) if world else None
        if self._world is None:
            self._encode(pairs, max_length)
            return
        self._prompts: list[list[Message]] = distinct_prompts(pairs)
        room = context_of(texts.policy) - settings.max_new_tokens
        self._ids = [tuple(prompt_ids(tokenizer, prompt)[-room:]) for prompt in self._prompts]
        self._names = tuple(prompt_digest(prompt) for prompt in self._prompts)
        for value, folder in zip(_KNOWN_AT, known, strict=True):
            if folder is not None:
                replies = [row["reply"] for row in read_json_lines(folder / "answers.jsonl")]
                given = zip(self._ids, replies, strict=True)
                texts.learn([(ids, _ended(tokenizer, reply)) for ids, reply in given if reply], value)

    def _encode(self, pairs: Sequence[PreferencePair], max_length: int) -> None:
        indices, encoded = encode_usable(self._tokenizer, pairs, max_length)
        self._sides = [
            [(tuple(pair.prompt_ids), tuple(ids(pair))) for pair in encoded]
            for ids in (lambda pair: pair.chosen_ids, lambda pair: pair.rejected_ids)
        ]
        self._names = tuple(prompt_digest(pairs[i].prompt) for i in indices)

    def at(self, value: float) -> Measure:
        """The measure at a value."""
        if self._world is not None:
            replies = [self._text(answer) for answer in self._answers(value)]
            hits = follows_rule(self._world, self._style, self._prompts, replies)
            return Measure(self._names, tuple(map(float, hits)))
        # Not by the implied reward: that prefers the chosen reply at the smallest weight already.
        sums = [np.array([score for score, _ in self._texts.likelihoods(side, value)]) for side in self._sides]
        counts = [np.array([len(reply) for _, reply in side]) for side in self._sides]
        return Measure(self._names, tuple(won(mean_margin(*sums, *counts)).tolist()))

    def _text(self, answer: tuple[int, ...]) -> str:
        ends = self._ends()
        stop = next((place for place, token in enumerate(answer) if token in ends), len(answer))
        return str(self._tokenizer.decode(list(answer[:stop]), skip_special_tokens=True)).strip()

    def _ends(self) -> list[int]:
        return end_ids(self._tokenizer, self._texts.policy.generation_config.eos_token_id)

    def _answers(self, value: float) -> list[tuple[int, ...]]:
        """The answer to each prompt at a value; those that are not known are generated, in batches."""
        known = dict(zip(self._ids, self._texts.answers(self._ids, value), strict=True))
        found = {ids: answer for ids, answer in known.items() if answer is not None}
        open_ = [ids for ids in known if ids not in found]
        policy, pad, ends = self._texts.policy, padding_id(self._tokenizer), self._ends()
        settings = GenerationConfig(
            max_new_tokens=self._settings.max_new_tokens, eos_token_id=ends, pad_token_id=pad, do_sample=False
        )
        for start in range(0, len(open_), self._settings.batch_size):
            some = open_[start : start + self._settings.batch_size]
            width = max(map(len, some))
            given = torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in some], device=policy.device)
            mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in some], device=policy.device)
            with torch.no_grad():
                output = policy.generate(
                    input_ids=given,
                    attention_mask=mask,
                    generation_config=settings,
                    dial=Dial(self._texts.kind, value),
                )
            for ids, row in zip(some, output[:, width:].tolist(), strict=True):
                stop = next((place + 1 for place, token in enumerate(row) if token in ends), len(row))
                found[ids] = tuple(row[:stop])
        self._texts.learn([(ids, found[ids]) for ids in open_], value)
        self._texts.generated += len(open_)
        self._texts.reused += len(known) - len(open_)
        return [found[ids] for ids in self._ids]
