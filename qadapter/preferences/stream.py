"""Files as one stream of pairs and rejections, for those that prepare, show, count or score them."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qadapter.errors import QAdapterError
from qadapter.files.folders import shown_path
from qadapter.preferences.building import Choices
from qadapter.preferences.pair import LabelledReply, PreferencePair
from qadapter.preferences.progress import Progress
from qadapter.preferences.reader import Accepted, Rejected
from qadapter.preferences.reading import file_records, parse_records, parsed
from qadapter.preferences.shards import Findings, open_files

logger = logging.getLogger(__name__)

NO_FORMAT = "none"
"""In place of the format of a file that is set aside."""

DEFAULT_MAX_CHARS = 20_000
"""Ten times what 512 tokens, the paper's length, hold: a longer pair would be cut to a small part of itself."""


@dataclass(slots=True)
class ParsedFiles:
    """All candidate pairs of some files, in reading order.

    Attributes:
        read: number of candidate pairs, counted as they came in.
        pairs: the usable ones.
        rejected: the others.
        findings: what else was found.
    """

    read: int
    pairs: list[PreferencePair]
    rejected: list[Rejected]
    findings: Findings

    @property
    def formats(self) -> dict[Path, str]:
        """The detected format of every file."""
        return self.findings.formats


def stream_files(
    files: Sequence[Path],
    findings: Findings,
    *,
    domain: str | None = None,
    max_chars: int = DEFAULT_MAX_CHARS,
    choices: Choices | None = None,
) -> Iterator[Accepted | Rejected]:
    """Reads files to pairs and rejections, one at a time. Every file's format is checked before the first is read.

    A file that is empty, or damaged from its beginning on, is one rejection where there are others. Every 20 seconds a
    log line says how far the reading is.

    Args:
        files: the files.
        findings: gets the detected format of every file, `none` where a file is set aside, and more.
        domain, max_chars, choices: see `prepare`.

    Raises:
        QAdapterError: no files, an unreadable file or one of an unknown format, a wrong domain.
    """
    if not files:
        raise QAdapterError("No preference file was given; at least one was expected.")
    opened = open_files(files, domain=domain, choices=choices, findings=findings)
    aside = opened.aside
    findings.formats |= dict.fromkeys(aside, NO_FORMAT)
    if len(aside) == len(set(files)):
        raise next(iter(aside.values()))
    for reader in opened.distinct():
        reader.give_single(findings.single)
    progress = Progress(files)
    with progress.reported("reading preferences"):
        for number, file in enumerate(files):
            position = progress.next_file(file)
            if file in aside:
                logger.warning("%s", str(aside[file]).partition(". Expected")[0] + "; it is set aside")
                yield Rejected(file, 1, aside[file].reason)
                continue
            records = file_records(file, choices, position=position)
            for item in parse_records(file, records, opened.readers[file], max_chars, number):
                progress.count()
                yield item
    for reader in opened.distinct():
        for shard, line, candidate in reader.finish():
            progress.count()
            yield parsed(files[shard], line, candidate, max_chars)
        findings.counts.update(reader.counts)
        findings.labels.update(reader.labels)
        for what, count in reader.counts.items():
            logger.warning("%s: %d pairs with %s; `ties: drop` leaves them out", opened.name_of(reader), count, what)


def parse_files(
    files: Sequence[Path],
    *,
    domain: str | None = None,
    max_chars: int = DEFAULT_MAX_CHARS,
    choices: Choices | None = None,
) -> ParsedFiles:
    """All that `stream_files` gives, held in memory. Arguments and errors are its."""
    found = ParsedFiles(0, [], [], Findings())
    for item in stream_files(files, found.findings, domain=domain, max_chars=max_chars, choices=choices):
        found.read += 1
        if isinstance(item, Accepted):
            found.pairs.append(item.pair)
        else:
            found.rejected.append(item)
    return found


def first_usable_pair(
    files: Sequence[Path],
    domain: str | None = None,
    max_chars: int = DEFAULT_MAX_CHARS,
    choices: Choices | None = None,
) -> PreferencePair:
    """The first pair that can be used, found without reading further than needed. Checks the format of every file.

    Raises:
        QAdapterError: as `parse_files`, or no usable pair; the message counts the reasons.
    """
    reasons: Counter[str] = Counter()
    for item in stream_files(files, Findings(), domain=domain, max_chars=max_chars, choices=choices):
        if isinstance(item, Accepted):
            return item.pair
        reasons[item.reason.value] += 1
    raise no_usable_pair(files, reasons)


class _FoundError(Exception):
    """A usable row was found; nothing further need be read."""


def check_usable(
    files: Sequence[Path],
    domain: str | None = None,
    max_chars: int = DEFAULT_MAX_CHARS,
    choices: Choices | None = None,
) -> None:
    """Refuse files without a usable pair, or without a usable row where single replies are kept (`pairing: none`).

    Raises:
        QAdapterError: as `first_usable_pair`.
    """

    def found(_: LabelledReply) -> None:
        raise _FoundError

    if choices is None or choices.pairing != "none":
        first_usable_pair(files, domain, max_chars, choices)
        return
    reasons: Counter[str] = Counter()
    try:
        for item in stream_files(files, Findings(single=found), domain=domain, max_chars=max_chars, choices=choices):
            reasons[item.reason.value if isinstance(item, Rejected) else "a pair, where single replies are kept"] += 1
    except _FoundError:
        return
    raise no_usable_pair(files, reasons)


def no_usable_pair(files: Sequence[Path], reasons: Mapping[str, int]) -> QAdapterError:
    """The refusal of files whose candidates were all rejected, with the number of each reason."""
    names = ", ".join(map(shown_path, files[:3])) + (f" and {len(files) - 3} more" if len(files) > 3 else "")
    counts = "; ".join(f"{reason}: {count}" for reason, count in sorted(reasons.items()))
    return QAdapterError(
        f"No usable preference pair in {names}: {sum(reasons.values())} read, all of them quarantined ({counts}). "
        "Correct the data or name another source."
    )
