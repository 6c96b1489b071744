"""From a preference data set in any of TRL's forms to token ids, with what could not be used set aside."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from qadapter.errors import QAdapterError
from qadapter.preferences.pair import Message, PreferencePair
from qadapter.preferences.tokenize import EncodedPair, UnusablePair, encode_pair, encode_texts

log = logging.getLogger(__name__)


class EncodedPairs(Dataset[EncodedPair]):
    """Pairs as token ids.

    Attributes:
        quarantined: (index in the given data, reason) of every pair that was left out.
    """

    def __init__(self, pairs: Sequence[EncodedPair], quarantined: Sequence[tuple[int, str]] = ()) -> None:
        self._pairs = list(pairs)
        self.quarantined = list(quarantined)

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> EncodedPair:
        return self._pairs[index]

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt + reply."""
        return max(len(p.prompt_ids) + max(len(p.chosen_ids), len(p.rejected_ids)) for p in self._pairs)

    @property
    def largest_id(self) -> int:
        """The largest token id."""
        return max(max(*p.prompt_ids, *p.chosen_ids, *p.rejected_ids) for p in self._pairs)


def encode_dataset(
    rows: Iterable[Mapping[str, Any] | PreferencePair],
    tokenizer: PreTrainedTokenizerBase,
    max_length: int,
    name: str = "train",
) -> EncodedPairs:
    """Tokenise every row; the ones that cannot be used are counted, named and left out.

    Args:
        rows: `PreferencePair`s, or mappings with `prompt`, `chosen` and `rejected` as messages or as plain strings;
            without `prompt` it is what the two replies begin with in common.
        tokenizer: as in `encode_pair`.
        max_length: as in `encode_pair`.
        name: what to call the data in messages.

    Raises:
        QAdapterError: no row can be used.
    """
    pairs, quarantined = [], []
    for index, row in enumerate(rows):
        try:
            pairs.append(_encode_row(row, tokenizer, max_length))
        except UnusablePair as unusable:
            quarantined.append((index, str(unusable)))
    if not pairs:
        first = f"; the first because {quarantined[0][1]}" if quarantined else ""
        raise QAdapterError(
            f"The {name} data have no usable pair ({len(quarantined)} rows, all unusable{first}). Expected rows with "
            "prompt, chosen and rejected, as messages or as text."
        )
    if quarantined:
        index, reason = quarantined[0]
        log.warning(
            "%d of %d %s pairs are unusable and left out, the first at index %d: %s",
            len(quarantined),
            len(quarantined) + len(pairs),
            name,
            index,
            reason,
        )
    return EncodedPairs(pairs, quarantined)


def _encode_row(
    row: Mapping[str, Any] | PreferencePair, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> EncodedPair:
    if isinstance(row, PreferencePair):
        return encode_pair(row, tokenizer, max_length)
    for key in ("chosen", "rejected"):
        if not isinstance(row.get(key), (str, list, tuple)):
            raise UnusablePair(f"{key!r} is {type(row.get(key)).__name__}, neither messages nor text")
    chosen, rejected, prompt = row["chosen"], row["rejected"], row.get("prompt")
    if isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str):
        return encode_texts(prompt, chosen, rejected, tokenizer, max_length)
    if prompt is None and isinstance(chosen, str) and isinstance(rejected, str):
        border = _common_text(chosen, rejected)
        return encode_texts(chosen[:border], chosen[border:], rejected[border:], tokenizer, max_length)
    if prompt is None and not isinstance(chosen, str) and not isinstance(rejected, str):
        border = _common_turns(chosen, rejected)
        prompt, chosen, rejected = chosen[:border], chosen[border:], rejected[border:]
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    pair = PreferencePair(_messages(messages), _reply("chosen", chosen), _reply("rejected", rejected))
    return encode_pair(pair, tokenizer, max_length)


def _messages(turns: Any) -> tuple[Message, ...]:
    if not isinstance(turns, (list, tuple)) or not turns:
        raise UnusablePair("the prompt is missing or empty")
    for turn in turns:
        if not isinstance(turn, Mapping) or not isinstance(turn.get("content"), str):
            raise UnusablePair("a message of the prompt has no text content")
        if turn.get("role") not in ("system", "user", "assistant"):
            raise UnusablePair(f"a message of the prompt has role {turn.get('role')!r}")
    return tuple(cast(Message, {"role": turn["role"], "content": turn["content"]}) for turn in turns)


def _reply(name: str, reply: Any) -> str:
    if isinstance(reply, str):
        return reply
    if len(reply) != 1:
        raise UnusablePair(f"the {name} reply has {len(reply)} messages; expected one")
    turn = reply[0]
    if not isinstance(turn, Mapping) or turn.get("role") != "assistant" or not isinstance(turn.get("content"), str):
        raise UnusablePair(f"the {name} reply is no assistant message with text content")
    return str(turn["content"])


def _common_turns(chosen: Sequence[Any], rejected: Sequence[Any]) -> int:
    # At most all but the last turn: replies that are equal make an unusable pair, not one without replies.
    limit = min(len(chosen), len(rejected)) - 1
    return next((i for i in range(limit) if chosen[i] != rejected[i]), max(limit, 0))


def _common_text(chosen: str, rejected: str) -> int:
    """Where the prompt ends: behind the longest common beginning, but in front of a space (as TRL does)."""
    limit = min(len(chosen), len(rejected))
    border = next((i for i in range(limit) if chosen[i] != rejected[i]), limit)
    return border - 1 if border and chosen[border - 1] == " " else border
