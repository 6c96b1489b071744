"""Replies of a policy to many prompts, in batches."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase

from qadapter.errors import QAdapterError
from qadapter.inference.prompts import prompt_ids
from qadapter.inference.score import by_length, device_of, evaluating
from qadapter.preferences.pair import Message
from qadapter.preferences.tokenize import padding_id


def generate_replies(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[str]:
    """One reply to each prompt, in the prompts' order, without the end-of-turn token and white space around it.

    Args:
        model: any policy that can `generate`.
        prompts: conversations whose last turn is the user's.
        max_new_tokens: longest reply; what is longer is cut off. A prompt that leaves no room for it in the model's
            context loses its beginning.
        batch_size: prompts a batch; batches are of similar length.
        temperature: 0 takes the most likely token at each step, above 0 samples from the whole distribution.
        seed: of the sampling; the same seed, prompts and batch size give the same replies.

    Raises:
        QAdapterError: the model's context is not longer than a reply.
    """
    room = _context(model) - max_new_tokens
    if room < 1:
        raise QAdapterError(
            f"Replies of {max_new_tokens} tokens do not fit into the model's context of {_context(model)} with a "
            f"prompt. Set a smaller max_new_tokens."
        )
    settings = _settings(model, tokenizer, max_new_tokens, temperature)
    ids = [prompt_ids(tokenizer, prompt)[-room:] for prompt in prompts]
    replies = [""] * len(prompts)
    device = device_of(model)
    with evaluating(model), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        for some in by_length([len(row) for row in ids], batch_size):
            batch = _left_padded([ids[i] for i in some], settings.pad_token_id, device)
            output = model.generate(**batch, generation_config=settings)  # type: ignore[operator]
            for i, row in zip(some, output[:, batch["input_ids"].shape[1] :].tolist(), strict=True):
                replies[i] = str(tokenizer.decode(row, skip_special_tokens=True)).strip()
    return replies


def _left_padded(rows: Sequence[list[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def _settings(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float
) -> GenerationConfig:
    """Generation settings that leave nothing to a model's own defaults but its further end tokens."""
    ends = {*_as_list(getattr(getattr(model, "generation_config", None), "eos_token_id", None))}
    ends |= {*_as_list(tokenizer.eos_token_id)}
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(ends),
        pad_token_id=padding_id(tokenizer),
        use_cache=True,
        **(sampling or {"do_sample": False}),
    )


def _as_list(value: int | Iterable[int] | None) -> list[int]:
    if value is None:
        return []
    return [value] if isinstance(value, int) else list(value)


def _context(model: torch.nn.Module) -> int:
    return int(getattr(model.config, "max_position_embeddings", None) or 2**30)
