"""Read files of any supported container as streams of raw records, without trusting the container.

The container is recognised by its first bytes: JSON lines, JSON lists and CSV, plain or packed with gzip, zstd, bzip2,
xz or zip; Parquet; Arrow (file and stream). Nothing here knows what a record means; that is `formats.py`.

A file may be hostile. Text is read piece by piece within budgets (bytes after decompression, records, size of a
record). Parquet and Arrow are read by another process (`columnar_reader.py`) with limits on memory and time. A file
that breaks a budget, or its reader, gives the records before that point and then one problem, like one that breaks off.
"""

from __future__ import annotations

import os
import select
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Literal

from qadapter.errors import QAdapterError
from qadapter.files.folders import shown_path
from qadapter.preferences import columnar_reader, text_records
from qadapter.preferences.packed import Budget, BudgetError, DamagedError, unpack
from qadapter.preferences.records import MAX_RECORD_BYTES, RawRecord, Reason

RECORDS_TO_DETECT = 100
HEAD_BYTES = 8 * 2**20
"""The records that decide a file's format have at most this size together."""

READER_BYTES = 4 * 2**30
"""Virtual memory of the process that reads Parquet and Arrow."""

SILENCE_SECONDS = 300
"""That process is ended when it writes nothing for so long."""

Kind = Literal["parquet", "arrow-file", "arrow-stream"]


class NoRecordsError(QAdapterError):
    """A file has no record that can be read.

    Attributes:
        reason: `EMPTY_FILE`, or what its first record is quarantined for.
    """

    def __init__(self, message: str, reason: Reason) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(slots=True)
class Position:
    """How much of a file has been read: `share` grows from 0 to 1 while its records are taken."""

    share: float = 0.0


def iter_records(file: Path, *, records: str | None = None, position: Position | None = None) -> Iterator[RawRecord]:
    """Yields every record of a file in order; blank lines are not records.

    Args:
        file: any of the containers above.
        records: name of the list inside a JSON object that holds the records; None: the file is not one object.
        position: is kept up to date while the records are taken.

    Raises:
        QAdapterError: the file cannot be opened, or its container is one that is refused (Excel, tar, several files in
            a zip). Broken contents are yielded as problems instead.
    """
    position = position or Position()
    try:
        with file.open("rb") as raw:
            budget = Budget(os.fstat(raw.fileno()).st_size)
            for number, record in enumerate(_records(file, raw, budget, records, position), start=1):
                if number > budget.records:
                    yield RawRecord(record.line, problem=Reason.BUDGET)
                    return
                yield record
            position.share = 1.0
    except OSError as error:
        raise QAdapterError(
            f"{shown_path(file)} cannot be read: {error.strerror or error}. A readable data file was expected; "
            "check the path and its permissions."
        ) from error


def head(records: Iterable[RawRecord], *, count: int = RECORDS_TO_DETECT, size: int = HEAD_BYTES) -> list[RawRecord]:
    """The records that decide a file's format: the first 100 (`count`), or fewer where they have more bytes than `size`
    together."""
    first: list[RawRecord] = []
    for record in records:
        first.append(record)
        size -= record.size
        if len(first) == count or size < 0:
            break
    return first


def _records(file: Path, raw: IO[bytes], budget: Budget, key: str | None, position: Position) -> Iterator[RawRecord]:
    try:
        unpacked = unpack(file, raw, budget)
        kind = _columnar_kind(unpacked.head)
        if kind and not unpacked.packed:
            yield from _columnar(file, kind, budget, position)
            return
        if kind:  # Parquet and Arrow files need to be read from several places
            with tempfile.NamedTemporaryFile() as plain:
                shutil.copyfileobj(unpacked.stream, plain, 2**20)
                plain.flush()
                yield from _columnar(Path(plain.name), kind, Budget(budget.bytes // 100), position)
            return
    except (DamagedError, BudgetError) as error:
        yield RawRecord(1, problem=Reason.BUDGET if isinstance(error, BudgetError) else Reason.BREAKS_OFF)
        return
    for record in text_records.read(unpacked.stream, unpacked.name, file, key):
        position.share = raw.tell() / max(1, budget.stored)
        yield record


def _columnar_kind(magic: bytes) -> Kind | None:
    if magic.startswith(b"PAR1"):
        return "parquet"
    if magic.startswith(b"ARROW1"):
        return "arrow-file"
    return "arrow-stream" if magic.startswith(b"\xff\xff\xff\xff") else None


def _columnar(file: Path, kind: Kind, budget: Budget, position: Position) -> Iterator[RawRecord]:
    """Rows of a Parquet or Arrow file, read by a process that may die of them."""
    if not _looks_whole(file, kind):
        yield RawRecord(1, problem=Reason.BREAKS_OFF)
        return
    limits = columnar_reader.Limits(
        address_space=READER_BYTES,
        cpu_seconds=60 + budget.stored // 2**20,
        rows=budget.records,
        output_bytes=budget.bytes,
        record_bytes=MAX_RECORD_BYTES,
    )
    # The reader finds pyarrow where this process does, and no secret of its environment.
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "PATH": os.environ.get("PATH", os.defpath),
        "ARROW_DEFAULT_MEMORY_POOL": "system",  # the others reserve address space, which is limited
        "OMP_NUM_THREADS": "1",
        "OPENBLAS_NUM_THREADS": "1",
    }
    reader = subprocess.Popen(
        [sys.executable, "-s", "-P", columnar_reader.__file__, kind, os.fspath(file.absolute()), limits.text()],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=environment,
    )
    try:
        yield from _lines_of(reader, position)
    finally:
        reader.kill()
        reader.wait()
        if reader.stdout:
            reader.stdout.close()


def _looks_whole(file: Path, kind: Kind) -> bool:
    """Whether both ends of a file are those of its kind: most broken files need no process to be found out."""
    with file.open("rb") as stream:
        start = stream.read(8)
        size = stream.seek(0, os.SEEK_END)
        if kind == "arrow-stream":
            return size >= 8 and 0 <= int.from_bytes(start[4:8], "little", signed=True) <= size - 8
        magic = b"PAR1" if kind == "parquet" else b"ARROW1"
        stream.seek(max(0, size - len(magic)))
        return size > 2 * len(magic) and stream.read() == magic


def _lines_of(reader: subprocess.Popen[bytes], position: Position) -> Iterator[RawRecord]:
    """The reader's output as records. It is not trusted: a line has a greatest length, and silence an end."""
    assert reader.stdout is not None
    handle, rest, number = reader.stdout.fileno(), b"", 0
    while True:
        ready, _, _ = select.select([handle], [], [], SILENCE_SECONDS)
        data = os.read(handle, 2**18) if ready else b""
        *lines, rest = (rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"#"):
                position.share = float(line[1:])
            elif line == b"!end":
                return
            elif line in _ENDINGS:
                yield RawRecord(number + 1, problem=_ENDINGS[line])
                return
            else:
                number += 1
                too_long = line == b"!long"
                yield RawRecord(number, problem=Reason.TOO_LONG) if too_long else text_records.decode_line(line, number)
        if not data or len(rest) > MAX_RECORD_BYTES:
            yield RawRecord(number + 1, problem=Reason.BREAKS_OFF)
            return


_ENDINGS = {b"!budget": Reason.BUDGET, b"!columns": Reason.EQUAL_COLUMNS}
