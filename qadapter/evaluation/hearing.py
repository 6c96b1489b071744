"""Listening to a policy: it answers prompts, and its base says how likely these answers are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from qadapter.evaluation.divergence import replies_nll
from qadapter.evaluation.speech import Speech, listen
from qadapter.inference.generate import Generated, generate_with_ends
from qadapter.preferences.pair import Message


def beside_base(
    policy: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    *,
    wanted: Sequence[str],
    max_new_tokens: int,
    max_length: int,
    batch_size: int,
) -> tuple[Speech, list[str], list[str]]:
    """Let a policy and its base answer greedily; whether the policy speaks, its replies and the base's.

    Args:
        policy: with an adapter that it can switch off.
        prompts: at least one conversation that ends with the user's turn.
        wanted: for each prompt a reply that was preferred: the script that it is in is no fault.
        max_new_tokens: longest reply.
        max_length: tokens of prompt and reply together, for the likelihood under the base.
        batch_size: prompts per forward pass.
    """

    def answers() -> list[Generated]:
        return generate_with_ends(policy, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size)

    replies = answers()
    with policy.disable_adapter():
        base = [reply.text for reply in answers()]
    pairs = list(zip(prompts, base, strict=True))
    likelihood = replies_nll(policy, tokenizer, pairs, max_length=max_length, batch_size=batch_size)
    speech = heard(
        policy,
        tokenizer,
        prompts,
        replies,
        (base, likelihood),
        wanted=wanted,
        max_length=max_length,
        batch_size=batch_size,
    )
    return speech, [reply.text for reply in replies], base


def heard(
    policy: Any,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    replies: Sequence[Generated],
    base: tuple[Sequence[str], Sequence[float]] | None,
    *,
    wanted: Sequence[str],
    max_length: int,
    batch_size: int,
) -> Speech:
    """Whether a policy speaks, by the replies that it generated and their likelihood under its base (one pass).

    Args:
        policy: that generated them; its adapter is switched off for the likelihood.
        prompts, replies: n of each.
        base: the base's n replies to the same prompts and their likelihoods, nats per token; None where the policy is
            the base.
        wanted: for each prompt a reply that was preferred.
        max_length, batch_size: as for the pairs.
    """
    texts = [reply.text for reply in replies]
    likelihood = replies_nll(
        policy, tokenizer, list(zip(prompts, texts, strict=True)), max_length=max_length, batch_size=batch_size
    )
    base_texts, base_likelihood = (texts, likelihood) if base is None else base
    return listen(
        texts,
        base_texts,
        ended=[reply.ended for reply in replies],
        nll=likelihood,
        base_nll=base_likelihood,
        vocabulary=len(tokenizer),
        beside=[(prompt[-1]["content"], reply) for prompt, reply in zip(prompts, wanted, strict=True)],
    )
