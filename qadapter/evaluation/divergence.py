"""How far a policy has moved from its base: on text of the old distribution, and in its own replies."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qadapter.inference.score import Predictions, chunks, evaluating, item_results, reply_log_probs
from qadapter.preferences.pair import Message
from qadapter.preferences.tokenize import UnusablePair, encode_reply, padding_id


@dataclass(frozen=True)
class Divergence:
    """KL(base ‖ policy), in nats, summed over the reply tokens of each conversation.

    Attributes:
        sums: [n], sum per conversation in nats.
        tokens: [n], number of reply tokens per conversation; 0 for one that the tokenizer has no form for.
    """

    sums: NDArray[np.float64]
    tokens: NDArray[np.int64]

    @property
    def per_token(self) -> float:
        """Mean over all tokens, in nats; NaN without a token."""
        return float(self.sums.sum() / self.tokens.sum()) if self.tokens.any() else math.nan


def kl_per_token(
    base: torch.nn.Module | None,
    policy: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[tuple[Sequence[Message], str]],
    *,
    max_length: int,
    batch_size: int,
) -> Divergence:
    """KL(base ‖ policy) of the next token, exact over the vocabulary, at every token of given replies.

    Args:
        base: the model before customising; not the module inside a PEFT policy, which carries the adapter. None: the
            policy with its adapter switched off, so that the base is in memory once.
        policy: any policy with the base's vocabulary.
        conversations: a prompt and a reply each, tokenised as in training; one that has no rendering adds no token.
        max_length: tokens of prompt and reply together.
        batch_size: conversations per forward pass.
    """
    if base is not None and _carries_adapter_of(base, policy):
        raise ValueError("The base is the module inside the policy, so it carries the adapter. Load the base again.")
    places, encoded = usable_replies(tokenizer, conversations, max_length)
    rows = [(prompt + reply, len(reply)) for prompt, reply in encoded]

    def divergences(part: list[int]) -> list[float]:
        found: list[float] = _kl_of_batch(base, policy, _batch_of(rows, part, tokenizer)).tolist()
        return found

    with evaluating(*([policy] if base is None else [base, policy])):
        lengths, work = [len(ids) for ids, _ in rows], "divergence from the base"
        of_each = item_results(lengths, batch_size, divergences, lambda i: rows[i], work=work, unit="reply")
    sums, tokens = np.zeros(len(conversations)), np.zeros(len(conversations), dtype=np.int64)
    sums[places], tokens[places] = of_each, [reply for _, reply in rows]
    return Divergence(sums, tokens)


def usable_replies(
    tokenizer: PreTrainedTokenizerBase, conversations: Sequence[tuple[Sequence[Message], str]], max_length: int
) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
    """Places of the conversations that `encode_reply` has a form for, and their ids; the others are left out.

    A chat template may refuse one (a system turn, for example) that another base's takes.
    """
    places, encoded = [], []
    for place, (prompt, reply) in enumerate(conversations):
        with contextlib.suppress(UnusablePair):
            encoded.append(encode_reply(prompt, reply, tokenizer, max_length))
            places.append(place)
    return places, encoded


def replies_nll(
    policy: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[tuple[Sequence[Message], str]],
    *,
    max_length: int,
    batch_size: int,
) -> list[float]:
    """Mean negative log-likelihood of each reply's tokens under the base, in nats per token.

    Args:
        policy: the base itself, or any policy: its adapter is switched off.
        conversations: a prompt and a reply each, tokenised as in training.
        max_length: tokens of prompt and reply together.
        batch_size: conversations per forward pass.

    Returns:
        n values; NaN for a reply without a token and for a prompt that has no rendering.
    """
    base = _without_adapter(policy) if hasattr(policy, "disable_adapter") else contextlib.nullcontext()
    with base:
        means = _token_means(
            policy, tokenizer, conversations, reply_log_probs, max_length, batch_size, work="likelihood under the base"
        )
    return [-mean for mean in means]


def replies_entropy(
    policy: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[tuple[Sequence[Message], str]],
    *,
    max_length: int,
    batch_size: int,
) -> list[float]:
    """Mean entropy of a policy's next token at each token of given replies, in nats.

    Args:
        policy: any policy.
        conversations: a prompt and a reply each, tokenised as in training.
        max_length: tokens of prompt and reply together.
        batch_size: conversations per forward pass.

    Returns:
        n values; NaN for a reply without a token and for a prompt that has no rendering.
    """
    work = "entropy on the base's replies"
    return _token_means(policy, tokenizer, conversations, _entropy_of_batch, max_length, batch_size, work=work)


def _token_means(
    policy: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[tuple[Sequence[Message], str]],
    sums_of: Callable[[torch.nn.Module, dict[str, Tensor]], Tensor],
    max_length: int,
    batch_size: int,
    *,
    work: str,
) -> list[float]:
    """For each reply the mean over its tokens of what `sums_of` sums for each row of a batch.

    NaN for a reply without a token and for a prompt that has no rendering.
    """
    found = [math.nan] * len(conversations)
    places, encoded = usable_replies(tokenizer, conversations, max_length)
    rows = [(before + after, len(after)) for before, after in encoded]

    def sums(part: list[int]) -> list[float]:
        values: list[float] = sums_of(policy, _batch_of(rows, part, tokenizer)).tolist()
        return values

    with evaluating(policy):
        lengths = [len(ids) for ids, _ in rows]
        values = item_results(lengths, batch_size, sums, lambda i: rows[i], work=work, unit="reply")
    for i, value in enumerate(values):
        found[places[i]] = value / rows[i][1]
    return found


def _entropy_of_batch(policy: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """[R], float64: Σ_t −Σ_a π(a|s_t) · log π(a|s_t) over each row's reply tokens."""
    sums = torch.zeros(batch["input_ids"].shape[0], dtype=torch.float64)
    predictions = Predictions(policy, batch)
    rows = predictions.rows
    for part in chunks(len(rows), predictions.vocabulary):
        log_probs = predictions.logits(part).log_softmax(dim=1)
        entropy = -(log_probs.exp() * log_probs).sum(dim=1)
        sums.index_add_(0, rows[part].cpu(), entropy.double().cpu())
    return sums


def _kl_of_batch(base: torch.nn.Module | None, policy: torch.nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """[R], float64: Σ_t Σ_a π1(a|s_t) · (log π1(a|s_t) - log π(a|s_t)) over each row's reply tokens."""
    sums = torch.zeros(batch["input_ids"].shape[0], dtype=torch.float64)
    with contextlib.nullcontext() if base is not None else _without_adapter(policy):
        of_base = Predictions(policy if base is None else base, batch)
    of_policy = Predictions(policy, batch)
    rows = of_policy.rows
    for part in chunks(len(rows), 2 * of_policy.vocabulary):
        log_base = of_base.logits(part).log_softmax(dim=1)
        log_policy = of_policy.logits(part).log_softmax(dim=1).to(log_base.device)
        kl = (log_base.exp() * (log_base - log_policy)).sum(dim=1)
        sums.index_add_(0, rows[part].cpu(), kl.double().cpu())
    return sums


def _without_adapter(policy: torch.nn.Module) -> contextlib.AbstractContextManager[None]:
    """The policy is its base inside: `PeftModel` and `QAdapterForCausalLM` both can."""
    disable: Any = policy.disable_adapter
    found: contextlib.AbstractContextManager[None] = disable()
    return found


def _batch_of(
    rows: Sequence[tuple[list[int], int]], part: Sequence[int], tokenizer: PreTrainedTokenizerBase
) -> dict[str, Tensor]:
    return right_padded([rows[i] for i in part], padding_id(tokenizer))


def right_padded(rows: Sequence[tuple[list[int], int]], pad: int) -> dict[str, Tensor]:
    """A batch for `Predictions`.

    Args:
        rows: token ids of prompt and reply, and how many of them are the reply's.
        pad: id of the padding.

    Returns:
        `input_ids`, `attention_mask` and `response_mask`, each [R, T].
    """
    width = max(len(ids) for ids, _ in rows)
    at = torch.arange(width)
    ends = torch.tensor([len(ids) for ids, _ in rows])[:, None]
    starts = ends - torch.tensor([reply for _, reply in rows])[:, None]
    return {
        "input_ids": torch.tensor([ids + [pad] * (width - len(ids)) for ids, _ in rows]),
        "attention_mask": (at < ends).long(),
        "response_mask": (at >= starts) & (at < ends),
    }


def _carries_adapter_of(base: torch.nn.Module, policy: torch.nn.Module) -> bool:
    return base is not policy and any(module is base for module in policy.modules())
