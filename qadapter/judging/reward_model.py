"""A reward model as judge: the answer with the higher reward wins. Trained by `qadapter.judging.reward_training`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from qadapter.config.evaluation import Judge
from qadapter.config.model import ModelSettings
from qadapter.evaluation.preference import encode_usable
from qadapter.evaluation.statistics import Interval, proportion_interval
from qadapter.files.artifacts import read_json
from qadapter.inference.score import by_length, device_of, evaluating
from qadapter.judging.verdicts import Prompts, Verdict, by_score
from qadapter.policy.loading import load_base
from qadapter.preferences.pair import Message, PreferencePair
from qadapter.preferences.tokenize import UnusablePair, encode_reply, padding_id

ADAPTER = "reward_model"
"""Folder of the adapter and the head in what a training wrote."""

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class RewardJudge:
    """The higher reward wins.

    Attributes:
        folder: what `train_reward_model` wrote.
        base: the model that the reward model is an adapter of, a folder or a hub id.
        model: its precision.
        max_length: tokens of a prompt and a reply, as in training.
        batch_size: conversations a forward pass.
    """

    folder: Path
    base: str | Path
    model: ModelSettings
    max_length: int
    batch_size: int
    name: ClassVar[Judge] = "reward-model"

    def verdicts(self, prompts: Prompts, base: Sequence[str], replies: Sequence[str]) -> list[Verdict]:
        """See `AnswerJudge`. A reply without a word is worth less than any other."""
        network, tokenizer = load_reward_base(self.base, self.model)
        network = PeftModel.from_pretrained(network, self.folder / ADAPTER)  # type: ignore[assignment]

        def encoded(prompt: Sequence[Message], reply: str) -> tuple[int, ...]:
            try:
                before, after = encode_reply(prompt, reply, tokenizer, self.max_length)
            except UnusablePair:
                return ()
            return (*before, *after)

        pairs = [(encoded(p, mine), encoded(p, its)) for p, mine, its in zip(prompts, replies, base, strict=True)]
        # Each text once: a batch's padding moves a reward by its rounding, and equal texts have one reward.
        texts = sorted({text for pair in pairs for text in pair if text})
        found = rewards(network, [list(text) for text in texts], padding_id(tokenizer), self.batch_size)
        worth = {(): -math.inf, **dict(zip(texts, found.tolist(), strict=True))}
        return [by_score(worth[mine], worth[its]) for mine, its in pairs]

    def metrics(self) -> dict[str, float]:
        """`adaptation/judge_accuracy`: how often it prefers the chosen reply of a held-out pair; chance is one half.

        With it `…_low` and `…_high`, its interval, and `…_n`, the number of pairs.
        """
        found = read_json(self.folder / "metrics.json")
        names = ("accuracy", "accuracy_low", "accuracy_high", "accuracy_n")
        return {f"adaptation/judge_{name}": float(found[f"judge/{name}"]) for name in names}


def load_reward_base(base: str | Path, model: ModelSettings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base with a head of one number in place of its vocabulary; the head is random, drawn by torch's seed."""
    network, tokenizer = load_base(base, model, AutoModelForSequenceClassification, num_labels=1)
    network.config.pad_token_id = padding_id(tokenizer)  # the reward is read at the last token that is not padding
    return network, tokenizer


def rewards(network: torch.nn.Module, rows: Sequence[list[int]], padding: int, batch_size: int) -> Floats:
    """[n], the reward of each sequence of token ids.

    Args:
        network: with a head of one number.
        rows: n sequences, not padded.
        padding: token to fill up with, on the right.
        batch_size: sequences a forward pass.
    """
    result = np.zeros(len(rows))
    device = device_of(network)
    with evaluating(network):
        for some in by_length([len(row) for row in rows], batch_size):
            width = max(len(rows[i]) for i in some)
            ids = torch.tensor([rows[i] + [padding] * (width - len(rows[i])) for i in some], device=device)
            mask = torch.tensor([[1] * len(rows[i]) + [0] * (width - len(rows[i])) for i in some], device=device)
            result[some] = network(input_ids=ids, attention_mask=mask).logits.squeeze(-1).double().cpu().numpy()
    return result


def pair_accuracy(
    network: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    *,
    max_length: int,
    batch_size: int,
) -> Interval:
    """Share of pairs whose chosen reply has the higher reward, ties one half, with Wilson's interval.

    Args:
        network: with a head of one number.
        pairs: that it was not trained on; those that are too long to differ are left out.
        max_length: tokens of prompt and reply.
        batch_size: sequences a forward pass.
    """
    _, encoded = encode_usable(tokenizer, pairs, max_length)
    rows = [pair.prompt_ids + pair.chosen_ids for pair in encoded]
    rows += [pair.prompt_ids + pair.rejected_ids for pair in encoded]
    chosen, rejected = rewards(network, rows, padding_id(tokenizer), batch_size).reshape(2, -1)
    return proportion_interval(float(((np.sign(chosen - rejected) + 1) / 2).sum()), len(encoded))
