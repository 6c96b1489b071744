"""Preference files that grow: which records are new, and what each one gave, so that none is validated twice.

A ledger is a folder. `records.jsonl` has one line per record: its position, the digest of its content, its outcome
(pairs, or the reason why there is none) and whether it is fresh, that is new or changed since the ledger before.
"""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qadapter.files.artifacts import digest_file, json_line, read_json, write_json
from qadapter.files.folders import shown_path
from qadapter.preferences.building import Choices
from qadapter.preferences.pair import PreferencePair
from qadapter.preferences.reader import Accepted, ParsedRecord, Reader
from qadapter.preferences.reading import file_records, parse_records, parsed
from qadapter.preferences.records import RawRecord
from qadapter.preferences.shards import Findings, open_files
from qadapter.preferences.sources import DATA_ENDINGS
from qadapter.preferences.split import DIGEST_BYTES, Digests, among

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
        digest: sha256 of its content and of how it is read; of its place where it cannot be read.
        outcome: for each candidate pair the pair in TRL's format, or the reason (text) why it is none.
        fresh: new or changed since the ledger before; what is late is so too where the ledger before has it not.
        late: it has what was known only behind the last record (an unpaired row that had to wait); its record stands
            before it, with the rest of the outcome.
    """

    file: str
    line: int
    digest: str
    outcome: list[Any]
    fresh: bool
    late: bool = False

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
        fresh_pairs: usable pairs of new and changed records; of unpaired rows also those that an earlier row makes with
            a new one.
        quarantined: candidate pairs that cannot be used, by reason; `fresh_quarantined` of new and changed records.
        refused_files: files of which nothing can be read, or that are not read, with the reason for people.
        odd_files: files that were read like the others of their data set although their own first records look like
            another layout, with that one.
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
    odd_files: dict[str, str] = field(default_factory=dict)
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
    """Write a ledger of some files, holding about 100 bytes per record of both ledgers, of unpaired rows 200.

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
    names = list(_names(files).items())
    findings = Findings()
    opened = open_files([file for _, file in names], domain=domain, choices=choices, findings=findings, collect=True)
    readings = {file: reader.reading for file, reader in opened.readers.items()}  # before a record is read
    refused: dict[str, str] = {}
    with _Before(previous) as before, _Writer(out, before) as now:
        for number, (name, file) in enumerate(names):
            error = opened.aside.get(file) or opened.refused.get(file)
            if error is not None:
                refused[name] = str(error).splitlines()[0]
                now.write(name, 1, digest_file(file), [REFUSED_FILE])
                continue
            reader = opened.readers[file]
            for record in file_records(file, choices):
                digest = _digest(name, record, readings[file])
                # What an unpaired row gives depends on the rows before it, which may have changed.
                outcome = None if reader.across_records else before.outcome(digest)
                if outcome is None:
                    now.validated += 1
                    outcome = _validate(file, record, reader, max_chars, number)
                now.write(name, record.line, digest, outcome, across_records=reader.across_records)
        for reader in opened.distinct():
            for shard, line, candidate in reader.finish():
                name, file = names[shard]
                now.write_late(name, line, _outcome(parsed(file, line, candidate, max_chars)))
        for name, size in (unread or {}).items():
            refused[name] = f"its name ends in none of {DATA_ENDINGS}; rename it, or convert it to one of these"
            digest = hashlib.sha256(f"{UNREAD_FILE}\n{name}\n{size}".encode(errors="surrogateescape")).hexdigest()
            now.write(name, 1, digest, [UNREAD_FILE])
        changes = now.changes(
            refused_files=refused,
            odd_files={name: findings.odd[file] for name, file in names if file in findings.odd},
            rules=rules,
        )
    write_json(out / SUMMARY, asdict(changes))
    return changes


def read(ledger: Path) -> Iterator[Entry]:
    """The records of a ledger."""
    with (ledger / RECORDS).open(encoding="utf-8") as lines:
        for line in lines:
            yield Entry(**json.loads(line))


class _Before:
    """The ledger before: which records it has, and where their outcomes are."""

    def __init__(self, ledger: Path | None) -> None:
        digests, places, offsets = bytearray(), bytearray(), array("Q")
        self._stream = (ledger / RECORDS).open("rb") if ledger else None
        at = 0
        for line in self._stream or ():
            entry = json.loads(line)
            if not entry.get("late"):
                digests += bytes.fromhex(entry["digest"])[:DIGEST_BYTES]
                places += _place(entry["file"], entry["line"])
                offsets.append(at)
            at += len(line)
        self._all = _digests(digests)
        self.places = _digests(places)
        self._given: Digests | None = None
        order = np.argsort(self._all, kind="stable")
        self._sorted, self._offsets = self._all[order], np.frombuffer(offsets, np.uint64)[order]

    def __enter__(self) -> _Before:
        return self

    def __exit__(self, *error: object) -> None:
        if self._stream:
            self._stream.close()

    def __contains__(self, digest: str) -> bool:
        return self._at(digest) is not None

    def _at(self, digest: str) -> int | None:
        key = np.frombuffer(bytes.fromhex(digest)[:DIGEST_BYTES], _DIGEST)[0]
        place = int(np.searchsorted(self._sorted, key))
        return place if place < len(self._sorted) and self._sorted[place] == key else None

    def outcome(self, digest: str) -> list[Any] | None:
        """What a record gave, if it was there."""
        place = self._at(digest)
        if place is None or self._stream is None:
            return None
        self._stream.seek(int(self._offsets[place]))
        outcome: list[Any] = json.loads(self._stream.readline())["outcome"]
        return outcome

    def gave(self, digest: str, outcome: Any) -> bool:
        """Whether the ledger has a pair, in any of its records, or the reason why a record gave none."""
        if self._given is None:
            self._given = np.sort(_digests(self._outcomes()))
        return bool(among(np.frombuffer(_given(digest, outcome), _DIGEST), self._given)[0])

    def _outcomes(self) -> bytearray:
        found = bytearray()
        if self._stream is not None:
            self._stream.seek(0)
            for line in self._stream:
                entry = json.loads(line)
                for outcome in entry["outcome"]:
                    found += _given(entry["digest"], outcome)
        return found

    def gone(self, now: Digests) -> Digests:
        """The places of the records that are not among these digests."""
        return np.unique(self.places[~np.isin(self._all, now)])


class _Writer:
    """A ledger that is being written."""

    def __init__(self, out: Path, before: _Before) -> None:
        self._records = (out / RECORDS).open("wb")
        self._quarantine = (out / QUARANTINE).open("wb")
        self._before = before
        self._digests, self._fresh_places = bytearray(), bytearray()
        self._unpaired_places, self._unpaired_digests = bytearray(), bytearray()
        self._unpaired: tuple[Digests, npt.NDArray[np.intp]] | None = None
        self._entries = self._fresh = self._fresh_pairs = self.validated = 0
        self._reasons: Counter[str] = Counter()
        self._fresh_reasons: Counter[str] = Counter()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, *error: object) -> None:
        self._records.close()
        self._quarantine.close()

    def write(self, file: str, line: int, digest: str, outcome: list[Any], *, across_records: bool = False) -> None:
        """Write a record and its outcome.

        Args:
            file, line, digest, outcome: see `Entry`.
            across_records: whether the outcome depends on other records, so that one that was there may have a new one.
        """
        entry = Entry(file, line, digest, outcome, digest not in self._before)
        self._entries += 1
        self._digests += bytes.fromhex(digest)[:DIGEST_BYTES]
        if entry.fresh:
            self._fresh += 1
            self._fresh_places += _place(file, line)
        if across_records:
            self._unpaired_places += _place(file, line)
            self._unpaired_digests += bytes.fromhex(digest)
        fresh = entry.outcome if entry.fresh else []
        if across_records and not entry.fresh:
            fresh = [found for found in outcome if not self._before.gave(digest, found)]
        self._write(entry, fresh)

    def write_late(self, file: str, line: int, outcome: Any) -> None:
        """Write what became of an unpaired row after all; its record has been written."""
        digest = self._digest_of(file, line)
        fresh = digest not in self._before or not self._before.gave(digest, outcome)
        self._write(Entry(file, line, digest, [outcome], fresh, late=True), [outcome] if fresh else [])

    def _digest_of(self, file: str, line: int) -> str:
        """The digest of an unpaired row that was written."""
        if self._unpaired is None:
            places = _digests(self._unpaired_places)
            order = np.argsort(places, kind="stable")
            self._unpaired = places[order], order
        places, order = self._unpaired
        at = int(order[np.searchsorted(places, np.frombuffer(_place(file, line), _DIGEST)[0])])
        return self._unpaired_digests[_SHA256_BYTES * at : _SHA256_BYTES * (at + 1)].hex()

    def _write(self, entry: Entry, fresh: Sequence[Any]) -> None:
        """Write an entry and count what it gave, of which some is fresh."""
        fields = {"file": entry.file, "line": entry.line, "digest": entry.digest, "outcome": entry.outcome}
        late = {"late": True} if entry.late else {}
        self._records.write(json_line({**fields, "fresh": entry.fresh, **late}))
        for reason in entry.reasons:
            self._quarantine.write(json_line({"file": entry.file, "line": entry.line, "reason": reason}))
        self._reasons.update(entry.reasons)
        self._fresh_reasons.update(found for found in fresh if isinstance(found, str))
        self._fresh_pairs += sum(not isinstance(found, str) for found in fresh)

    def changes(self, **more: Any) -> Changes:
        """What has changed.

        Args:
            more: the fields of `Changes` that are not counted here.
        """
        gone = self._before.gone(_digests(self._digests))
        # A record that took the place of one that is gone is that one, changed; the rest of what is gone was removed.
        changed = int(np.isin(gone, _digests(self._fresh_places)).sum())
        return Changes(
            new=self._fresh - changed,
            changed=changed,
            unchanged=self._entries - self._fresh,
            removed=len(gone) - changed,
            validated=self.validated,
            fresh_pairs=self._fresh_pairs,
            quarantined=dict(sorted(self._reasons.items())),
            fresh_quarantined=dict(sorted(self._fresh_reasons.items())),
            **more,
        )


_DIGEST = np.dtype(f"S{DIGEST_BYTES}")
_SHA256_BYTES = 32


def _digests(values: bytearray) -> Digests:
    return np.frombuffer(bytes(values), _DIGEST)


def _given(digest: str, outcome: Any) -> bytes:
    """What tells apart what records gave: a pair is the same wherever it comes from, a reason is of its record."""
    text = f"{digest}\n{outcome}" if isinstance(outcome, str) else json.dumps(outcome, sort_keys=True)
    return hashlib.sha256(text.encode(errors="surrogatepass")).digest()[:DIGEST_BYTES]


def _place(file: str, line: int) -> bytes:
    return hashlib.sha256(f"{line}\n{file}".encode(errors="surrogatepass")).digest()[:DIGEST_BYTES]


def _validate(file: Path, record: RawRecord, reader: Reader, max_chars: int, shard: int) -> list[Any]:
    return [_outcome(item) for item in parse_records(file, [record], reader, max_chars, shard)]


def _outcome(item: ParsedRecord) -> Any:
    return item.pair.to_row() if isinstance(item, Accepted) else item.reason.value


def _digest(name: str, record: RawRecord, reading: str) -> str:
    if record.problem:
        content = f"{record.problem}\n{name}\n{record.line}"
    else:
        content = json.dumps(record.value, sort_keys=True, default=str)
    return hashlib.sha256(f"{reading}\n{content}".encode(errors="surrogatepass")).hexdigest()


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
