"""What a dial does to text of the old distribution: divergence from the base, answers that stay, refusals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qadapter.config.evaluation import RetentionSettings
from qadapter.evaluation.curve.asked import AskedPrompts
from qadapter.evaluation.curve.both_rows import ENDS, DialledPolicy, Text, rows_at
from qadapter.evaluation.curve.points import Measure
from qadapter.evaluation.curve.scaled import DialledTexts
from qadapter.evaluation.divergence import usable_replies
from qadapter.evaluation.old_answers import LONGEST_ANSWER
from qadapter.evaluation.preference import askable_pairs
from qadapter.evaluation.refusals import is_refusal
from qadapter.files.artifacts import read_json_lines
from qadapter.policy.dial import Dial
from qadapter.preferences.pair import load_pairs
from qadapter.preferences.tokenize import padding_id

_LOGITS_OF_A_TOKEN = 2**16
"""Of all scales whose passes are compared with the base's at once."""


class OldText:
    """Held-out conversations of the old distribution along one dial."""

    def __init__(
        self,
        texts: DialledTexts,
        tokenizer: PreTrainedTokenizerBase,
        old_texts: Path,
        settings: RetentionSettings,
        max_length: int,
        known: Path | None,
    ) -> None:
        """Read the conversations.

        Args:
            texts: of the dial.
            tokenizer: the policy's.
            old_texts, settings, max_length: as in `measure_retention`.
            known: what `measure_retention` wrote for the policy as trained.
        """
        pairs = load_pairs(old_texts)
        self._texts = texts
        self._batch_size = 8 if settings.batch_size == "auto" else settings.batch_size
        self._pad = padding_id(tokenizer)
        conversations = [(pair.prompt, pair.chosen) for pair in pairs[: settings.limit]]
        _, encoded = usable_replies(tokenizer, conversations, max_length)
        self._replies: list[Text] = [(tuple(prompt), tuple(reply)) for prompt, reply in encoded]
        asked = askable_pairs(tokenizer, pairs, settings.answers) if settings.answers else []
        prompts = [list(pair.prompt) for pair in asked]
        longest = settings.max_new_tokens or LONGEST_ANSWER
        self._asked = AskedPrompts(texts, tokenizer, prompts, max_new_tokens=longest, batch_size=self._batch_size)
        rows = read_json_lines(known / "old_answers.jsonl") if known and prompts else []
        for side, value in (("base", 0.0), ("reply", 1.0)) if rows else ():
            self._asked.learn([row[side] for row in rows], value)
        self._of_base = self._asked.replies(0.0)

    def answers(self, value: float) -> tuple[Measure, Measure] | None:
        """Whether each of the base's answers stays the same, and whether each is a refusal; None: nothing was asked."""
        if not self._of_base:
            return None
        replies = self._asked.replies(value)
        same = [float(reply == before) for reply, before in zip(replies, self._of_base, strict=True)]
        return Measure((), tuple(same)), Measure((), tuple(float(is_refusal(reply)) for reply in replies))

    def divergences(self, values: Sequence[float]) -> Sequence[float | None]:
        """KL(base ‖ policy) per token at each value, in nats; None where there is no reply to take it on."""
        if not self._replies:
            return [None] * len(values)
        return kl_along(
            self._texts.policy,
            [Dial(self._texts.kind, value) for value in values],
            self._replies,
            pad=self._pad,
            batch_size=self._batch_size,
        )


def kl_along(
    policy: DialledPolicy, dials: Sequence[Dial], texts: Sequence[Text], *, pad: int, batch_size: int
) -> list[float]:
    """KL(base ‖ policy) of the next token at each token of given replies, at several dials of one kind, in nats.

    All weights on Q come from one pass of base and policy; each scale needs one of its own.

    Args:
        policy: any; its own dial does not matter.
        dials: where it is measured.
        texts: prompts and replies.
        pad: id of the padding.
        batch_size: conversations per forward pass.
    """
    found = np.zeros(len(dials))
    tokens = max(1, sum(len(reply) for _, reply in texts))
    open_ = [place for place, dial in enumerate(dials) if dial.value]  # at 0 it is the base itself
    if not open_ or not texts:
        return found.tolist()
    if dials[open_[0]].kind == "q-weight":
        for _, (base, trained), _ in rows_at(policy, ENDS, texts, pad=pad, batch_size=batch_size):
            log_base = base.log_softmax(dim=1)
            for place in open_:
                found[place] += _kl(log_base, torch.lerp(base, trained, float(dials[place].value)))
        return (found / tokens).tolist()
    together = max(1, _LOGITS_OF_A_TOKEN // int(policy.config.get_text_config().vocab_size))
    for start in range(0, len(open_), together):
        some = open_[start : start + together]
        sides = [ENDS[0], *(dials[place] for place in some)]
        for _, (base, *moved), _ in rows_at(policy, sides, texts, pad=pad, batch_size=batch_size):
            log_base = base.log_softmax(dim=1)
            for place, logits in zip(some, moved, strict=True):
                found[place] += _kl(log_base, logits)
    return (found / tokens).tolist()


def _kl(log_base: Tensor, logits: Tensor) -> float:
    """Σ over tokens, of [N, V] log-probabilities of the base and logits of the policy."""
    return float((log_base.exp() * (log_base - logits.log_softmax(dim=1))).sum(dim=1).double().sum())
