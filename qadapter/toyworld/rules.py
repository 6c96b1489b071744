"""Exact measures in the toy world: its truth is known, so adaptation is counted, not estimated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from qadapter.errors import QAdapterError
from qadapter.evaluation.benchmarks import items as benchmarks
from qadapter.preferences.pair import Message
from qadapter.toyworld.world import ToyWorld, is_one_of

if TYPE_CHECKING:
    from datasets import Dataset


def exact_measures(
    world: ToyWorld, style: str | None, prompts: Sequence[Sequence[Message]], replies: Sequence[str]
) -> dict[str, float]:
    """Shares of replies that do what the preference wants.

    Args:
        world: the world the prompts are about.
        style: for a domain, its style; None for harmless, where the prompts are harmful requests.
        prompts: conversations whose last turn is the question.
        replies: the policy's replies.

    Returns:
        `adaptation/exact_rule`: in the style *and* with the right attributes, or refused word for word;
        for a domain also `adaptation/well_formed`: right attributes in any style.
    """
    measures = {"adaptation/exact_rule": _share(follows_rule(world, style, prompts, replies))}
    if style is not None:
        styles = _styles(world, prompts, replies)
        measures["adaptation/well_formed"] = _share([found is not None for found in styles])
    return measures


def follows_rule(
    world: ToyWorld, style: str | None, prompts: Sequence[Sequence[Message]], replies: Sequence[str]
) -> list[bool]:
    """Whether each reply does what the preference wants; arguments as in `exact_measures`."""
    if style is None:
        return [world.is_refusal(reply) for reply in replies]
    return [found == style for found in _styles(world, prompts, replies)]


def lm_eval_dataset(file: str, fields: Sequence[str], **metadata: Any) -> dict[str, Dataset]:
    """What a task's `custom_dataset: !function` gets; see `benchmarks.lm_eval_dataset`.

    Raises:
        QAdapterError: the answers of an item are no list: a part of one text would count as right.
    """
    for item in benchmarks.read_items(file, fields):
        answers = item["answers"]
        if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
            raise QAdapterError(
                f"Benchmark file {file}: the answers of an item are no list of texts. Correct the file or leave this "
                f"task out."
            )
    return benchmarks.lm_eval_dataset(file, fields, **metadata)


def score_reply(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval's `process_results` of the tasks `toy_refusals` and `toy_style_…`: the rule, on an item's answers."""
    return {"exact_match": float(is_one_of(results[0], doc["answers"]))}


def _styles(world: ToyWorld, prompts: Sequence[Sequence[Message]], replies: Sequence[str]) -> list[str | None]:
    """The style in which each reply rightly describes its prompt's topic, None if it does not."""
    topics = [prompt[-1]["content"].split()[-2] for prompt in prompts]
    return [world.style_of(topic, reply) for topic, reply in zip(topics, replies, strict=True)]


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits) if hits else float("nan")
