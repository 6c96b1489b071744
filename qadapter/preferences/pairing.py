"""Rows of one reply and a label, paired by their prompts in bounded memory.

A row gives its pairs when the row that it is paired with came before it. Once the replies take more than 64 MiB they
are dealt out to 256 files by the digest of their prompts, and the rows from then on give their pairs at the end, when
each of these files is read by itself. No prompt has more than 64 replies of either label paired.
"""

from __future__ import annotations

import json
import struct
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, Literal

from qadapter.errors import QAdapterError
from qadapter.preferences.building import Context, Record
from qadapter.preferences.pair import Message, PreferencePair, prompt_digest
from qadapter.preferences.records import Reason
from qadapter.preferences.turns import MAX_CANDIDATES, Candidates, UnusableRecord, make_pair
from qadapter.preferences.unpaired import Split, unpaired_reply

MEMORY_BYTES = 64 * 2**20
_ROW_BYTES = 400  # what Python needs for a row beside its text
_BUCKETS = 256
_HEAD = struct.Struct("<32sIQBII")  # prompt's digest, file, line, label and whether it is new, two lengths

Place = tuple[int, int]
"""The number of a row's file, and its line."""


class _Replies:
    """The replies to one prompt that may be paired, by label, and whether the prompt has both."""

    __slots__ = ("by_label",)

    def __init__(self) -> None:
        self.by_label: tuple[list[tuple[Place, str]], list[tuple[Place, str]]] = ([], [])


class _Group:
    """Rows by their prompts: the one definition of which rows make a pair."""

    def __init__(self, how: Literal["all", "first", "none"]) -> None:
        self._most = 1 if how == "first" else MAX_CANDIDATES
        self._how = how
        self.prompts: dict[bytes, _Replies] = {}
        self.alone = array("Q")  # file and line of rows that can have no partner any more

    def add(self, key: bytes, place: Place, good: bool, reply: str) -> list[tuple[str, str]] | Reason:
        """The pairs (better, worse) that a row makes with earlier ones; a reason where it is left out."""
        replies = self.prompts.setdefault(key, _Replies()).by_label
        same, opposite = replies[good], replies[not good]
        if len(same) >= self._most:
            if self._how == "all":
                return Reason.TOO_LONG
            self.alone.extend(place)  # only the first good and the first bad reply to a prompt are paired
            return []
        same.append((place, reply))
        return [(reply, other) if good else (other, reply) for _, other in opposite]

    def left(self) -> Iterator[Place]:
        """The places of the rows without a partner."""
        places = iter(self.alone)
        yield from zip(places, places, strict=True)
        for replies in self.prompts.values():
            bad, good = replies.by_label
            if not (bad and good):
                yield from (place for place, _ in bad or good)


class Pairing:
    """Pairs the rows of a source; see the module."""

    def __init__(self, split: Split, how: Literal["all", "first", "none"]) -> None:
        self._split, self._how = split, how
        self._rows = _Group(how)
        self._held = 0
        self._folder: TemporaryDirectory[str] | None = None
        self._buckets: list[bytearray] = []

    def read(self, record: Record, context: Context, place: Place) -> Candidates:
        """The pairs that a row makes with rows before it; it may be none.

        Args:
            record: the row.
            context: of the source.
            place: of the row, by which `finish` names it.
        """
        row = unpaired_reply(record, context, self._split)
        context.labels["good" if row.good else "bad"] += 1
        if context.single is not None:
            context.single(row)
        if self._how == "none":
            return []
        key = bytes.fromhex(prompt_digest(row.prompt))
        if self._folder is not None:
            self._write(key, place, row.good, True, json.dumps(row.prompt, ensure_ascii=False), row.reply)
            return []
        found = self._rows.add(key, place, row.good, row.reply)
        self._held += len(row.reply) + _ROW_BYTES
        if self._held > MEMORY_BYTES:
            self._to_disk()
        return [found] if isinstance(found, Reason) else [_pair(row.prompt, *texts) for texts in found]

    def finish(self) -> Iterator[tuple[Place, PreferencePair | Reason]]:
        """The pairs of the rows that went to disk, and NO_PARTNER for each row that stayed alone, in their order."""
        alone = array("Q")
        if self._folder is None:
            for place in self._rows.left():
                alone.extend(place)
        else:
            alone.extend(self._rows.alone)  # found before the rows went to disk
            with self._folder as folder:
                self._flush()
                for number in range(_BUCKETS):
                    yield from self._paired(Path(folder) / f"{number:02x}", alone)
        places = iter(alone)
        for place in sorted(zip(places, places, strict=True)):
            yield place, Reason.NO_PARTNER

    # ---- on disk

    def _to_disk(self) -> None:
        """Deal out what is held; these rows have given their pairs already."""
        self._folder = TemporaryDirectory(prefix="qadapter-rows-")
        self._buckets = [bytearray() for _ in range(_BUCKETS)]
        self._held = 0
        for key, replies in self._rows.prompts.items():
            for good, rows in enumerate(replies.by_label):
                for place, reply in rows:
                    self._write(key, place, bool(good), False, "", reply)
        self._rows.prompts.clear()

    def _write(self, key: bytes, place: Place, good: bool, new: bool, prompt: str, reply: str) -> None:
        texts = (prompt.encode(), reply.encode())
        head = _HEAD.pack(key, *place, good + 2 * new, *map(len, texts))
        self._buckets[key[0]] += head + texts[0] + texts[1]
        self._held += len(head) + sum(map(len, texts))
        if self._held > MEMORY_BYTES:
            self._flush()

    def _flush(self) -> None:
        assert self._folder is not None
        for number, bucket in enumerate(self._buckets):
            with (Path(self._folder.name) / f"{number:02x}").open("ab") as stream:
                stream.write(bucket)
            bucket.clear()
        self._held = 0

    def _paired(self, file: Path, alone: array[int]) -> Iterator[tuple[Place, PreferencePair | Reason]]:
        group = _Group(self._how)
        with file.open("rb") as stream:
            for key, place, good, new, prompt, reply in _rows_of(stream):
                found = group.add(key, place, good, reply)
                if not new:
                    continue
                if isinstance(found, Reason):
                    yield place, found
                    continue
                turns = tuple(json.loads(prompt)) if found else ()
                for texts in found:
                    yield place, _pair(turns, *texts)
        for place in group.left():
            alone.extend(place)


def _rows_of(stream: BinaryIO) -> Iterator[tuple[bytes, Place, bool, bool, str, str]]:
    while head := stream.read(_HEAD.size):
        key, shard, line, flags, *lengths = _HEAD.unpack(head)
        prompt, reply = (stream.read(length).decode() for length in lengths)
        yield key, (shard, line), bool(flags & 1), bool(flags & 2), prompt, reply


def _pair(prompt: Sequence[Message], better: str, worse: str) -> PreferencePair | Reason:
    try:
        return make_pair(list(prompt), better, worse)
    except UnusableRecord as unusable:
        return unusable.reason


def needs_pairing(split: Split) -> Callable[[Sequence[Record], Context, str], Any]:
    """The `choose` of a format of unpaired rows: a `Pairing`, or the refusal where `pairing` is not set."""

    def choose(_: Sequence[Record], context: Context, where: str) -> Pairing:
        if context.choices.pairing is None:
            raise QAdapterError(
                f"{where} has single replies with a label, no pairs. Set `pairing: all` (every good reply with every "
                "bad one to the same prompt) or `pairing: first` (the first of each), or give pairs. In a config, "
                "the method kto takes single replies as they are: `pairing: none`."
            )
        return Pairing(split, context.choices.pairing)

    return choose
