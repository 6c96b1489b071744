"""Rows of one reply and a label (KTO): prompt, reply and label of each layout that has such rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from qadapter.preferences.building import Context, Record, history_messages, opening, side, system_of
from qadapter.preferences.pair import LabelledReply
from qadapter.preferences.records import Reason
from qadapter.preferences.turns import UnusableRecord, listed, prompt_of, without_end

_TRUE, _FALSE = frozenset({"true", "1", "1.0", "desirable"}), frozenset({"false", "0", "0.0", "-1", "undesirable"})


Split = Callable[[Record, Context], tuple[Any, Any, Any]]
"""From a record to prompt, reply and label. Where the layout has earlier turns of its own, the prompt is a list."""


def kto(record: Record, _: Context) -> tuple[Any, Any, Any]:
    """TRL: `prompt`, `completion`, `label`, as text or messages."""
    return record.get("prompt"), record.get("completion"), record.get("label")


def beavertails(record: Record, _: Context) -> tuple[Any, Any, Any]:
    """BeaverTails: `prompt`, `response`, `is_safe`."""
    return record.get("prompt"), record.get("response"), record.get("is_safe")


def labelled_dialogue(record: Record, _: Context) -> tuple[Any, Any, Any]:
    """ms-swift's `messages` with `label`, LLaMA-Factory's `messages` or `conversations` with `kto_tag`."""
    turns = listed(record.get("messages") if record.get("messages") is not None else record.get("conversations"))
    if not isinstance(turns, list) or len(turns) < 2:
        raise UnusableRecord(Reason.NOT_A_DIALOGUE)
    label = record.get("label") if record.get("label") is not None else record.get("kto_tag")
    return turns[:-1], [turns[-1]], label


def tagged_instruction(record: Record, _: Context) -> tuple[Any, Any, Any]:
    """LLaMA-Factory: `instruction`, `input`, `history`, `output`, `kto_tag`."""
    parts = [record.get("instruction"), record.get("input")]
    words = "\n".join(part for part in parts if isinstance(part, str) and part)
    prompt = [*history_messages(record.get("history")), {"role": "user", "content": words}]
    return prompt, record.get("output"), record.get("kto_tag")


def unpaired_reply(record: Record, context: Context, split: Split) -> LabelledReply:
    """A row as a reply and its label.

    Raises:
        UnusableRecord: with the reason.
    """
    prompt, reply, label = split(record, context)
    good = _label(label)
    turns = opening(context, prompt, system_of(record))
    if not turns or not all(turn["content"] for turn in turns):
        raise UnusableRecord(Reason.EMPTY_PROMPT)
    words = side(reply)
    if not isinstance(words, str):
        raise UnusableRecord(Reason.NOT_A_DIALOGUE)
    words = without_end(words)
    if not words:
        raise UnusableRecord(Reason.EMPTY_REPLY)
    return LabelledReply(tuple(prompt_of(turns)), words, good)


def _label(value: Any) -> bool:
    word = str(value).strip().lower()
    if value is None or isinstance(value, list | dict) or word not in _TRUE | _FALSE:
        raise UnusableRecord(Reason.NO_PREFERENCE)
    return word in _TRUE
