"""A preference pair: the one record every data format is turned into."""

from __future__ import annotations

import hashlib
import json
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypedDict

from qadapter.errors import QAdapterError

Role = Literal["system", "user", "assistant"]


class Message(TypedDict):
    """One turn of a conversation, as chat templates take it."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """Two replies to the same conversation, the first preferred to the second.

    Attributes:
        prompt: the conversation so far; its last turn is the user's.
        chosen: text of the preferred reply.
        rejected: text of the other reply.
        margin: by how much the source prefers it, in the source's own unit (a difference of scores, a strength); None
            where the source does not say. No part of the pair's identity: equal texts are equal pairs.
        votes: how many annotators gave this (unanimous) judgement, where the source lists them.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    margin: float | None = field(default=None, compare=False)
    votes: int | None = field(default=None, compare=False)

    @property
    def prompt_digest(self) -> str:
        """See `prompt_digest`."""
        return prompt_digest(self.prompt)

    def to_trl(self) -> dict[str, list[Message]]:
        """The pair in TRL's conversational preference format (explicit prompt)."""
        return {
            "prompt": list(self.prompt),
            "chosen": [{"role": "assistant", "content": self.chosen}],
            "rejected": [{"role": "assistant", "content": self.rejected}],
        }

    def to_row(self) -> dict[str, Any]:
        """The pair as this project writes it: `to_trl`, and margin and votes where the source has them."""
        row: dict[str, Any] = dict(self.to_trl())
        if self.margin is not None:
            row["margin"] = self.margin
        if self.votes is not None:
            row["votes"] = self.votes
        return row

    @classmethod
    def from_trl(cls, row: dict[str, Any]) -> PreferencePair:
        """Inverse of `to_row` and `to_trl`, for files this project wrote itself (`reading.py` reads the others)."""
        chosen, rejected = (row[side][0]["content"] for side in ("chosen", "rejected"))
        return cls(tuple(row["prompt"]), chosen, rejected, row.get("margin"), row.get("votes"))


@dataclass(frozen=True, slots=True)
class LabelledReply:
    """One reply to a conversation and whether it is a good one: an unpaired row.

    Attributes:
        prompt: the conversation so far; its last turn is the user's.
        reply: its text.
        good: the label.
    """

    prompt: tuple[Message, ...]
    reply: str
    good: bool

    def to_row(self) -> dict[str, Any]:
        """The row in TRL's conversational unpaired preference format."""
        completion = [{"role": "assistant", "content": self.reply}]
        return {"prompt": list(self.prompt), "completion": completion, "label": self.good}

    @classmethod
    def from_row(cls, row: dict[str, Any]) -> LabelledReply:
        """Inverse of `to_row`."""
        return cls(tuple(row["prompt"]), row["completion"][0]["content"], row["label"])


_UNSEEN = dict.fromkeys(
    map(ord, "\u00ad\u200b\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2060\u2066\u2067\u2068\u2069\ufeff")
)
"""Soft hyphens, spaces without width, marks of direction: what a copied text has and its reader does not see."""


def prompt_digest(prompt: Sequence[Message]) -> str:
    """sha256 of a prompt: equal digests are the same prompt to a reader.

    It is blind to case, white space and characters without a glyph, and to how accents are composed: some programs
    write `é` as two characters.
    """
    turns = [[turn["role"], _as_read(turn["content"])] for turn in prompt]
    return hashlib.sha256(json.dumps(turns, ensure_ascii=False).encode()).hexdigest()


def _as_read(text: str) -> str:
    if not text.isascii():
        text = unicodedata.normalize("NFC", text.translate(_UNSEEN))
    return " ".join(text.lower().split())


SINGLE = "single.jsonl"
"""The unpaired rows of a source beside its `train.jsonl`, where it has some."""


def load_single(pairs_file: Path) -> list[LabelledReply]:
    """The unpaired rows beside a `train.jsonl` that `prepare.prepare` wrote; none where its source has pairs.

    Raises:
        QAdapterError: the file is not one of ours.
    """
    file = pairs_file.with_name(SINGLE)
    if not file.exists():
        return []
    try:
        with file.open(encoding="utf-8", newline="\n") as lines:
            return [LabelledReply.from_row(json.loads(line)) for line in lines]
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise QAdapterError(
            f"{file} cannot be read as prepared rows ({type(error).__name__}); run the preparation again."
        ) from error


def iter_pairs(file: Path) -> Iterator[PreferencePair]:
    """Pairs of a `train.jsonl`, `heldout.jsonl` or `judge.jsonl` that `prepare.prepare` wrote, one at a time.

    Raises:
        QAdapterError: the file is missing or not one of ours.
    """
    try:
        with file.open(encoding="utf-8", newline="\n") as lines:
            for line in lines:
                yield PreferencePair.from_trl(json.loads(line))
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise QAdapterError(
            f"{file} cannot be read as prepared pairs ({type(error).__name__}). A train.jsonl or heldout.jsonl of the "
            "data preparation was expected; run the preparation again."
        ) from error


def load_pairs(file: str | Path) -> list[PreferencePair]:
    """All pairs that `iter_pairs` gives, as a list, to draw from."""
    return list(iter_pairs(Path(file)))
