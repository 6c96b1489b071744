"""Records of text files: JSON lines, JSON lists, JSON objects over several lines, and CSV.

Everything is read piece by piece. At most one record is held, and a record has a greatest size in bytes and in values.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from qadapter.errors import QAdapterError
from qadapter.files.folders import shown_path
from qadapter.preferences.packed import BudgetError, DamagedError
from qadapter.preferences.records import MAX_RECORD_BYTES, MAX_RECORD_VALUES, RawRecord, Reason

HEAD_BYTES = 4096
BOM = b"\xef\xbb\xbf"
LIST_START = re.compile(rb"\s*\[\s*[{\"\]]")
_SPACE = re.compile(r"[ \t\r\n]*")
_DELIMITERS = ",;\t|"
_CSV_NAMES = (".csv", ".tsv")
# A file that is not called CSV is taken for it if its first line has one of these names.
_COLUMNS = frozenset(
    "prompt chosen rejected question instruction query context response_a response_b response_0 response_1 response_2 "
    "response1 response2 answer_a answer_b winner winner_model_a preferred preference messages conversations".split()
)


class _TooLongError(Exception):
    """A record is larger than a record may be."""


def read(stream: io.BufferedReader[Any], name: str, file: Path, key: str | None = None) -> Iterator[RawRecord]:
    """Yields the records of a text.

    Args:
        stream: the text as bytes; may raise `DamagedError` and `BudgetError`.
        name: the file's name without compression; `.csv` and `.tsv` are read as such.
        file: for messages.
        key: name of the list in a JSON object that holds the records; None: the file is not one object.

    Raises:
        QAdapterError: `key` is not in the object, or the file is one JSON object and no `key` was given.
    """
    try:
        head = stream.peek(HEAD_BYTES)[:HEAD_BYTES].removeprefix(BOM)
    except DamagedError:
        yield RawRecord(1, problem=Reason.BREAKS_OFF)
        return
    except BudgetError:
        yield RawRecord(1, problem=Reason.BUDGET)
        return
    if key is not None:
        yield from _elements_of(_Characters(stream), key, file)
    elif LIST_START.match(head):
        characters = _Characters(stream)
        characters.expect("[")
        yield from _list_elements(characters)
    elif head.lstrip().startswith(b"{") and head.lstrip().split(b"\n")[0].strip() == b"{":
        yield from _objects(_Characters(stream), file)
    elif delimiter := _csv_delimiter(head, name):
        yield from _csv_rows(stream, delimiter)
    else:
        yield from _json_lines(stream, file)


# ------------------------------------------------------------------------------------------- JSON lines


def _json_lines(stream: io.BufferedReader[Any], file: Path) -> Iterator[RawRecord]:
    number = 0
    while True:
        try:
            line = stream.readline(MAX_RECORD_BYTES + 1)
            too_long = len(line) > MAX_RECORD_BYTES
            rest = line
            while too_long and rest and not rest.endswith(b"\n"):
                rest = stream.readline(MAX_RECORD_BYTES + 1)
        except (DamagedError, BudgetError) as error:
            yield _stopped(number + 1, error)
            return
        if not line:
            return
        number += 1
        line = (line.removeprefix(BOM) if number == 1 else line).strip()
        if too_long:
            if number == 1 and line.startswith(b"{") and not rest.endswith(b"\n"):
                raise _one_object(file, None)
            yield RawRecord(number, problem=Reason.TOO_LONG)
        elif line:
            record = decode_line(line, number)
            if number == 1 and isinstance(record.value, dict) and _at_end(stream):
                _refuse_one_object(record.value, file)
            yield record


def _at_end(stream: io.BufferedReader[Any]) -> bool:
    try:
        return not stream.peek(1)[:64].strip()
    except (DamagedError, BudgetError):
        return False


ASKS = frozenset("prompt question instruction query input context user_input info messages history contents".split())
"""An object with one of these keys is a record, even if it contains lists."""


def _refuse_one_object(value: dict[str, Any], file: Path) -> None:
    """A file that is one JSON object with the records inside.

    Raises:
        QAdapterError: it is.
    """
    lists = [name for name, inner in value.items() if isinstance(inner, list) and inner and _are_rows(inner)]
    tables = [name for name, inner in value.items() if isinstance(inner, dict) and "0" in inner]
    if len(tables) > 1:
        raise QAdapterError(
            f"{shown_path(file)} is one JSON object with a table in columns ({', '.join(tables[:4])}). "
            'Write it by rows instead: pandas\' `to_json(orient="records", lines=True)`.'
        )
    if len(lists) == 1 and len(value) <= 3 and ASKS.isdisjoint(value):
        raise _one_object(file, lists[0])


def decode_line(line: bytes, number: int) -> RawRecord:
    """A line of JSON as a record; bytes that are not UTF-8 become lone surrogates, which `formats.py` refuses."""
    text = line.decode("utf-8", "surrogateescape")
    if _too_many_values(text):
        return RawRecord(number, problem=Reason.TOO_LONG)
    try:
        return RawRecord(number, json.loads(text), size=len(line))
    except (ValueError, RecursionError):
        return RawRecord(number, problem=Reason.BROKEN_JSON)


def _too_many_values(text: str) -> bool:
    """Whether a JSON text can hold more values than a record may: each one takes up to a hundred bytes of memory."""
    return len(text) > MAX_RECORD_VALUES and sum(map(text.count, ",[{")) > MAX_RECORD_VALUES


def _stopped(number: int, error: Exception) -> RawRecord:
    return RawRecord(number, problem=Reason.BUDGET if isinstance(error, BudgetError) else Reason.BREAKS_OFF)


# ------------------------------------------------------------------------------------------- JSON over several lines


class _Characters:
    """A text of which only the part around one JSON value is held."""

    def __init__(self, stream: io.BufferedReader[Any]) -> None:
        self._stream = stream
        self._decode = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode
        self._text, self._at, self._ended = "", 0, False
        self.error: Exception | None = None
        self._decoder = json.JSONDecoder()
        self.peek()
        self._text = self._text.removeprefix("\ufeff")

    def _more(self, size: int) -> bool:
        """Read up to `size` further bytes; False at the end. What precedes a break is kept, the break noted."""
        if self._ended:
            return False
        try:
            data = self._stream.read1(size)
        except (DamagedError, BudgetError) as error:
            self.error, data = error, b""
        self._ended = not data
        self._text, self._at = self._text[self._at :] + self._decode(data, not data), 0
        return True

    def peek(self) -> str:
        """The next character that is not white space; empty at the end."""
        while True:
            match = _SPACE.match(self._text, self._at)
            self._at = match.end() if match else self._at
            if self._at < len(self._text) or not self._more(2**16):
                return self._text[self._at : self._at + 1]

    def expect(self, character: str) -> bool:
        """Whether that is the next character, which is then taken."""
        found = self.peek() == character
        self._at += found
        return found

    def value(self) -> tuple[Any, int]:
        """The next JSON value and the characters it takes.

        Raises:
            ValueError: it is broken, or the text ends within it.
            _TooLongError: it is larger than a record may be.
        """
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                if end < len(self._text) or self._ended:  # a number may continue beyond the text read so far
                    size = end - self._at
                    if _too_many_values(self._text[self._at : end]):
                        raise _TooLongError
                    self._at = end
                    return value, size
            except RecursionError as error:
                raise ValueError("nested too deep") from error
            except json.JSONDecodeError as error:
                # Incomplete text fails at its end or at the start of its last string; elsewhere it is broken.
                if not error.msg.startswith("Unterminated") and error.pos < len(self._text) - 16:
                    raise
                if self._ended:
                    raise
            held = len(self._text) - self._at
            if held > MAX_RECORD_BYTES or _too_many_values(self._text[self._at :]):
                raise _TooLongError
            self._more(max(2**16, held))


def _list_elements(characters: _Characters, ends_file: bool = True) -> Iterator[RawRecord]:
    """Elements of a JSON list whose bracket was taken; the whole ones before a break are kept."""
    number = 0
    if not characters.expect("]"):
        while True:
            number += 1
            try:
                value, size = characters.value()
            except _TooLongError:
                yield RawRecord(number, problem=Reason.BUDGET)
                return
            except ValueError:
                yield _stopped(number, characters.error or DamagedError())
                return
            yield RawRecord(number, value, size=size)
            if characters.expect(","):
                continue
            if not characters.expect("]"):
                yield _stopped(number + 1, characters.error or DamagedError())
                return
            break
    if (ends_file and characters.peek()) or characters.error:
        yield _stopped(number + 1, characters.error or DamagedError())


def _objects(characters: _Characters, file: Path) -> Iterator[RawRecord]:
    """JSON objects over several lines, one behind the other (what `jq` prints)."""
    number = 0
    while characters.peek():
        number += 1
        try:
            value, size = characters.value()
        except _TooLongError:
            if number == 1:
                raise _one_object(file, None) from None
            yield RawRecord(number, problem=Reason.BUDGET)
            return
        except ValueError:
            yield _stopped(number, characters.error or DamagedError())
            return
        if number == 1 and not characters.peek() and isinstance(value, dict):
            _refuse_one_object(value, file)
        yield RawRecord(number, value, size=size)
    if characters.error:
        yield _stopped(number + 1, characters.error)


def _are_rows(values: list[Any]) -> bool:
    return all(isinstance(value, dict) and not {"role", "from"} & set(value) for value in values[:10])


def _one_object(file: Path, key: str | None) -> QAdapterError:
    name = key or "data"
    where = f"under `{key}`" if key else "under one of its keys"
    return QAdapterError(
        f"{shown_path(file)} is one JSON object; its records lie in a list {where}. Set `records: {name}` in the "
        "source's `fields`, or save that list alone."
    )


def _elements_of(characters: _Characters, key: str, file: Path) -> Iterator[RawRecord]:
    """Elements of the list that a JSON object has under a key; what stands before it is skipped."""
    names: list[str] = []
    if characters.expect("{"):
        try:
            while characters.peek() == '"':
                name, _ = characters.value()
                if not characters.expect(":"):
                    break
                names.append(str(name))
                if name == key and characters.expect("["):
                    yield from _list_elements(characters, ends_file=False)
                    return
                characters.value()
                if not characters.expect(","):
                    break
        except (ValueError, _TooLongError):
            pass
    raise QAdapterError(
        f"{shown_path(file)} has no list `{key}`: it was expected to be one JSON object with that key"
        + (f"; its keys are {', '.join(names[:10])}." if names else ".")
    )


# ------------------------------------------------------------------------------------------- CSV


def _csv_delimiter(head: bytes, name: str) -> str | None:
    """The delimiter of a table whose first line names its columns; None where the text is no table."""
    line = head.lstrip(b"\r\n").splitlines()[:1]
    if not line:
        return None
    first = line[0].decode("utf-8", "replace")
    ends_so = any(f".{part}" in _CSV_NAMES for part in name.lower().split(".")[1:])
    fields = {delimiter: _header(first, delimiter) for delimiter in _DELIMITERS}
    best = max(fields, key=lambda delimiter: len(fields[delimiter]))
    if ends_so:
        return best
    known = _COLUMNS & {field.strip().lower() for field in fields[best]}
    return best if known and len(fields[best]) > 1 else None


def _header(line: str, delimiter: str) -> list[str]:
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True), [])
    except csv.Error:
        return []


def _csv_rows(stream: io.BufferedReader[Any], delimiter: str) -> Iterator[RawRecord]:
    csv.field_size_limit(MAX_RECORD_BYTES)
    lines = _Lines(io.TextIOWrapper(stream, "utf-8-sig", "surrogateescape", newline=""))
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    line, record = 1, _stopped
    while True:
        problem: Reason | None = None
        row: list[str] = []
        lines.size, line = 0, rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except (DamagedError, BudgetError) as error:
            yield record(line, error)
            return
        except _TooLongError:
            yield RawRecord(line, problem=Reason.BUDGET)
            return
        except csv.Error:
            problem = Reason.BREAKS_OFF if lines.ended else Reason.BROKEN_ROW
        if header is None:
            header = [field.strip() for field in row]
            if problem or len(set(header)) < len(header):
                yield RawRecord(line, problem=problem or Reason.EQUAL_COLUMNS)
                return
        elif problem or (row and len(row) != len(header)):
            yield RawRecord(line, problem=problem or Reason.BROKEN_ROW)
        elif row:
            yield RawRecord(line, dict(zip(header, row, strict=True)), size=lines.size)


class _Lines(Iterator[str]):
    """Lines for the `csv` module, which takes as many as a record has: with an open quotation mark, all of them."""

    def __init__(self, text: io.TextIOWrapper) -> None:
        self._next: Callable[[], str] = lambda: text.readline(MAX_RECORD_BYTES)
        self.size, self.ended = 0, False

    def __next__(self) -> str:
        line = self._next()
        self.size += len(line)
        if not line:
            self.ended = True
            raise StopIteration
        if self.size >= MAX_RECORD_BYTES:
            raise _TooLongError
        return line
