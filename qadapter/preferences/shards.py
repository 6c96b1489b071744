"""Files of one data set read as one: which files belong together, and the one reader for all of them.

Files of a folder belong together if their columns are the same, or if their names say that they are parts of a whole
(`train-00000-of-00007.parquet`). Their first records vote once for a layout, so that a part whose first records look
like another layout is not read as that. A part that disagrees is named, and its records are quarantined where the
layout does not fit them.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qadapter.errors import QAdapterError
from qadapter.files.folders import shown_path
from qadapter.preferences.building import Choices
from qadapter.preferences.containers import HEAD_BYTES, RECORDS_TO_DETECT, NoRecordsError
from qadapter.preferences.pair import LabelledReply
from qadapter.preferences.parts import part_of
from qadapter.preferences.reader import Reader
from qadapter.preferences.reading import first_records, inside
from qadapter.preferences.recognition import recognise, vote

log = logging.getLogger(__name__)

VOTERS, VOTERS_BYTES = 2000, 64 * 2**20
"""The records of all files that vote together, and their size, unless there are so many files that each has ten."""


@dataclass(slots=True)
class Findings:
    """What was found out about some files beside their pairs.

    Attributes:
        formats: the layout that each file was read in; `none` where a file is set aside.
        odd: files whose own first records look like another layout than the one they are read in, with that one.
        counts: pairs that were kept although their scores are equal, or against the decision.
        labels: how often each label was given, or each side preferred.
        single: gets each unpaired row, if it is set.
    """

    formats: dict[Path, str] = field(default_factory=dict)
    odd: dict[Path, str] = field(default_factory=dict)
    counts: Counter[str] = field(default_factory=Counter)
    labels: Counter[str] = field(default_factory=Counter)
    single: Callable[[LabelledReply], None] | None = None


@dataclass(slots=True)
class Opened:
    """Files with their readers.

    Attributes:
        readers: of each file; the files that belong together share one.
        aside: files without a record.
        refused: files that cannot be read, where they were asked to be collected.
    """

    readers: dict[Path, Reader] = field(default_factory=dict)
    aside: dict[Path, NoRecordsError] = field(default_factory=dict)
    refused: dict[Path, QAdapterError] = field(default_factory=dict)

    def name_of(self, reader: Reader) -> str:
        """The file that a reader reads, or the first one and how many more."""
        files = [file for file, of_file in self.readers.items() if of_file is reader]
        return shown_path(files[0]) + (f" and {len(files) - 1} more files" if len(files) > 1 else "")

    def distinct(self) -> list[Reader]:
        """Each reader once."""
        return list({id(reader): reader for reader in self.readers.values()}.values())


def open_files(
    files: Sequence[Path],
    *,
    domain: str | None = None,
    choices: Choices | None = None,
    findings: Findings | None = None,
    collect: bool = False,
) -> Opened:
    """Choose the readers of some files.

    Args:
        files: of one source.
        domain, choices: see `reading.recognise`.
        findings: gets formats and odd files.
        collect: a file that cannot be read is collected, not raised.

    Raises:
        QAdapterError: a file cannot be read, or files that belong together have no known layout.
    """
    findings, opened = findings or Findings(), Opened()
    files = list(dict.fromkeys(files))
    heads: dict[Path, list[Any]] = {}
    count = min(RECORDS_TO_DETECT, max(10, VOTERS // max(1, len(files))))
    size = min(HEAD_BYTES, VOTERS_BYTES // max(1, len(files)))
    for file in files:
        try:
            heads[file] = first_records(file, choices, count=count, size=size)
        except NoRecordsError as error:
            opened.aside[file] = error
        except QAdapterError as error:
            if not collect:
                raise
            opened.refused[file] = error
    for together in _together(heads):
        where = shown_path(together[0])
        if len(together) > 1:
            where = f"{shown_path(together[0].parent)} ({len(together)} files such as {shown_path(together[0].name)})"
        records = [record for file in together for record in heads[file]]
        try:
            reader = recognise(records, where=where, domain=domain, choices=inside(choices))
        except QAdapterError as error:
            if not collect:
                raise
            opened.refused |= dict.fromkeys(together, error)
            continue
        for other in opened.distinct():  # rows are paired with rows of all files of the source
            if reader.across_records and other.name == reader.name:
                reader.share(other)
        opened.readers |= dict.fromkeys(together, reader)
        findings.formats |= dict.fromkeys(together, reader.name)
        if len(together) > 1 and reader.name != "mapping":
            _name_odd(together, heads, records, reader, findings)
    return opened


def _name_odd(
    together: Sequence[Path], heads: dict[Path, list[Any]], records: list[Any], reader: Reader, findings: Findings
) -> None:
    """Name the files whose first records vote for another layout than all together."""
    winner = vote(records)
    for file in together:
        own = vote(heads[file])
        if own == winner:
            continue
        findings.odd[file] = " or ".join(own) or "no known layout"
        log.warning(
            "%s disagrees with the other files of its data set: its first records look like %s. It is read as %s, like "
            "the others; what does not fit is quarantined",
            shown_path(file),
            findings.odd[file],
            reader.name,
        )


def _together(heads: dict[Path, list[Any]]) -> Iterator[list[Path]]:
    """The files that belong together, in the order of their first one."""
    groups: list[list[Path]] = []
    of_key: dict[Any, list[Path]] = {}
    for file, records in heads.items():
        part = part_of(file.name)
        keys: list[Any] = [(file.parent, "columns", _columns(records))]
        if part:
            keys.append((file.parent, "part", *part))
        found = [group for group in groups if any(of_key.get(key) is group for key in keys)]
        group = found[0] if found else []
        if not found:
            groups.append(group)
        for other in found[1:]:  # it joins two groups
            group += other
            groups.remove(other)
            of_key = {key: group if value is other else value for key, value in of_key.items()}
        group.append(file)
        of_key |= dict.fromkeys(keys, group)
    yield from groups


def _columns(records: Sequence[Any]) -> frozenset[tuple[str, str]]:
    """The columns that most of a file's first records fill, each with the kind of its values."""
    kinds = {str: "text", list: "list", dict: "object", bool: "truth", int: "number", float: "number"}
    found = Counter(
        (str(key), kinds.get(type(value), ""))
        for record in records
        if isinstance(record, dict)
        for key, value in record.items()
        if value is not None
    )
    return frozenset(column for column, count in found.items() if 2 * count > len(records))
