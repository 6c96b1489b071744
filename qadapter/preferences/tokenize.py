"""From a preference pair to token ids, and from several to one padded batch.

The ids are those TRL's DPO and SFT trainers see: the prompt and prompt + reply are tokenised on their own, and a
reply is what comes behind the longest beginning that all three share (tokens can merge across the border).

Truncation keeps the responses. If prompt + longer reply exceed `max_length`, the prompt loses tokens from the left,
the same for both replies, so that its end (the generation prompt) stays; a reply of `max_length` tokens or more loses
tokens from the right, so that one prompt token is left to predict the first response token from.

Without a chat template, a conversation is rendered as the plain transcript that HH-RLHF uses ("\\n\\nHuman: …\\n\\n
Assistant:"), a plain-string prompt is taken as it is, and the tokenizer's end-of-sequence token closes each reply.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from qadapter.preferences.pair import Message, PreferencePair

_SPEAKERS = {"system": "System", "user": "Human", "assistant": "Assistant"}


class UnusablePair(ValueError):  # noqa: N818 - it is no programming error: the pair goes to quarantine with this reason
    """A pair that nothing can be learnt from; the message is the reason."""


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """Token ids of one pair: a sequence is `prompt_ids` and then one of the replies; none of the three is empty."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


def encode_pair(pair: PreferencePair, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedPair:
    """Token ids of a conversational pair, through the tokenizer's chat template if it has one.

    Args:
        pair: the pair.
        tokenizer: its chat template renders the prompt with `add_generation_prompt`.
        max_length: most tokens of prompt + reply, at least 2; see the module's text on truncation.

    Raises:
        UnusablePair: a reply without a token, replies that are the same tokens, or a prompt without a token.
    """
    prompt = list(pair.prompt)
    if tokenizer.chat_template is None:
        rendered = plain_prompt(prompt)
        return encode_texts(rendered, " " + pair.chosen, " " + pair.rejected, tokenizer, max_length)
    _refuse_empty(pair.chosen, pair.rejected)
    prompt_ids = _template_ids(tokenizer, prompt, add_generation_prompt=True)
    with_replies = [
        _template_ids(tokenizer, [*prompt, {"role": "assistant", "content": reply}], add_generation_prompt=False)
        for reply in (pair.chosen, pair.rejected)
    ]
    return _split_and_cut(prompt_ids, with_replies[0], with_replies[1], max_length)


def encode_texts(
    prompt: str, chosen: str, rejected: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> EncodedPair:
    """Token ids of a plain-string pair: the prompt, then the reply, then the end-of-sequence token.

    Args:
        prompt: text before the reply, as it is.
        chosen: preferred continuation; white space in front of it is part of it.
        rejected: the other continuation.
        tokenizer: its own special tokens (a beginning-of-sequence token, say) are added as it does by default.
        max_length: as in `encode_pair`.

    Raises:
        UnusablePair: as `encode_pair`.
    """
    _refuse_empty(chosen, rejected)
    end = tokenizer.eos_token or ""
    closed = [prompt + (reply if end and reply.endswith(end) else reply + end) for reply in (chosen, rejected)]
    prompt_ids, chosen_ids, rejected_ids = (_ids(tokenizer(text)) for text in (prompt, *closed))
    return _split_and_cut(prompt_ids, chosen_ids, rejected_ids, max_length)


def encode_reply(
    prompt: Sequence[Message], reply: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[int], list[int]]:
    """Token ids of one reply to a prompt, rendered and cut as those of a pair: (prompt ids, reply ids).

    Raises:
        UnusablePair: a reply or a prompt without a token.
    """
    _refuse_empty(reply, reply)
    if tokenizer.chat_template is None:
        before = plain_prompt(prompt)
        prompt_ids, whole = _ids(tokenizer(before)), _ids(tokenizer(f"{before} {reply}{tokenizer.eos_token or ''}"))
    else:
        answered = [*prompt, {"role": "assistant", "content": reply}]
        prompt_ids = _template_ids(tokenizer, prompt, add_generation_prompt=True)
        whole = _template_ids(tokenizer, answered, add_generation_prompt=False)
    return _split_one(prompt_ids, whole, max_length)


def plain_prompt(messages: Sequence[Message]) -> str:
    """The transcript a conversation is rendered as where there is no chat template; it ends with "Assistant:"."""
    turns = [f"\n\n{_SPEAKERS[turn['role']]}: {turn['content']}" for turn in messages]
    return "".join(turns) + "\n\nAssistant:"


def collate_pairs(
    encoded: Sequence[EncodedPair], pad_token_id: int, pad_to_multiple_of: int | None = None
) -> dict[str, torch.Tensor]:
    """One right-padded batch of B pairs: rows 0 … B-1 chosen, rows B … 2B-1 their rejected partners.

    Args:
        encoded: B pairs.
        pad_token_id: fills the right; masked everywhere, so its value changes nothing.
        pad_to_multiple_of: T is rounded up to a multiple of it.

    Returns:
        `input_ids` [2B, T] int64, `attention_mask` [2B, T] int64, `response_mask` [2B, T] bool (True on reply tokens).
    """
    rows = [(pair.prompt_ids, pair.chosen_ids) for pair in encoded]
    rows += [(pair.prompt_ids, pair.rejected_ids) for pair in encoded]
    length = max(len(prompt) + len(reply) for prompt, reply in rows)
    if pad_to_multiple_of:
        length = -(-length // pad_to_multiple_of) * pad_to_multiple_of
    input_ids = torch.full((len(rows), length), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros((len(rows), length), dtype=torch.int64)
    response_mask = torch.zeros((len(rows), length), dtype=torch.bool)
    for row, (prompt, reply) in enumerate(rows):
        end = len(prompt) + len(reply)
        input_ids[row, :end] = torch.tensor(prompt + reply)
        attention_mask[row, :end] = 1
        response_mask[row, len(prompt) : end] = True
    return {"input_ids": input_ids, "attention_mask": attention_mask, "response_mask": response_mask}


@dataclass(frozen=True)
class PreferenceCollator:
    """`collate_pairs` as the data collator of a `DataLoader` or trainer.

    Attributes:
        pad_token_id: see `collate_pairs`.
        pad_to_multiple_of: see `collate_pairs`.
    """

    pad_token_id: int
    pad_to_multiple_of: int | None = None

    def __call__(self, pairs: Sequence[EncodedPair]) -> dict[str, torch.Tensor]:
        """Batch of these pairs."""
        return collate_pairs(pairs, self.pad_token_id, self.pad_to_multiple_of)


def padding_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """A token id to pad with: the pad token, else the end-of-sequence token, else 0."""
    candidates = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    return next((token for token in candidates if token is not None), 0)


def _refuse_empty(chosen: str, rejected: str) -> None:
    for name, reply in (("chosen", chosen), ("rejected", rejected)):
        if not reply.strip():
            raise UnusablePair(f"the {name} reply is empty")


def _template_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], **options: bool) -> list[int]:
    encoding: Any = tokenizer.apply_chat_template(list(messages), tokenize=True, return_dict=True, **options)  # type: ignore[arg-type]
    return _ids(encoding)


def _ids(encoding: Mapping[str, Any]) -> list[int]:
    return list(encoding["input_ids"])


def _shared_beginning(first: Sequence[int], second: Sequence[int]) -> int:
    for position, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return position
    return min(len(first), len(second))


def _split_and_cut(prompt: list[int], with_chosen: list[int], with_rejected: list[int], max_length: int) -> EncodedPair:
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}; expected at least 2: one prompt token and one response token.")
    border = min(_shared_beginning(prompt, with_chosen), _shared_beginning(prompt, with_rejected))
    if border == 0:
        raise UnusablePair("no prompt token is left to predict the first response token from")
    chosen, rejected = (sequence[border:][: max_length - 1] for sequence in (with_chosen, with_rejected))
    for name, reply in (("chosen", chosen), ("rejected", rejected)):
        if not reply:
            raise UnusablePair(f"the {name} reply has no token of its own behind the prompt")
    if chosen == rejected:
        raise UnusablePair(f"the two replies are the same tokens (within max_length {max_length})")
    room = max_length - max(len(chosen), len(rejected))
    return EncodedPair(prompt[:border][-room:], chosen, rejected)


def _split_one(prompt: list[int], whole: list[int], max_length: int) -> tuple[list[int], list[int]]:
    border = _shared_beginning(prompt, whole)
    reply = whole[border:][: max_length - 1]
    if border == 0 or not reply:
        raise UnusablePair("no prompt token or no reply token is left")
    return prompt[:border][-(max_length - len(reply)) :], reply
