"""Measure one adapter at several values of its dial: adaptation and retention item by item."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from qadapter.config.budget import HOWTOS
from qadapter.config.curve import CurveSettings
from qadapter.config.evaluation import AdaptationSettings, RetentionSettings
from qadapter.config.model import ModelSettings
from qadapter.evaluation.curve.asked import AskedPrompts, ended
from qadapter.evaluation.curve.both_rows import DialledPolicy, WeightedTexts
from qadapter.evaluation.curve.lm import DialledLM
from qadapter.evaluation.curve.old import OldText
from qadapter.evaluation.curve.points import (
    Curve,
    Measure,
    Point,
    content_digest,
    next_value,
    write_curves,
)
from qadapter.evaluation.curve.scaled import DialledTexts, ScaledTexts
from qadapter.evaluation.lm_eval.catalog import expand_suites
from qadapter.evaluation.lm_eval.harness import TaskScores, opened_tasks
from qadapter.evaluation.measure import headline_metric
from qadapter.evaluation.preference import distinct_prompts, encode_usable
from qadapter.evaluation.prompts import prompt_names
from qadapter.files.artifacts import read_json_lines, write_json
from qadapter.inference.pair_scores import mean_margin, won
from qadapter.policy.dial import AS_TRAINED
from qadapter.policy.guided import GuidedForCausalLM
from qadapter.policy.loading import load_base, load_policy
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.preferences.pair import Message, PreferencePair, load_pairs
from qadapter.preferences.tokenize import padding_id
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
    old_texts: Path | None = None,
    allow_base_mismatch: bool = False,
) -> None:
    """Measure the curve of one adapter, for each kind of dial that is asked for, and write them.

    Args:
        base: folder or hub id of the base model.
        adapter: the adapter's folder.
        heldout_file: prepared pairs.
        model, adaptation, retention: of the experiment.
        curve: which dials and how many points; one that guides the base has `q-weight` alone.
        max_length: tokens, as in training.
        world: folder of the toy world the data is from, None for real data.
        style: the domain's style in the toy world, None for harmless.
        benchmarks: folder with `benchmarks/` for the project's own tasks.
        out: gets `curve.json` (`points.read_curves`) and `metrics.json`.
        known_adaptation, known_retention: where the answers of base and policy were written down already; each is
            looked at once to see at which weights it stays the same.
        official_data: as in `measure_retention`.
        own_tokenizer: the policy's, where it is not its base's.
        own, old_texts: as in `measure_retention`; None: nothing is measured on old text.
        allow_base_mismatch: whether the base may be another one than the adapter was trained on.
    """
    network, of_base = load_base(base, model)
    tokenizer = own_tokenizer or of_base
    policy = dialled(load_policy(network, adapter, allow_base_mismatch=allow_base_mismatch))
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

        for kind in ("q-weight",) if isinstance(policy, GuidedForCausalLM) else curve.kinds:
            start = time.perf_counter()
            texts: DialledTexts = (
                WeightedTexts(policy, curve.all_values, **options)
                if kind == "q-weight"
                else ScaledTexts(policy, **options)
            )
            learnt = _Adaptation(texts, tokenizer, pairs, adaptation, max_length, world, style, known_adaptation)
            _learn_retention(texts, lm_at(texts, 0.0), tokenizer, score.generated, known_retention)
            for value_before, answers in (before.known() if before else {}).items():
                texts.learn(answers, value_before)
            points = [point for one in found[:1] for point in one.points if point.value in (0.0, 1.0)]
            done = len(points)
            while (value := next_value(points, curve)) is not None:
                points.append(_point(value, learnt.at(value), score(lm_at(texts, value)), tasks))
            if old_texts is not None:
                old = OldText(texts, tokenizer, old_texts, retention, max_length, known_retention[1])
                points[done:] = _on_old_text(points[done:], old)
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


def dialled(policy: Any) -> DialledPolicy:
    """A policy of `load_policy` as one whose dial can be moved; one that guides the base's decoding can as it is."""
    if isinstance(policy, GuidedForCausalLM):
        return policy
    return QAdapterForCausalLM.around(policy).eval() if isinstance(policy, PeftModel) else policy


def _point(value: float, learnt: Measure, scores: TaskScores, tasks: Sequence[str]) -> Point:
    howtos = [ToyWorld.is_refusal(str(row["response"])) for row in scores.samples.get(HOWTOS, ())]
    refused = Measure((), tuple(map(float, howtos))) if howtos else None
    return Point(value, learnt, kept_items(scores, tasks), refused)


def kept_items(scores: TaskScores, tasks: Sequence[str]) -> dict[str, Measure]:
    """`retention/<task>/<metric>` → its items, for the one metric that each task is known by.

    A group's items are those of its subtasks. A task is left out whose items have no score of their own (F1 over all
    items, for one).

    Args:
        scores: of lm-eval.
        tasks: tasks and groups.
    """
    metrics = {f"retention/{name}": number for name, number in scores.metrics.items()}
    kept = {}
    for task in tasks:
        name = headline_metric(task, metrics)
        rows = [(one, row) for one in scores.groups.get(task, [task]) for row in scores.samples.get(one, ())]
        if name is None or not rows:
            continue
        metric, higher = name.split("/")[2], scores.higher_is_better.get(name.removeprefix("retention/"), True)
        if (found := _task(rows, metric, higher)) is not None:
            kept[name] = found
    return kept


def _on_old_text(points: Sequence[Point], old: OldText) -> list[Point]:
    """The points with what was measured on old text; harmless requests are its prompts where no task asks them."""
    found = []
    for point, kl in zip(points, old.divergences([point.value for point in points]), strict=True):
        unchanged, refused = old.answers(point.value) or (None, None)
        found.append(replace(point, kl=kl, unchanged=unchanged, refused=point.refused or refused))
    return found


def _task(named: Sequence[tuple[str, dict[str, Any]]], metric: str, higher: bool) -> Measure | None:
    """The items' scores; None if one is no number."""
    ids = tuple(content_digest(task, row["doc_id"], row["prompt"], row["target"]) for task, row in named)
    scores = [row["scores"].get(metric) for _, row in named]
    if metric.split(".")[0] == "bits_per_byte":  # lm-eval's (log-likelihood, bytes)
        values = tuple(-likelihood / size / math.log(2) for likelihood, size in scores)
        return Measure(ids, values, tuple(float(size) for _, size in scores), higher)
    if not all(isinstance(score, int | float) for score in scores):
        return None
    return Measure(ids, tuple(map(float, scores)), None, higher)


def _learn_retention(
    texts: DialledTexts,
    lm_of: Callable[[bool], DialledLM],
    tokenizer: PreTrainedTokenizerBase,
    generated: Mapping[str, bool],
    known: Known,
) -> None:
    """Take in the answers that base and policy gave to the benchmarks' questions.

    Args:
        texts: gets them.
        lm_of: lm-eval's model with chat template (True) or without.
        tokenizer: the policy's.
        generated: task whose answers are generated → whether it is asked with chat template. A choice of the most
            likely one is no answer, and is not taken in.
        known: the folders of base and policy.
    """
    models: dict[bool, DialledLM] = {}
    for value, folder in zip(_KNOWN_AT, known, strict=True):
        if folder is None:
            continue
        found = []
        for row in read_json_lines(folder / "items.jsonl"):
            if row["task"] not in generated or not row["response"]:
                continue
            chat = generated[row["task"]]
            lm = models[chat] if chat in models else models.setdefault(chat, lm_of(chat))
            found.append((lm.prompt_ids(row["prompt"]), ended(tokenizer, row["response"])))
        texts.learn(found, value)


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
        self._texts, self._tokenizer, self._style = texts, tokenizer, style
        self._world = ToyWorld.read(world) if world else None
        if self._world is None:
            self._encode(pairs, max_length)
            return
        self._prompts: list[list[Message]] = distinct_prompts(pairs)
        self._names = tuple(prompt_names(self._prompts))
        self._asked = AskedPrompts(
            texts,
            tokenizer,
            self._prompts,
            max_new_tokens=settings.max_new_tokens,
            batch_size=settings.batch_size,
        )
        for value, folder in zip(_KNOWN_AT, known, strict=True):
            if folder is not None:
                self._asked.learn([row["reply"] for row in read_json_lines(folder / "answers.jsonl")], value)

    def _encode(self, pairs: Sequence[PreferencePair], max_length: int) -> None:
        indices, encoded = encode_usable(self._tokenizer, pairs, max_length)
        self._sides = [
            [(tuple(pair.prompt_ids), tuple(ids(pair))) for pair in encoded]
            for ids in (lambda pair: pair.chosen_ids, lambda pair: pair.rejected_ids)
        ]
        names = prompt_names([pair.prompt for pair in pairs])
        self._names = tuple(names[i] for i in indices)

    def at(self, value: float) -> Measure:
        """The measure at a value."""
        if self._world is not None:
            hits = follows_rule(self._world, self._style, self._prompts, self._asked.replies(value))
            return Measure(self._names, tuple(map(float, hits)))
        # Not by the implied reward: that prefers the chosen reply at the smallest weight already.
        sums = [np.array([score for score, _ in self._texts.likelihoods(side, value)]) for side in self._sides]
        counts = [np.array([len(reply) for _, reply in side]) for side in self._sides]
        return Measure(self._names, tuple(won(mean_margin(*sums, *counts)).tolist()))
