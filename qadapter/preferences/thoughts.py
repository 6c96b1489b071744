"""Thoughts of thinking models: in replies, and in generation prompts that open one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

NOTE = "qadapter_thoughts"
"""Key of a tokenizer's own config that says what happens to thoughts of replies: `score` or `leave-out`."""

_PAIRS = (
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<seed:think>", "</seed:think>"),
    ("<thinking>", "</thinking>"),
    ("<reasoning>", "</reasoning>"),
    ("<thought>", "</thought>"),
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
)


@dataclass(frozen=True)
class Thought:
    """A thought that a generation prompt opens.

    Attributes:
        opening: its text in the prompt, such as `<think>\\n`.
        tag, closing: what opens and closes it.
        closed: whether the prompt closes it as well (an empty thought: thinking is off).
    """

    opening: str
    tag: str
    closing: str
    closed: bool

    def continued_by(self, reply: str) -> str:
        """A reply with a thought as it continues after the opening, which is not repeated."""
        body = reply.strip()
        if body.startswith(self.tag):
            body = body.removeprefix(self.tag)
            body = body.lstrip("\n") if self.opening.endswith("\n") else body
        return body

    @property
    def ended(self) -> str:
        """What closes the thought empty."""
        return f"{'' if not self.opening.endswith(chr(10)) else chr(10)}{self.closing}\n\n"


def split(reply: str) -> tuple[str, str] | None:
    """Thought and answer of a reply that begins with a thought (its opening may be missing); None without one."""
    for tag, closing in _PAIRS:
        thought, found, answer = reply.partition(closing)
        if found and (thought.lstrip().startswith(tag) or tag not in thought):
            return thought.lstrip().removeprefix(tag).strip(), answer.strip()
    return None


def without(reply: str) -> str:
    """A reply without its thought."""
    parts = split(reply)
    return reply if parts is None else parts[1]


def opened_in(opening: str) -> tuple[str, Thought | None]:
    """The header of an answer, and the thought that the generation prompt opens behind it, if it does."""
    for tag, closing in _PAIRS:
        header, found, behind = opening.rpartition(tag)
        if not found:
            continue
        if not behind.strip():
            return header, Thought(tag + behind, tag, closing, closed=False)
        if behind.strip() == closing:
            return header, Thought(tag + behind, tag, closing, closed=True)
    return opening, None


def left_out(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether thoughts are dropped from replies before they are trained on or scored."""
    noted: Mapping[str, Any] = getattr(tokenizer, "init_kwargs", None) or {}
    return noted.get(NOTE) == "leave-out"
