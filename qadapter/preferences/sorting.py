"""Rows in the order of their digests, on disk where they do not fit into memory.

The rows are dealt out to 256 buckets by the first byte of their digest. A bucket is sorted when it is read, so only one
is held at a time. Up to 64 MiB stay in memory, and a small data set never touches the disk.
"""

from __future__ import annotations

import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

from qadapter.preferences.split import DIGEST_BYTES, Drawn, Row

MEMORY_BYTES = 64 * 2**20
_HEAD = struct.Struct(f"<{DIGEST_BYTES}s{DIGEST_BYTES}sI")


class SortedRows:
    """Collects rows, then gives the distinct ones in order.

    Attributes:
        drawn: the digests of all rows that were added.
    """

    def __init__(self, folder: Path) -> None:
        """Collect rows.

        Args:
            folder: for the buckets; made when they are first written, and removed by `close`.
        """
        self.drawn = Drawn()
        self._folder = folder
        self._buckets = [bytearray() for _ in range(256)]
        self._held = 0

    def add(self, row: Row) -> None:
        """Take a row."""
        self.drawn.add(row)
        self._buckets[row.order[0]] += _HEAD.pack(row.order, row.prompt, len(row.text)) + row.text
        self._held += _HEAD.size + len(row.text)
        if self._held > MEMORY_BYTES:
            self._write()

    def _write(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        for number, bucket in enumerate(self._buckets):
            with (self._folder / f"{number:02x}").open("ab") as stream:
                stream.write(bucket)
            bucket.clear()
        self._held = 0

    def buckets(self) -> Iterator[list[Row]]:
        """The distinct rows in the order of their digests, some at a time."""
        for number, bucket in enumerate(self._buckets):
            file = self._folder / f"{number:02x}"
            data = file.read_bytes() + bytes(bucket) if file.exists() else bytes(bucket)
            rows, at = [], 0
            while at < len(data):
                order, prompt, size = _HEAD.unpack_from(data, at)
                at += _HEAD.size
                rows.append(Row(order, prompt, data[at : at + size]))
                at += size
            del data
            rows.sort()
            yield [row for place, row in enumerate(rows) if not place or row.order != rows[place - 1].order]

    def close(self) -> None:
        """Remove what is on disk."""
        shutil.rmtree(self._folder, ignore_errors=True)
