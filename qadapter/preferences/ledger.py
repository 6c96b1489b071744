"""Preference files that grow: which records are new, and what each one gave, so that none is validated twice.

A ledger is a folder. `records.jsonl` has one line per record: its position, the digest of its content, its outcome
(pairs, or the reason why there is none) and whether it is fresh, that is new or changed since the ledger before.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import digest_file, read_json, write_json
from qadapter.files.folders import shown_path
from qadapter.preferences.building import Choices
from qadapter.preferences.pair import PreferencePair
from qadapter.preferences.reader import Reader
from qadapter.preferences.reading import characters, file_records, open_reader
from qadapter.preferences.records import RawRecord, Reason
from qadapter.preferences.sources import DATA_ENDINGS

RECORDS, SUMMARY, QUARANTINE = "records.jsonl", "summary.json", "quarantine.jsonl"
REFUSED_FILE = "the whole file: no known format"
"""Reason of the single entry for a file that cannot be read."""
UNREAD_FILE = "the whole file: its name has no ending of a data file"
"""Reason of the single entry for a file that is not opened (`sources.unread_files`)."""


@dataclass(frozen=True)
class Entry:
    """One record.

    Attributes:
        file: name of its file, relative to the folder that holds them all.
        line: see `RawRecord.line`.
        digest: sha256 of its content and format; of its place where it cannot be read.
        outcome: for each candidate pair the pair in TRL's format, or the reason (text) why it is none.
        fresh: new or changed since the ledger before.
    """

    file: str
    line: int
    digest: str
    outcome: list[Any]
    fresh: bool

    @property
    def pairs(self) -> list[PreferencePair]:
        """The pairs that can be used."""
        return [PreferencePair.from_trl(found) for found in self.outcome if not isinstance(found, str)]

    @property
    def reasons(self) -> list[str]:
        """Why the other candidates cannot."""
        return [found for found in self.outcome if isinstance(found, str)]


@dataclass(frozen=True)
class Changes:
    """What an update found; counts of records unless named otherwise.

    Attributes:
        new, changed, unchanged: records that are there now and were not; that stand where another one stood; that were.
        removed: records that are there no more.
        validated: records that were parsed; the others' outcomes are known.
        fresh_pairs: usable pairs of new and changed records.
        quarantined: candidate pairs that cannot be used, by reason; `fresh_quarantined` of new and changed records.
        refused_files: files of which nothing can be read, or that are not read, with the reason for people.
        rules: the validation rules that all outcomes follow (`update`).
    """

    new: int
    changed: int
    unchanged: int
    removed: int
    validated: int
    fresh_pairs: int
    quarantined: dict[str, int]
    fresh_quarantined: dict[str, int]
    refused_files: dict[str, str] = field(default_factory=dict)
    rules: str = ""

    def text(self) -> str:
        """For people: `12 new, 1 changed, 0 removed and 80 unchanged records; 13 usable new pairs, 2 quarantined`."""
        return (
            f"{self.new} new, {self.changed} changed, {self.removed} removed and {self.unchanged} unchanged records; "
            f"{self.fresh_pairs} usable new pairs, {sum(self.fresh_quarantined.values())} quarantined"
        )


def update(
    files: Sequence[Path],
    previous: Path | None,
    out: Path,
    *,
    domain: str | None,
    max_chars: int,
    rules: str,
    unread: Mapping[str, int] | None = None,
    choices: Choices | None = None,
) -> Changes:
    """Write a ledger of some files.

    Unlike the preparation of a fixed data set, a file of no known format is not an error: it is quarantined as a whole,
    so that one broken delivery does not keep the others from being used.

    Args:
        files: all of the source's files as they are now.
        previous: the ledger before; None for the first.
        out: an empty folder; gets `records.jsonl`, `quarantine.jsonl` (file, line, reason) and `summary.json`.
        domain, max_chars: as in `qadapter.preferences.prepare.prepare`.
        rules: everything that determines how records are validated (code, domain, limit). A ledger of other rules is
            not used.
        choices: what the data leave open (`fields`, `score`, `pairing` …).
        unread: files beside them that are no data by their names, with their sizes: refused without being opened.
    """
    if previous is not None and read_json(previous / SUMMARY)["rules"] != rules:
        previous = None
    before = list(read(previous)) if previous else []
    known = {entry.digest: entry.outcome for entry in before}
    old_places = {(entry.file, entry.line): entry.digest for entry in before}
    entries: list[Entry] = []
    validated, refused = 0, {}
    for name, file in _names(files).items():
        try:
            reader = open_reader(file, domain=domain, choices=choices)
        except QAdapterError as error:
            refused[name] = str(error).splitlines()[0]
            digest = digest_file(file)
            entries.append(Entry(name, 1, digest, [REFUSED_FILE], digest not in known))
            continue
        for record in file_records(file, choices):
            digest = _digest(name, record, reader.name)
            # What an unpaired row gives depends on the rows before it, which may have changed.
            outcome = None if reader.across_records else known.get(digest)
            if outcome is None:
                validated += 1
                outcome = _validate(record, reader, max_chars)
            entries.append(Entry(name, record.line, digest, outcome, digest not in known))
        left = dict(reader.finish())
        for entry in entries:
            if entry.file == name and entry.line in left:
                entry.outcome.append(left[entry.line].value)
    for name, size in (unread or {}).items():
        refused[name] = f"its name ends in none of {DATA_ENDINGS}; rename it, or convert it to one of these"
        digest = hashlib.sha256(f"{UNREAD_FILE}\n{name}\n{size}".encode(errors="surrogateescape")).hexdigest()
        entries.append(Entry(name, 1, digest, [UNREAD_FILE], digest not in known))
    now = {entry.digest for entry in entries}
    fresh = [entry for entry in entries if entry.fresh]
    # A record that took the place of one that is gone is that one, changed; the rest of what is gone was removed.
    gone = {place for place, digest in old_places.items() if digest not in now}
    changed = len(gone & {(entry.file, entry.line) for entry in fresh})
    changes = Changes(
        new=len(fresh) - changed,
        changed=changed,
        unchanged=len(entries) - len(fresh),
        removed=len(gone) - changed,
        validated=validated,
        fresh_pairs=sum(len(entry.pairs) for entry in fresh),
        quarantined=_reasons(entries),
        fresh_quarantined=_reasons(fresh),
        refused_files=refused,
        rules=rules,
    )
    _write_lines(out / RECORDS, (asdict(entry) for entry in entries))
    _write_lines(
        out / QUARANTINE,
        ({"file": e.file, "line": e.line, "reason": reason} for e in entries for reason in e.reasons),
    )
    write_json(out / SUMMARY, asdict(changes))
    return changes


def read(ledger: Path) -> Iterator[Entry]:
    """The records of a ledger."""
    with (ledger / RECORDS).open(encoding="utf-8") as lines:
        for line in lines:
            yield Entry(**json.loads(line))


def _validate(record: RawRecord, reader: Reader, max_chars: int) -> list[Any]:
    if record.problem:
        return [record.problem.value]
    outcome: list[Any] = []
    for candidate in reader.read(record.value, record.line):
        if isinstance(candidate, Reason):
            outcome.append(candidate.value)
        else:
            outcome.append(Reason.TOO_LONG.value if characters(candidate) > max_chars else candidate.to_row())
    return outcome


def _digest(name: str, record: RawRecord, layout: str) -> str:
    if record.problem:
        content = f"{record.problem}\n{name}\n{record.line}"
    else:
        content = json.dumps(record.value, sort_keys=True, default=str)
    return hashlib.sha256(f"{layout}\n{content}".encode(errors="surrogatepass")).hexdigest()


def _names(files: Sequence[Path]) -> dict[str, Path]:
    """Files by their names relative to the folder that holds them all (`packed.shown_path`)."""
    if not files:
        return {}
    common = os.path.commonpath([file.absolute().parent for file in files])
    names: dict[str, Path] = {}
    for file in files:
        name = shown_path(os.path.relpath(file.absolute(), common))
        while name in names:  # a name that is shown as another one is written
            name += "'"
        names[name] = file
    return names


def _reasons(entries: Sequence[Entry]) -> dict[str, int]:
    return dict(sorted(Counter(reason for entry in entries for reason in entry.reasons).items()))


def _write_lines(file: Path, rows: Iterator[Any]) -> None:
    with file.open("w", encoding="utf-8") as stream:
        for row in rows:
            stream.write(json.dumps(row, ensure_ascii=True) + "\n")
