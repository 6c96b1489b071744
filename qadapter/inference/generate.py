"""Generate a policy's replies to many prompts, in batches."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedTokenizerBase

from qadapter.errors import QAdapterError
from qadapter.inference.score import device_of, evaluating, item_results
from qadapter.policy.positions import position_limit
from qadapter.preferences.pair import Message
from qadapter.preferences.render import RenderError, end_ids, turn_end
from qadapter.preferences.tokenize import padding_id, prompt_ids

log = logging.getLogger(__name__)
_TRIES = 3


class Generated(NamedTuple):
    """A generated reply: its text, and whether it ended by itself, before the longest reply's length cut it off."""

    text: str
    ended: bool


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
    """The texts of `generate_with_ends`, which see."""
    found = generate_with_ends(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        seed=seed,
    )
    return [reply.text for reply in found]


def generate_with_ends(
    model: torch.nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[Message]],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    seed: int = 0,
) -> list[Generated]:
    """Generate one reply per prompt, in the prompts' order, without the end-of-turn token and surrounding white space.

    Args:
        model: any policy that can `generate`.
        prompts: conversations whose last turn is the user's.
        max_new_tokens: longest reply in tokens; longer ones are cut off. A prompt that leaves no room for the reply in
            the model's context loses its beginning. A prompt that cannot be rendered (because its chat template refuses
            it, for example) gets an empty reply. The numbers of both are logged, the second with a reason.
        batch_size: prompts per batch; a batch contains prompts of similar length.
        temperature: 0 takes the most likely token at each step; above 0, tokens are sampled from the full distribution.
        seed: seed of the sampling; the same seed, prompts and batch size give the same replies.

    Raises:
        QAdapterError: the model's context is not longer than a reply.
    """
    room = context_of(model) - max_new_tokens
    if room < 1:
        raise QAdapterError(
            f"Replies of {max_new_tokens} tokens do not fit into the model's context of {context_of(model)} with a "
            f"prompt. Set a smaller max_new_tokens."
        )
    settings = generation_settings(model, tokenizer, max_new_tokens, temperature)
    ids = _readable(tokenizer, prompts, room)
    replies = [Generated("", ended=False)] * len(prompts)
    device, places = device_of(model), list(ids)

    def answer(part: list[int]) -> list[Generated]:
        batch = left_padded([ids[places[index]] for index in part], settings.pad_token_id, device)
        output = model.generate(**batch, generation_config=settings)  # type: ignore[operator]
        rows = output[:, batch["input_ids"].shape[1] :].tolist()
        return [_generated(tokenizer, row, settings.eos_token_id) for row in rows]

    devices = [device] if device.type == "cuda" else []
    with evaluating(model), only_as_asked(model), torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        found = item_results(
            [len(ids[place]) for place in places],
            batch_size,
            answer,
            lambda index: [ids[places[index]], max_new_tokens, temperature, seed],
            work="answering",
            unit="prompt",
            sampled=temperature > 0,
        )
    for place, (text, ended) in zip(places, found, strict=True):
        replies[place] = Generated(text, ended)
    return replies


def decoding_speed(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[Message]], *, tokens: int
) -> float | None:
    """Tokens per second of one reply with a cache, its prompt's tokens included in the time; the fastest of three.

    Each policy writes as many tokens to the same prompt, past the end of a reply. The time of real replies would tell
    how long these are: a batch runs until its last reply ends.

    Args:
        model: as in `generate_with_ends`.
        prompts: the first one that can be rendered is used.
        tokens: to write.

    Returns:
        The speed; None where no prompt can be rendered.
    """
    readable = next((prompt for prompt in prompts if why_not(tokenizer, prompt) is None), None)
    if readable is None:
        return None
    settings = generation_settings(model, tokenizer, tokens, 0.0)
    settings.eos_token_id = None
    ids = prompt_ids(tokenizer, readable)[-max(1, context_of(model) - tokens) :]
    batch = left_padded([ids], settings.pad_token_id, device_of(model))
    seconds = []
    with evaluating(model), only_as_asked(model):
        for count in (min(2, tokens), *[tokens] * _TRIES):  # the first pass pays for what is set up once
            settings.max_new_tokens = count
            start = time.perf_counter()
            model.generate(**batch, generation_config=settings).tolist()  # type: ignore[operator]
            seconds.append(time.perf_counter() - start)
    return tokens / min(seconds[1:])  # other work of the machine makes a trial slower, and never faster


def reply_text(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], ends: Sequence[int]) -> str:
    """The text of generated tokens up to the first end of a turn, without white space around it."""
    return _generated(tokenizer, ids, ends).text


def _generated(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], ends: Sequence[int]) -> Generated:
    stop = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    text = str(tokenizer.decode(list(ids[:stop]), skip_special_tokens=True))
    ended = stop < len(ids)
    closing = turn_end(tokenizer)
    if closing.token is None and closing.text:
        text, found, _ = text.partition(closing.text.strip())
        ended = ended or bool(found)
    return Generated(text.strip(), ended)


def longest_reply(wanted: int, context: int, *, asked_for: bool) -> int:
    """Tokens that a reply may have in a context.

    Args:
        wanted: the setting's value.
        context: tokens of prompt and reply together.
        asked_for: whether the user set the value. A default that leaves too little room for a prompt becomes half the
            context.

    Raises:
        QAdapterError: the user asked for more tokens than fit into the context.
    """
    if wanted < context and (asked_for or wanted <= context // 2):
        return wanted
    if not asked_for:
        return max(1, min(wanted, context // 2))
    raise QAdapterError(
        f"Replies of {wanted} tokens do not fit into the model's context of {context} with a prompt. Set a smaller "
        "max_new_tokens."
    )


def why_not(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message]) -> str | None:
    """The reason why a prompt cannot be rendered; None if it can."""
    try:
        prompt_ids(tokenizer, prompt)
    except RenderError as error:
        return str(error)
    return None


def _readable(
    tokenizer: PreTrainedTokenizerBase, prompts: Sequence[Sequence[Message]], room: int
) -> dict[int, list[int]]:
    """Index → token ids of the prompts that can be rendered; logs how many were cut or skipped."""
    ids: dict[int, list[int]] = {}
    refused: list[str] = []
    shortened = 0
    for place, prompt in enumerate(prompts):
        try:
            whole = prompt_ids(tokenizer, prompt)
        except RenderError as error:
            refused.append(f"prompt {place}: {error}")
            continue
        shortened += len(whole) > room
        ids[place] = whole[-room:]
    if refused:
        log.warning(
            "%d of %d prompts cannot be asked and get an empty reply; %s", len(refused), len(prompts), refused[0]
        )
    if shortened:
        log.warning(
            "%d of %d prompts are longer than the %d tokens that the context leaves beside a reply and lose their "
            "beginning",
            shortened,
            len(prompts),
            room,
        )
    return ids


def left_padded(rows: Sequence[list[int]], pad: int, device: torch.device) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask`, [B, T] int64, of rows of token ids, which end in the last column."""
    width = max(len(row) for row in rows)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in rows], device=device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows], device=device)
    return {"input_ids": ids, "attention_mask": mask}


def generation_settings(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float
) -> GenerationConfig:
    """Generation settings, for `only_as_asked`; of a model's own, its additional end tokens are among them."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=end_ids(tokenizer, own),
        pad_token_id=padding_id(tokenizer),
        use_cache=True,
        **(sampling or {"do_sample": False}),
    )


@contextmanager
def only_as_asked(model: Any) -> Iterator[None]:
    """Within the block the model generates as it is asked, and as nothing else.

    transformers takes what a call leaves open from the base's `generation_config.json`: penalties, beams, tokens that
    are never written. They are no part of the distribution that is trained and measured.
    """
    own = getattr(model, "generation_config", None)
    if own is None:
        yield
        return
    base = model.get_base_model() if isinstance(model, PeftModel) else model  # PEFT's `generate` gives its own to it
    of_base = base.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config, base.generation_config = own, of_base


def context_of(model: torch.nn.Module) -> int:
    """Longest sequence of a model, prompt and reply together, in tokens."""
    return position_limit(model.config) or 2**30  # type: ignore[arg-type]
