"""Greedy replies to some prompts along a dial; what is known is not generated again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from qadapter.evaluation.curve.scaled import DialledTexts
from qadapter.inference.generate import context_of, only_as_asked, reply_text
from qadapter.policy.dial import Dial
from qadapter.preferences.pair import Message
from qadapter.preferences.render import end_ids
from qadapter.preferences.tokenize import padding_id, prompt_ids


class AskedPrompts:
    """The replies to some prompts at any value of a dial."""

    def __init__(
        self,
        texts: DialledTexts,
        tokenizer: PreTrainedTokenizerBase,
        prompts: Sequence[list[Message]],
        *,
        max_new_tokens: int,
        batch_size: int,
    ) -> None:
        self._texts, self._tokenizer, self._batch_size = texts, tokenizer, batch_size
        self._longest = max_new_tokens
        room = context_of(texts.policy) - max_new_tokens
        self._ids = [tuple(prompt_ids(tokenizer, prompt)[-room:]) for prompt in prompts]
        self._ends = end_ids(tokenizer, texts.policy.generation_config.eos_token_id)
        self._generation = GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=self._ends,
            pad_token_id=padding_id(tokenizer),
            do_sample=False,
        )

    def learn(self, replies: Sequence[str], value: float) -> None:
        """Take in replies that were given at a value; where one was written otherwise, that is found out here."""
        given = zip(self._ids, replies, strict=True)
        self._texts.learn([(ids, ended(self._tokenizer, reply)) for ids, reply in given if reply], value)

    def replies(self, value: float) -> list[str]:
        """The reply to each prompt at a value, as text (`generate.reply_text`)."""
        return [reply_text(self._tokenizer, answer[: self._longest], self._ends) for answer in self._answers(value)]

    def _whole(self, answer: tuple[int, ...]) -> bool:
        return answer[-1] in self._ends or len(answer) >= self._longest

    def _answers(self, value: float) -> list[tuple[int, ...]]:
        """The answer to each prompt at a value; those that are not known are generated, in batches."""
        known = dict(zip(self._ids, self._texts.answers(self._ids, value, self._whole), strict=True))
        found = {ids: answer for ids, answer in known.items() if answer is not None}
        open_ = [ids for ids in known if ids not in found]
        policy, pad = self._texts.policy, padding_id(self._tokenizer)
        for start in range(0, len(open_), self._batch_size):
            some = open_[start : start + self._batch_size]
            width = max(map(len, some))
            given = torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in some], device=policy.device)
            mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in some], device=policy.device)
            with torch.no_grad(), only_as_asked(policy):
                output = policy.generate(
                    input_ids=given,
                    attention_mask=mask,
                    generation_config=self._generation,
                    dial=Dial(self._texts.kind, value),
                )
            for ids, row in zip(some, output[:, width:].tolist(), strict=True):
                stop = next((place + 1 for place, token in enumerate(row) if token in self._ends), len(row))
                found[ids] = tuple(row[:stop])
        self._texts.learn([(ids, found[ids]) for ids in open_], value)
        self._texts.generated += len(open_)
        self._texts.reused += len(known) - len(open_)
        return [found[ids] for ids in self._ids]


def ended(tokenizer: PreTrainedTokenizerBase, answer: str) -> tuple[int, ...]:
    """An answer's tokens with the end of a turn."""
    ids: Any = tokenizer(answer, add_special_tokens=False)["input_ids"]
    end: Any = tokenizer.eos_token_id
    return (*ids, int(end))
