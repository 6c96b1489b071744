"""A reward model: how it is loaded, what reward it gives, how often it agrees with preference pairs."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from qadapter.config.model import ModelSettings
from qadapter.evaluation.preference import encode_usable
from qadapter.evaluation.prompts import by_prompt
from qadapter.evaluation.statistics import Interval, mean_interval, proportion_interval
from qadapter.inference.pair_scores import won
from qadapter.inference.score import device_of, evaluating, item_results
from qadapter.policy.loading import load_base
from qadapter.preferences.pair import PreferencePair
from qadapter.preferences.tokenize import UnusablePair, encode_reply, padding_id

ADAPTER = "reward_model"
"""Folder of the adapter and the head in what a training wrote."""

Floats = NDArray[np.float64]


def load_reward_base(base: str | Path, model: ModelSettings) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A base with a head of one number in place of its vocabulary; the head is random, drawn by torch's seed."""
    network, tokenizer = load_base(base, model, AutoModelForSequenceClassification, num_labels=1)
    network.config.get_text_config().pad_token_id = reward_padding(tokenizer)
    return network, tokenizer


def reward_padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token id to pad with that ends no reply.

    transformers reads the reward at the last token that is not the padding token, wherever it stands. Where a base pads
    with its end token, as many do, a reply that ends would have the reward of one that was cut off.
    """
    vocabulary = tokenizer.get_vocab()
    ends = {tokenizer.eos_token_id}
    with contextlib.suppress(UnusablePair):
        ends.add(encode_reply([{"role": "user", "content": "a"}], "a", tokenizer, 4096)[1][-1])
    zero_bytes = (vocabulary.get("<0x00>"), vocabulary.get("Ā"))  # with byte fallback, and as GPT-2 writes it
    named = (tokenizer.pad_token_id, tokenizer.bos_token_id, *zero_bytes, tokenizer.unk_token_id)
    return next((token for token in named if token is not None and token not in ends), padding_id(tokenizer))


def rewards(network: torch.nn.Module, rows: Sequence[list[int]], batch_size: int) -> Floats:
    """[n], the reward of each sequence of token ids.

    Args:
        network: from `load_reward_base`, with an adapter or without.
        rows: n sequences, not padded.
        batch_size: sequences a forward pass.
    """
    device = device_of(network)
    config: Any = network.config
    padding = config.get_text_config().pad_token_id

    def rewards_of(part: list[int]) -> list[float]:
        width = max(len(rows[i]) for i in part)
        ids = torch.tensor([rows[i] + [padding] * (width - len(rows[i])) for i in part], device=device)
        mask = torch.tensor([[1] * len(rows[i]) + [0] * (width - len(rows[i])) for i in part], device=device)
        found: list[float] = network(input_ids=ids, attention_mask=mask).logits.squeeze(-1).double().tolist()
        return found

    with evaluating(network):
        lengths = [len(row) for row in rows]
        found = item_results(lengths, batch_size, rewards_of, lambda i: rows[i], work="judging", unit="reply")
    return np.array(found, dtype=np.float64)


def pair_accuracy(
    network: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[PreferencePair],
    *,
    max_length: int,
    batch_size: int,
) -> Interval:
    """Share of pairs whose chosen reply has the higher reward, ties one half, with its interval.

    Wilson's over the pairs, as wide at least as a bootstrap over prompts: the pairs of one prompt often have a reply in
    common (DSP's four have the chosen one), so they are right or wrong together.

    Args:
        network: from `load_reward_base`, with an adapter or without.
        pairs: that it was not trained on; those that are too long to differ are left out.
        max_length: tokens of prompt and reply.
        batch_size: sequences a forward pass.
    """
    _, encoded = encode_usable(tokenizer, pairs, max_length)
    rows = [pair.prompt_ids + pair.chosen_ids for pair in encoded]
    rows += [pair.prompt_ids + pair.rejected_ids for pair in encoded]
    chosen, rejected = rewards(network, rows, batch_size).reshape(2, -1)
    right = won(chosen - rejected)
    prompts = by_prompt([tuple(pair.prompt_ids) for pair in encoded], range(len(encoded)))
    over_prompts = mean_interval(prompts.means(right), weights=prompts.pairs)
    return proportion_interval(float(right.sum()), len(encoded)).wider(over_prompts)
