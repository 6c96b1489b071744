"""One side of a preparation, training or held out: its pairs as rows on disk, and files of pairs that are written."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from qadapter.preferences.building import Choices
from qadapter.preferences.pair import LabelledReply
from qadapter.preferences.reader import Accepted, Rejected
from qadapter.preferences.records import Reason
from qadapter.preferences.shards import Findings
from qadapter.preferences.sorting import SortedRows
from qadapter.preferences.split import DIGEST_BYTES, Row
from qadapter.preferences.stream import no_usable_pair, stream_files


class Side:
    """The files of one side, read: its pairs as rows on disk, and what was rejected as numbers.

    Attributes:
        files: of the side.
        rows: its pairs.
        single: its rows of one reply and a label, where the source has such.
        read_count: candidates that entered.
        rejected: of each file, what was rejected.
        findings: what else was found.
    """

    def __init__(self, files: Sequence[Path], spill: Path) -> None:
        self.files = files
        self.rows = SortedRows(spill)
        self.single = SortedRows(spill.with_name(f"{spill.name}-single"))
        self.read_count = 0
        self.rejected: dict[Path, Rejections] = {}
        self.findings = Findings()

    def read(self, seed: int, *, domain: str | None, max_chars: int, choices: Choices | None) -> None:
        """Read the files to their end.

        Raises:
            QAdapterError: as `stream_files`, or no usable pair.
        """

        def take(reply: LabelledReply) -> None:
            if sum(len(turn["content"]) for turn in reply.prompt) + len(reply.reply) <= max_chars:
                self.single.add(Row.of_single(reply, seed))

        self.findings.single = take
        for item in stream_files(self.files, self.findings, domain=domain, max_chars=max_chars, choices=choices):
            self.read_count += 1
            if isinstance(item, Accepted):
                self.rows.add(Row.of(item.pair, seed))
            else:
                self.rejected.setdefault(item.file, Rejections()).add(item)
        if not self.rows.drawn and not (self.single.drawn and choices and choices.pairing == "none"):
            raise no_usable_pair(list(self.findings.formats), self.reasons())

    def close(self) -> None:
        """Remove what is on disk."""
        self.rows.close()
        self.single.close()

    def reasons(self) -> Counter[str]:
        """How many candidates were rejected for each reason."""
        return sum((rejections.reasons() for rejections in self.rejected.values()), Counter())


class Rejections:
    """Line and reason of the rejected candidates of one file, 9 bytes for each."""

    def __init__(self) -> None:
        self.lines, self.codes = array("Q"), array("B")

    def add(self, item: Rejected) -> None:
        """Take one."""
        self.lines.append(item.line)
        self.codes.append(CODES[item.reason])

    def reasons(self) -> Counter[str]:
        """How many there are for each reason."""
        return Counter({reason.value: count for reason in Reason if (count := self.codes.count(CODES[reason]))})


REASONS = sorted(Reason, key=lambda reason: reason.value)
CODES = {reason: code for code, reason in enumerate(REASONS)}


class Output:
    """A file of pairs that is being written, with the limit of its side."""

    def __init__(self, file: Path, limit: int | None) -> None:
        self._stream, self._limit = file.open("wb"), limit
        self._digest, self._prompts, self._taken = hashlib.sha256(), bytearray(), 0
        self.lines = 0

    def __enter__(self) -> Output:
        return self

    def __exit__(self, *error: object) -> None:
        self._stream.close()

    def add(self, row: Row) -> None:
        """Write a pair, unless the limit is reached."""
        if self._limit is not None and self._taken >= self._limit:
            return
        self._taken += 1
        self._prompts += row.prompt
        self._write(row.text + b"\n")

    def _write(self, line: bytes) -> None:
        self._stream.write(line)
        self._digest.update(line)
        self.lines += 1

    def prompts(self) -> int:
        """How many distinct prompts the pairs have."""
        return len(np.unique(np.frombuffer(self._prompts, f"S{DIGEST_BYTES}")))

    def sha256(self) -> str:
        """Of the file."""
        return self._digest.hexdigest()
