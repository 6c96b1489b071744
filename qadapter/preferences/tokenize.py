"""From a preference pair to token ids, and from several to one padded batch.

What is written stands in `render.py`. The prompt is tokenised on its own, as generation tokenises it, and a reply is
the tokens that follow it: those of prompt and reply together where they begin with the prompt's, else (tokens that
would merge across the border, which generation never sees) those of the reply's own text.

Truncation keeps the responses. If prompt + longer reply exceed `max_length`, the prompt loses tokens from the left,
the same for both replies, so that its end (the generation prompt) stays; a reply of `max_length` tokens or more loses
tokens from the right, so that one prompt token is left to predict the first response token from. Every loss is counted.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from qadapter.preferences.pair import Message, PreferencePair
from qadapter.preferences.render import RenderError, prompt_text, rendered, turn_end

log = logging.getLogger(__name__)
_EMBEDDINGS = "_qadapter_embeddings"  # attribute of a tokenizer that has more tokens than its base


class UnusablePair(ValueError):  # noqa: N818 - it is no programming error: the pair goes to quarantine with this reason
    """A pair that nothing can be learnt from; the message is the reason."""


class UnrenderablePair(UnusablePair):
    """A pair that the tokenizer and its chat template have no form for; the message is the reason."""


@dataclass(frozen=True, slots=True)
class EncodedPair:
    """Token ids of one pair: a sequence is `prompt_ids` and then one of the replies; none of the three is empty.

    Attributes:
        prompt_ids, chosen_ids, rejected_ids: the tokens.
        lost_prompt: tokens that the prompt lost to `max_length`.
        lost_reply: tokens that the two replies lost, their ends included.
        lost_end: whether a reply lost nothing but its end.
    """

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    lost_prompt: int = field(default=0, compare=False)
    lost_reply: int = field(default=0, compare=False)
    lost_end: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class EncodedReply:
    """Token ids of a prompt and of one reply to it; `lost_…` as in `EncodedPair`."""

    prompt_ids: list[int]
    reply_ids: list[int]
    lost_prompt: int
    lost_reply: int
    lost_end: bool


@dataclass
class Truncation:
    """How many of some pairs, or of some single replies, lost tokens to `max_length`.

    Attributes:
        pairs: all of them.
        prompts: whose prompt lost its beginning.
        replies: of which a reply lost its end, or more.
        ends: of which a reply lost nothing but its end.
        cut: that lost anything.
    """

    pairs: int = 0
    prompts: int = 0
    replies: int = 0
    ends: int = 0
    cut: int = 0

    def metrics(self) -> dict[str, float]:
        """Under the names of `metrics.json`."""
        return {
            "train/truncated_prompts": float(self.prompts),
            "train/truncated_replies": float(self.replies),
            "train/truncated_ends": float(self.ends),
        }


def encode_pair(pair: PreferencePair, tokenizer: PreTrainedTokenizerBase, max_length: int) -> EncodedPair:
    """Token ids of a conversational pair, through the tokenizer's chat template if it has one.

    Args:
        pair: the pair.
        tokenizer: the policy's.
        max_length: most tokens of prompt + reply, at least 2; see the module's text on truncation.

    Raises:
        UnusablePair: a reply without a token, replies that are the same tokens, a prompt without a token, or messages
            that have no rendering.
    """
    _refuse_empty(pair.chosen, pair.rejected)
    templated = tokenizer.chat_template is not None
    try:
        prompt, chosen = rendered(tokenizer, pair.prompt, pair.chosen)
        _, rejected = rendered(tokenizer, pair.prompt, pair.rejected)
        prompt_ids = text_ids(tokenizer, prompt, templated)
        replies = [_reply_ids(tokenizer, prompt, prompt_ids, reply, templated) for reply in (chosen, rejected)]
    except RenderError as error:
        raise UnrenderablePair(str(error)) from error
    return _cut(prompt_ids, replies, _end_length(tokenizer), max_length)


def encode_texts(
    prompt: str, chosen: str, rejected: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> EncodedPair:
    """Token ids of a plain-string pair: the prompt, then the reply, then the end-of-sequence token.

    Args:
        prompt: text before the reply, as it is.
        chosen: preferred continuation; white space in front of it is part of it.
        rejected: the other continuation.
        tokenizer: the special tokens that it puts in front of a text by default stay in front of the prompt.
        max_length: as in `encode_pair`.

    Raises:
        UnusablePair: as `encode_pair`.
    """
    _refuse_empty(chosen, rejected)
    end = tokenizer.eos_token or ""
    closed = [reply if end and reply.endswith(end) else reply + end for reply in (chosen, rejected)]
    try:
        prompt_ids = text_ids(tokenizer, prompt, False)
        replies = [_reply_ids(tokenizer, prompt, prompt_ids, reply, False) for reply in closed]
    except RenderError as error:
        raise UnrenderablePair(str(error)) from error
    return _cut(prompt_ids, replies, bool(end), max_length)


def encode_reply(
    prompt: Sequence[Message], reply: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> tuple[list[int], list[int]]:
    """`encoded_reply`, as (prompt ids, reply ids)."""
    found = encoded_reply(prompt, reply, tokenizer, max_length)
    return found.prompt_ids, found.reply_ids


def encoded_reply(
    prompt: Sequence[Message], reply: str, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> EncodedReply:
    """Token ids of one reply to a prompt, rendered and cut as those of a pair.

    Raises:
        UnusablePair: a reply or a prompt without a token, or messages that have no rendering.
    """
    _refuse_empty(reply, reply)
    templated = tokenizer.chat_template is not None
    try:
        before, text = rendered(tokenizer, prompt, reply)
        ids = text_ids(tokenizer, before, templated)
        whole = _reply_ids(tokenizer, before, ids, text, templated)
    except RenderError as error:
        raise UnrenderablePair(str(error)) from error
    kept = whole[: max_length - 1]
    if not ids or not kept:
        raise UnusablePair("no prompt token or no reply token is left")
    room, lost = max_length - len(kept), len(whole) - len(kept)
    return EncodedReply(ids[-room:], kept, max(len(ids) - room, 0), lost, 0 < lost <= _end_length(tokenizer))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: Sequence[Message], **template: Any) -> list[int]:
    """The prompt as the tokens that generation starts from, and that training scores a reply behind.

    Args:
        tokenizer: the policy's.
        prompt: the conversation so far.
        template: variables for the chat template, such as `enable_thinking`.

    Raises:
        RenderError: the messages have no rendering, or not one token.
    """
    ids = text_ids(tokenizer, prompt_text(tokenizer, prompt, **template), tokenizer.chat_template is not None)
    if not ids:
        raise RenderError("the prompt has no token")
    return ids


def text_ids(tokenizer: PreTrainedTokenizerBase, text: str, templated: bool) -> list[int]:
    """Tokens of a rendered text that a reply can follow.

    Args:
        tokenizer: the policy's.
        text: a prompt, or a prompt and what follows it.
        templated: whether a chat template wrote it: it then holds its own special tokens. Else those that the tokenizer
            puts in front by default stand in front; those that it would append never do, as the text goes on.

    Raises:
        RenderError: the text cannot be tokenised, or has a token that the base has no embedding for.
    """
    bare = _ids(tokenizer, text)
    known = embeddings_of(tokenizer)
    if known is not None and bare and max(bare) >= known:
        raise RenderError(f"the tokenizer makes token id {max(bare)}, but the base has only {known} embeddings")
    appended = _ids(tokenizer, "")  # by a tokenizer that adds tokens although none are asked for
    if appended and bare[-len(appended) :] == appended:
        bare = bare[: -len(appended)]
    return bare if templated else [*_in_front(tokenizer), *bare]


def limit_ids(tokenizer: PreTrainedTokenizerBase, embeddings: int) -> None:
    """Note how many embeddings the base has: texts with a token beyond them have no token ids."""
    setattr(tokenizer, _EMBEDDINGS, embeddings)


def embeddings_of(tokenizer: Any) -> int | None:
    """How many embeddings the base has; None for a tokenizer whose tokens all have one."""
    known: int | None = getattr(tokenizer, _EMBEDDINGS, None)
    return known


@dataclass(frozen=True)
class EncodedPairList:
    """What became of some pairs.

    Attributes:
        indices: of the pairs that can be used, in the order given.
        pairs: their token ids.
        unusable: (index, reason) of the others.
        unrenderable: how many of those the tokenizer and its chat template have no form for.
    """

    indices: list[int]
    pairs: list[EncodedPair]
    unusable: list[tuple[int, str]]
    unrenderable: int


def encode_pairs(
    pairs: Iterable[PreferencePair], tokenizer: PreTrainedTokenizerBase, max_length: int
) -> EncodedPairList:
    """`encode_pair` of each pair; the ones that cannot be used are set aside with the reason."""
    found = EncodedPairList([], [], [], 0)
    unrenderable = 0
    for index, pair in enumerate(pairs):
        try:
            found.pairs.append(encode_pair(pair, tokenizer, max_length))
            found.indices.append(index)
        except UnusablePair as error:
            found.unusable.append((index, str(error)))
            unrenderable += isinstance(error, UnrenderablePair)
    return replace(found, unrenderable=unrenderable)


def truncation_of(pairs: Iterable[EncodedPair | EncodedReply]) -> Truncation:
    """What `max_length` took from these pairs or single replies."""
    counts = Truncation()
    for pair in pairs:
        counts.pairs += 1
        counts.prompts += pair.lost_prompt > 0
        counts.replies += pair.lost_reply > 0
        counts.ends += pair.lost_end
        counts.cut += pair.lost_prompt > 0 or pair.lost_reply > 0
    return counts


def beside_replies(prompts: Sequence[list[int]], wanted: int, max_length: int) -> tuple[list[list[int]], int]:
    """Prompts that leave room for generated replies, and the tokens that a reply may have.

    The room is what the longest prompt leaves of `max_length`, and at least half of it. Prompts that leave less lose
    their beginning, as in an evaluation; the room beside one long prompt would otherwise be that of every reply.

    Args:
        prompts: token ids.
        wanted: tokens of a reply, if there is room for them.
        max_length: most tokens of prompt and reply.
    """
    room = max(1, min(wanted, max(max_length // 2, max_length - max(map(len, prompts)))))
    kept = max_length - room
    cut = sum(len(prompt) > kept for prompt in prompts)
    if cut or room < wanted:
        log.warning(
            "max_length %d leaves own replies %d of %d tokens, and %d of %d prompts lose their beginning for them",
            max_length,
            room,
            wanted,
            cut,
            len(prompts),
        )
    return [prompt[-kept:] for prompt in prompts], room


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


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, **options: bool) -> list[int]:
    try:
        return list(tokenizer(text, **{"add_special_tokens": False, **options})["input_ids"])
    except (TypeError, UnicodeError) as error:
        raise RenderError(f"the tokenizer cannot read the text ({type(error).__name__})") from error


def _in_front(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The special tokens that the tokenizer puts in front of every text by default."""
    bare, whole = _ids(tokenizer, "a"), _ids(tokenizer, "a", add_special_tokens=True)
    places = (at for at in range(len(whole)) if whole[at : at + len(bare)] == bare)
    return whole[: next(places, 0)]


def _reply_ids(
    tokenizer: PreTrainedTokenizerBase, prompt: str, prompt_ids: list[int], reply: str, templated: bool
) -> list[int]:
    """Tokens of a reply behind exactly `prompt_ids`."""
    whole = text_ids(tokenizer, prompt + reply, templated)
    if whole[: len(prompt_ids)] == prompt_ids:
        return whole[len(prompt_ids) :]
    # A token would merge across the border; a policy that is asked never writes it.
    for anchor in ("", "\n", "a"):
        in_front = _ids(tokenizer, anchor) if anchor else []
        ids = _ids(tokenizer, anchor + reply)
        own = ids[len(in_front) :]
        if ids[: len(in_front)] == in_front and _text(tokenizer, [*prompt_ids, *own]) == _text(tokenizer, whole):
            return own
    raise RenderError("the tokenizer merges the end of the prompt with the beginning of the reply")


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))


def _end_length(tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of the end of a turn."""
    end = turn_end(tokenizer)
    return 1 if end.token is not None else len(_ids(tokenizer, end.text)) if end.text else 0


def _cut(prompt: list[int], replies: Sequence[list[int]], end: int, max_length: int) -> EncodedPair:
    if max_length < 2:
        raise ValueError(f"max_length is {max_length}; expected at least 2: one prompt token and one response token.")
    if not prompt:
        raise UnusablePair("no prompt token is left to predict the first response token from")
    chosen, rejected = (reply[: max_length - 1] for reply in replies)
    for name, reply in (("chosen", chosen), ("rejected", rejected)):
        if not reply:
            raise UnusablePair(f"the {name} reply has no token of its own behind the prompt")
    if chosen == rejected:
        raise UnusablePair(f"the two replies are the same tokens (within max_length {max_length})")
    room = max_length - max(len(chosen), len(rejected))
    lost = [len(whole) - len(kept) for whole, kept in zip(replies, (chosen, rejected), strict=True)]
    return EncodedPair(
        prompt[-room:],
        chosen,
        rejected,
        lost_prompt=max(len(prompt) - room, 0),
        lost_reply=sum(lost),
        lost_end=any(0 < one <= end for one in lost),
    )
