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
    if style is None:
        return {"adaptation/exact_rule": _share([world.is_refusal(reply) for reply in replies])}
    topics = [prompt[-1]["content"].split()[-2] for prompt in prompts]
    styles = [world.style_of(topic, reply) for topic, reply in zip(topics, replies, strict=True)]
    return {
        "adaptation/exact_rule": _share([found == style for found in styles]),
        "adaptation/well_formed": _share([found is not None for found in styles]),
    }


def _share(hits: Sequence[bool]) -> float:
    return sum(hits) / len(hits) if hits else float("nan")
