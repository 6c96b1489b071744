"""Files as streams of raw records: JSON lines, JSON lists, either of them gzipped, Parquet and Arrow.

The kind of a file is read from its first bytes, never from its name. Nothing here knows what a record means; that is
`formats.py`. A record that cannot be read is handed on with the reason, so that whoever counts sees every one.
"""

from __future__ import annotations

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from io import BufferedIOBase
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet

from qadapter.errors import QAdapterError

MAX_RECORD_BYTES = 16 * 2**20
"""A JSON line longer than this is skipped unread, so that a file without line ends cannot fill the memory."""

HEAD_BYTES = 4096
LIST_START = re.compile(rb"\s*\[\s*[{\]]")
BOM = b"\xef\xbb\xbf"
BREAKS_OFF = (EOFError, zlib.error, gzip.BadGzipFile)
ROWS_AT_ONCE = 256


class Reason(StrEnum):
    """Why a record, or one candidate pair of it, is not used.

    The values are what users read. They become names of metrics too: letters, spaces, dashes and colons only.
    """

    BROKEN_JSON = "broken JSON"
    BREAKS_OFF = "the file breaks off or is damaged here: nothing behind this point was read"
    NOT_AN_OBJECT = "not a JSON object"
    WRONG_FIELDS = "a field is missing or has the wrong type"
    NOT_UNICODE = "the text is not valid Unicode"
    NOT_A_DIALOGUE = "not a dialogue that begins with a user turn and ends with a reply"
    EMPTY_PROMPT = "the prompt is empty or has an empty turn"
    EMPTY_REPLY = "empty reply"
    DIFFERENT_PROMPTS = "chosen and rejected have different prompts"
    IDENTICAL_REPLIES = "chosen and rejected are identical"
    NO_PREFERENCE = "no preference: the score is missing or tied or not a number"
    NO_DOMAIN_RESPONSE = "no response in the wanted domain"
    TOO_LONG = "over-long"


@dataclass(frozen=True, slots=True)
class RawRecord:
    """One record of a file.

    Attributes:
        line: line number in JSON lines, else the record's number; both count from 1.
        value: what the record holds; None where `problem` is given.
        problem: why it could not be read.
    """

    line: int
    value: Any = None
    problem: Reason | None = None


def iter_records(file: Path) -> Iterator[RawRecord]:
    """Yields every record of a file in order; blank lines are not records.

    Args:
        file: JSON lines or a JSON list (plain or gzipped), a Parquet file, or an Arrow file (IPC file or stream).

    Raises:
        QAdapterError: the file cannot be opened or reading it fails. Broken contents are yielded as problems instead.
    """
    try:
        with file.open("rb") as stream:
            magic = stream.read(6)
        if magic.startswith(b"PAR1"):
            yield from _rows(pa.parquet.ParquetFile, file)
        elif magic.startswith((b"ARROW1", b"\xff\xff\xff\xff")):
            yield from _rows(_arrow_reader, file)
        else:
            compressed = magic.startswith(b"\x1f\x8b")
            with gzip.open(file, "rb") if compressed else file.open("rb") as stream:
                yield from _json_records(stream)
    except OSError as error:
        raise QAdapterError(
            f"{file} cannot be read: {error.strerror or error}. A readable data file was expected; "
            "check the path and its permissions."
        ) from error


def _json_records(stream: BufferedIOBase) -> Iterator[RawRecord]:
    """A JSON list if the first character opens a list of objects, else JSON lines."""
    try:
        head = stream.read1(HEAD_BYTES)
        stream.seek(0)
    except BREAKS_OFF:
        yield RawRecord(1, problem=Reason.BREAKS_OFF)
        return
    if LIST_START.match(head.removeprefix(BOM)):
        yield from _list_elements(stream)
    else:
        yield from _json_lines(stream)


def _json_lines(stream: BufferedIOBase) -> Iterator[RawRecord]:
    number = 0
    while True:
        try:
            line = stream.readline(MAX_RECORD_BYTES + 1)
            too_long = len(line) > MAX_RECORD_BYTES
            rest = line
            while too_long and rest and not rest.endswith(b"\n"):
                rest = stream.readline(MAX_RECORD_BYTES + 1)
        except BREAKS_OFF:
            yield RawRecord(number + 1, problem=Reason.BREAKS_OFF)
            return
        if not line:
            return
        number += 1
        if too_long:
            yield RawRecord(number, problem=Reason.TOO_LONG)
            continue
        line = (line.removeprefix(BOM) if number == 1 else line).strip()
        if line:
            yield _decode_line(line, number)


def _decode_line(line: bytes, number: int) -> RawRecord:
    try:
        # Bytes that are not UTF-8 become lone surrogates, which `formats.py` refuses in the fields it uses.
        return RawRecord(number, json.loads(line.decode("utf-8", "surrogateescape")))
    except (ValueError, RecursionError):
        return RawRecord(number, problem=Reason.BROKEN_JSON)


def _list_elements(stream: BufferedIOBase) -> Iterator[RawRecord]:
    """Elements of a JSON list, one by one, so that the whole ones before a break are kept."""
    data = bytearray()
    try:
        while chunk := stream.read1(2**16):  # `read` would lose what precedes a break
            data += chunk
    except BREAKS_OFF:
        pass  # what is there is parsed below, and ends without the closing bracket
    text = bytes(data).removeprefix(BOM).decode("utf-8", "surrogateescape")
    decoder, space = json.JSONDecoder(), re.compile(r"[ \t\r\n]*")

    def skip_space(position: int) -> int:
        match = space.match(text, position)
        return match.end() if match else position

    position = skip_space(skip_space(0) + 1)
    number = 0
    if text[position : position + 1] != "]":
        while True:
            number += 1
            try:
                value, position = decoder.raw_decode(text, skip_space(position))
            except (ValueError, RecursionError):
                yield RawRecord(number, problem=Reason.BREAKS_OFF)
                return
            yield RawRecord(number, value)
            position = skip_space(position)
            if text[position : position + 1] != ",":
                break
            position += 1
    if text[position : position + 1] != "]" or text[position + 1 :].strip():
        yield RawRecord(number + 1, problem=Reason.BREAKS_OFF)


def _arrow_reader(file: Path) -> Any:
    try:
        return pa.ipc.open_file(pa.memory_map(str(file)))
    except pa.ArrowInvalid:
        return pa.ipc.open_stream(pa.memory_map(str(file)))


def _batches(reader: Any) -> Iterator[pa.RecordBatch]:
    if hasattr(reader, "iter_batches"):
        yield from reader.iter_batches(batch_size=ROWS_AT_ONCE)
    elif hasattr(reader, "num_record_batches"):
        yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        yield from reader


def _rows(open_reader: Any, file: Path) -> Iterator[RawRecord]:
    number = 0
    try:
        for batch in _batches(open_reader(file)):
            for start in range(0, batch.num_rows, ROWS_AT_ONCE):
                for row in batch.slice(start, ROWS_AT_ONCE).to_pylist():
                    number += 1
                    yield RawRecord(number, row)
    except (pa.ArrowException, OSError, ValueError):
        yield RawRecord(number + 1, problem=Reason.BREAKS_OFF)
