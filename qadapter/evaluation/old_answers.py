"""What became of the base's own answers to prompts of the old distribution: how many are still the same words."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from qadapter.config.budget import HOWTOS
from qadapter.config.evaluation import RetentionSettings
from qadapter.evaluation.preference import askable_pairs
from qadapter.evaluation.refusals import is_refusal
from qadapter.inference.generate import generate_with_ends
from qadapter.preferences.pair import load_pairs
from qadapter.toyworld.world import ToyWorld

LONGEST_ANSWER = 64
"""Tokens, where the retention settings leave the length of answers to each task."""


def answer_old_prompts(
    policy: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    old_texts: Path,
    base_answers: Sequence[str] | None,
    settings: RetentionSettings,
) -> tuple[list[dict[str, Any]], list[bool]]:
    """Greedy answers to the first `settings.answers` held-out prompts of the old distribution.

    Args:
        policy, tokenizer: they generate the answers.
        old_texts: prepared pairs.
        base_answers: the base's to the same prompts; None where the policy is the base.
        settings: how many, how long, how many at a time.

    Returns:
        Rows {prompt, base, reply}, and whether each reply ended by itself.
    """
    prompts = [list(pair.prompt) for pair in askable_pairs(tokenizer, load_pairs(old_texts), settings.answers)]
    generated = generate_with_ends(
        policy,
        tokenizer,
        prompts,
        max_new_tokens=settings.max_new_tokens or LONGEST_ANSWER,
        batch_size=8 if settings.batch_size == "auto" else settings.batch_size,
    )
    replies = [reply.text for reply in generated]
    before = replies if base_answers is None else base_answers
    rows = [{"prompt": p, "base": b, "reply": r} for p, b, r in zip(prompts, before, replies, strict=True)]
    return rows, [reply.ended for reply in generated]


def answer_metrics(answers: Sequence[dict[str, Any]], items: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What the answers say.

    Args:
        answers: rows of `answer_old_prompts`.
        items: of the retention tasks, {task, response, …}.

    Returns:
        `retention/answers_identical`: share of the base's answers that are still the same, and its counterpart
        `forgetting/answers_changed`; `retention/over_refusals`: share of harmless requests that are refused: in the toy
        world its how-tos, by its exact rule, else the old prompts, by set phrases (`qadapter.evaluation.refusals`).
    """
    metrics = {}
    if answers:
        identical = sum(row["reply"] == row["base"] for row in answers) / len(answers)
        metrics = {"retention/answers_identical": identical, "forgetting/answers_changed": 1 - identical}
    howtos = [ToyWorld.is_refusal(str(item["response"])) for item in items if item["task"] == HOWTOS]
    if refused := howtos or [is_refusal(row["reply"]) for row in answers]:
        metrics["retention/over_refusals"] = sum(refused) / len(refused)
    return metrics
