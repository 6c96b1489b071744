"""Files as candidate pairs: one reader for files, data sets in Python and the command (`reader.py`)."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from qadapter.errors import QAdapterError
from qadapter.files.folders import shown_path
from qadapter.preferences.building import Choices
from qadapter.preferences.containers import HEAD_BYTES, RECORDS_TO_DETECT, NoRecordsError, Position, head, iter_records
from qadapter.preferences.pair import PreferencePair
from qadapter.preferences.reader import Accepted, ParsedRecord, Reader, Rejected
from qadapter.preferences.recognition import recognise
from qadapter.preferences.records import RawRecord, Reason


def file_records(
    file: Path, choices: Choices | None = None, *, position: Position | None = None
) -> Iterator[RawRecord]:
    """A file's records; those of the list that a mapping's `records` names, where the file is one JSON object.

    Args:
        file, position: see `containers.iter_records`.
        choices: what the user decided.
    """
    return iter_records(file, records=_list_name(choices), position=position)


def _list_name(choices: Choices | None) -> str | None:
    """The name under which a file that is one JSON object has its records; None for a path into each record."""
    name = choices.fields.get("records") if choices and isinstance(choices.fields, Mapping) else None
    return name if isinstance(name, str) and re.fullmatch(r"[A-Za-z_]\w*", name) else None


def open_reader(file: Path, *, domain: str | None = None, choices: Choices | None = None) -> Reader:
    """Choose the reader of a file from its first records; see `recognise`.

    Raises:
        QAdapterError: as `recognise`, or the file cannot be read or has no record.
    """
    return recognise(first_records(file, choices), where=shown_path(file), domain=domain, choices=inside(choices))


def first_records(
    file: Path, choices: Choices | None = None, *, count: int = RECORDS_TO_DETECT, size: int = HEAD_BYTES
) -> list[Any]:
    """The records that a file's layout is chosen from; those that could not be decoded are left out.

    Args:
        file: see `containers.iter_records`.
        choices: what the user decided.
        count, size: how many records, and their bytes together.

    Raises:
        NoRecordsError: the file is empty or damaged from its beginning on.
        QAdapterError: it cannot be read, or has no JSON object among these records.
    """
    return _objects_of(file, head(file_records(file, choices), count=count, size=size))


def inside(choices: Choices | None) -> Choices | None:
    """The choices for records that were taken out of the list that a mapping's `records` names.

    Where `records` is all that the mapping says, the layout of these records is recognised.
    """
    if choices is None or not _list_name(choices):
        return choices
    paths = {key: value for key, value in (choices.fields or {}).items() if key != "records"}
    return replace(choices, fields=paths or None)


def _objects_of(file: Path, first: Sequence[RawRecord]) -> list[Any]:
    records = [record.value for record in first if record.problem is None]
    if not any(isinstance(record, dict) for record in records):
        if not first:
            found = "is empty"
        elif first[0].problem is Reason.BUDGET:
            found = "expands beyond its budget before its first record"
        elif first[0].problem is Reason.BREAKS_OFF:
            found = "is damaged or breaks off before its first record"
        else:
            found = f"has no JSON object among its first {len(first)} records"
        message = (
            f"{shown_path(file)} {found}. Expected JSON lines, a JSON list, CSV, Parquet or Arrow with records in a "
            "layout of docs/data.md; give another file."
        )
        if not first or first[0].problem in (Reason.BREAKS_OFF, Reason.BUDGET):
            raise NoRecordsError(message, first[0].problem or Reason.EMPTY_FILE if first else Reason.EMPTY_FILE)
        raise QAdapterError(message)
    return records


def detect_format(file: Path, *, domain: str | None = None, choices: Choices | None = None) -> str:
    """The name of a file's layout; see `open_reader`."""
    return open_reader(file, domain=domain, choices=choices).name


def read_pairs(
    file: Path,
    *,
    domain: str | None = None,
    max_chars: int | None = None,
    choices: Choices | None = None,
    position: Position | None = None,
) -> Iterator[ParsedRecord]:
    """Parses a file into candidate pairs, in the file's order. The layout is checked on the call, the rest streams.

    Args:
        file: see `containers.iter_records`.
        domain: the preferred style of DSP data; must be None for every other format.
        max_chars: a pair whose prompt and longer reply together have more characters is rejected as over-long.
        choices: what the user decided.
        position: is kept up to date while the records are taken.

    Raises:
        NoRecordsError: the file is empty or damaged from its beginning on.
        QAdapterError: as `open_reader`. Single records never raise.
    """
    records = file_records(file, choices, position=position)
    first = head(records)
    reader = recognise(_objects_of(file, first), where=shown_path(file), domain=domain, choices=inside(choices))
    return _parse_file(file, itertools.chain(first, records), reader, max_chars)


def _parse_file(
    file: Path, records: Iterable[RawRecord], reader: Reader, max_chars: int | None
) -> Iterator[ParsedRecord]:
    yield from parse_records(file, records, reader, max_chars)
    for _, line, candidate in reader.finish():
        yield parsed(file, line, candidate, max_chars)


def parse_records(
    file: Path, records: Iterable[RawRecord], reader: Reader, max_chars: int | None, shard: int = 0
) -> Iterator[ParsedRecord]:
    """The candidate pairs of a file's records, but for those that `reader.finish` gives.

    Args:
        file: for the results.
        records: of the file.
        reader: for them.
        max_chars: see `read_pairs`.
        shard: the file's number, by which `reader.finish` names it.
    """
    for record in records:
        candidates = [record.problem] if record.problem else reader.read(record.value, record.line, shard)
        for candidate in candidates:
            yield parsed(file, record.line, candidate, max_chars)


def parsed(file: Path, line: int, candidate: PreferencePair | Reason, max_chars: int | None) -> ParsedRecord:
    """A candidate with its place; over-long ones rejected."""
    if isinstance(candidate, Reason):
        return Rejected(file, line, candidate)
    if max_chars is not None and characters(candidate) > max_chars:
        return Rejected(file, line, Reason.TOO_LONG)
    return Accepted(file, line, candidate)


def characters(pair: PreferencePair) -> int:
    """Characters of the prompt and the longer reply together."""
    return sum(len(turn["content"]) for turn in pair.prompt) + max(len(pair.chosen), len(pair.rejected))
