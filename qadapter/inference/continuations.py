"""Continue sequences of token ids: rollouts of a policy as tokens, without a text in between."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedTokenizerBase

from qadapter.inference.generate import context_of, generation_settings, left_padded, only_as_asked
from qadapter.inference.score import device_of, evaluating, item_results


def continue_ids(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    rows: Sequence[list[int]],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float,
    seed: int,
) -> list[list[int]]:
    """Generate behind each row, in the rows' order.

    Args:
        model: any policy that can `generate`.
        tokenizer: its tokenizer.
        rows: token ids, at least one each.
        max_new_tokens: longest continuation. It is shorter where the model's context ends before; in a batch, where it
            ends for the longest row.
        batch_size: rows per batch; a batch contains rows of similar length.
        temperature: 0 takes the most likely token at each step; above 0, tokens are sampled from the full distribution.
        seed: of the sampling; torch's own random state stays as it is.

    Returns:
        The new tokens of each row, with the end token where one was generated.
    """
    settings = generation_settings(model, tokenizer, max_new_tokens, temperature)
    device = device_of(model)

    def continued(part: list[int]) -> list[list[int]]:
        batch = left_padded([rows[index] for index in part], settings.pad_token_id, device)
        room = context_of(model) - batch["input_ids"].shape[1]  # learnt positions fail behind their end
        settings.max_new_tokens = max(1, min(max_new_tokens, room))
        output = model.generate(**batch, generation_config=settings)  # type: ignore[operator]
        found = []
        for new in output[:, batch["input_ids"].shape[1] :].tolist():
            stop = next((place for place, token in enumerate(new) if token in settings.eos_token_id), len(new))
            found.append(new[: stop + 1])
        return found

    devices = [device] if device.type == "cuda" else []
    with evaluating(model), only_as_asked(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        return item_results(
            [len(row) for row in rows],
            batch_size,
            continued,
            lambda index: [list(rows[index]), max_new_tokens, temperature, seed],
            work="sampling",
            unit="continuation",
            sampled=temperature > 0,
        )
