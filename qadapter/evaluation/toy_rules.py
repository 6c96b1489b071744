"""Exact measures in the toy world: its truth is known, so adaptation is counted, not estimated."""

from __future__ import annotations

from collections.abc import Sequence

from qadapter.preferences.pair import Message
from qadapter.preferences.toyworld import ToyWorld


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
        for a domain also `adaptation/well_formed`: right attributes in whatever style.
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


def _styles(world: ToyWorld, prompts: Sequence[Sequence[Message]], replies: Sequence[str]) -> list[str | None]:
    """The style in which each reply rightly describes its prompt's topic, None if it does not."""
    topics = [prompt[-1]["content"].split()[-2] for prompt in prompts]
    return [world.style_of(topic, reply) for topic, reply in zip(topics, replies, strict=True)]


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits) if hits else float("nan")
