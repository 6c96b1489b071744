"""Preference data in the formats it is published in, auto-detected and parsed to `PreferencePair`.

The unit of counting is the *candidate pair*: what a record would give if nothing were wrong with it. HH and TRL records
give one, a text-score record of n dialogues n·(n-1)/2, a DSP record one for every style other than the wanted domain. A
record too broken to tell counts as one. Every candidate comes out either `Accepted` or `Rejected`, so the two always
add up to what was read.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from qadapter.errors import QAdapterError
from qadapter.preferences import parsers
from qadapter.preferences.containers import NoRecordsError, Position, head, iter_records
from qadapter.preferences.packed import shown_path
from qadapter.preferences.pair import PreferencePair
from qadapter.preferences.records import RawRecord, Reason


class Format(StrEnum):
    """The record formats that are read. Where records fit several, the first one named here is meant."""

    DSP = "dsp"
    TEXT_SCORE = "text-score"
    HH = "hh-dialogues"
    TRL_CONVERSATION = "trl-conversational"
    TRL_CONVERSATION_IMPLICIT = "trl-conversational-implicit"
    TRL_PLAIN = "trl-plain"
    TRL_PLAIN_IMPLICIT = "trl-plain-implicit"


EXAMPLES: dict[Format, str] = {
    Format.DSP: '{"query": "…", "responses": {"academy": "…", "business": "…", "normal": "…"}}  (needs `domain`)',
    Format.TEXT_SCORE: '{"text": ["\\n\\nHuman: …\\n\\nAssistant: …", "…"], "score": [1.0, 0.0]}',
    Format.HH: '{"chosen": "\\n\\nHuman: …\\n\\nAssistant: …", "rejected": "\\n\\nHuman: …\\n\\nAssistant: …"}',
    Format.TRL_CONVERSATION: '{"prompt": [{"role": "user", "content": "…"}], '
    '"chosen": [{"role": "assistant", "content": "…"}], "rejected": [{"role": "assistant", "content": "…"}]}',
    Format.TRL_CONVERSATION_IMPLICIT: '{"chosen": [{"role": "user", "content": "…"}, '
    '{"role": "assistant", "content": "…"}], "rejected": [the same prompt, another reply]}',
    Format.TRL_PLAIN: '{"prompt": "…", "chosen": "…", "rejected": "…"}',
    Format.TRL_PLAIN_IMPLICIT: '{"chosen": "prompt reply", "rejected": "prompt other reply"}',
}


@dataclass(frozen=True, slots=True)
class Accepted:
    """A candidate pair that can be used, and where it came from (see `RawRecord.line`)."""

    file: Path
    line: int
    pair: PreferencePair


@dataclass(frozen=True, slots=True)
class Rejected:
    """A candidate pair that cannot be used, where it came from and why."""

    file: Path
    line: int
    reason: Reason


ParsedRecord = Accepted | Rejected


def detect_format(file: Path) -> Format:
    """The format that most of a file's first 100 records are in.

    Raises:
        QAdapterError: the file cannot be read or none of those records is in a known format. The message shows the
            first record's fields, never its contents.
    """
    return _detect(file, head(iter_records(file)))


def read_pairs(
    file: Path, *, domain: str | None = None, max_chars: int | None = None, position: Position | None = None
) -> Iterator[ParsedRecord]:
    """Parses a file into candidate pairs, in the file's order. The format is checked on the call, the rest streams.

    Args:
        file: see `records.iter_records`.
        domain: the preferred style of DSP data; must be None for every other format.
        max_chars: a pair whose prompt and longer reply together have more characters is rejected as over-long.
        position: see `containers.iter_records`.

    Raises:
        NoRecordsError: the file is empty or damaged from its beginning on.
        QAdapterError: unreadable file, unknown format, DSP data without a domain or with one that it does not have, or
            a domain given for another format. Single records never raise.
    """
    records = iter_records(file, position=position)
    first = head(records)
    file_format = _detect(file, first)
    _check_domain(file, file_format, first, domain)
    return _parse_all(file, itertools.chain(first, records), file_format, domain, max_chars)


def _parse_all(
    file: Path, records: Iterable[RawRecord], file_format: Format, domain: str | None, max_chars: int | None
) -> Iterator[ParsedRecord]:
    for record in records:
        candidates = [record.problem] if record.problem else parse_record(record.value, file_format, domain=domain)
        for candidate in candidates:
            if isinstance(candidate, Reason):
                yield Rejected(file, record.line, candidate)
            elif max_chars is not None and _characters(candidate) > max_chars:
                yield Rejected(file, record.line, Reason.TOO_LONG)
            else:
                yield Accepted(file, record.line, candidate)


def parse_record(record: Any, file_format: Format, *, domain: str | None = None) -> parsers.Candidates:
    """All candidate pairs of one decoded record, at least one, each a pair or the reason why it is none."""
    if not isinstance(record, dict):
        return [Reason.NOT_AN_OBJECT]
    try:
        return PARSERS[file_format](record, domain)
    except parsers.UnusableError as error:
        return [error.reason]


def _detect(file: Path, head: list[RawRecord]) -> Format:
    votes = Counter(shape for record in head if (shape := _shape(record.value)) is not None)
    if votes:
        return max(votes, key=lambda shape: (votes[shape], -list(Format).index(shape)))
    readable = next((record.value for record in head if record.problem is None), None)
    if not head:
        found = "is empty"
    elif isinstance(readable, dict):
        fields = ", ".join(f"{_printable(key)}: {type(value).__name__}" for key, value in list(readable.items())[:8])
        found = f"has records of an unknown format; the first one has the fields {{{fields}}}"
    elif head[0].problem is Reason.BREAKS_OFF:
        found = "is damaged or breaks off before its first record"
    elif head[0].problem is Reason.BUDGET:
        found = "expands beyond its budget before its first record"
    else:
        found = f"has no JSON object among its first {len(head)} records"
    known = "".join(f"\n  {name.value}: {example}" for name, example in EXAMPLES.items())
    message = (
        f"{shown_path(file)} {found}. Expected JSON lines, a JSON list, CSV, Parquet or Arrow (docs/data.md) "
        f"in one of these formats; convert the file to one of them:{known}"
    )
    if not head or head[0].problem in (Reason.BREAKS_OFF, Reason.BUDGET):
        raise NoRecordsError(message, head[0].problem or Reason.EMPTY_FILE if head else Reason.EMPTY_FILE)
    raise QAdapterError(message)


def _shape(record: Any) -> Format | None:
    """The format a single record looks like, from its fields and their types alone."""
    if not isinstance(record, dict):
        return None
    if isinstance(record.get("query"), str) and isinstance(record.get("responses"), dict):
        return Format.DSP
    if isinstance(record.get("text"), list) and "score" in record:
        return Format.TEXT_SCORE
    chosen, rejected, prompt = record.get("chosen"), record.get("rejected"), record.get("prompt")
    if isinstance(chosen, list) and isinstance(rejected, list):
        return Format.TRL_CONVERSATION_IMPLICIT if prompt is None else Format.TRL_CONVERSATION
    if isinstance(chosen, str) and isinstance(rejected, str):
        if parsers.is_dialogue(chosen) and parsers.is_dialogue(rejected):
            return Format.HH
        return Format.TRL_PLAIN_IMPLICIT if prompt is None else Format.TRL_PLAIN
    return None


def _printable(key: Any) -> str:
    text = str(key).encode("ascii", "replace").decode()
    return text if len(text) <= 30 else text[:30] + "…"


def _check_domain(file: Path, file_format: Format, head: list[RawRecord], domain: str | None) -> None:
    if file_format is not Format.DSP:
        if domain is not None:
            raise QAdapterError(
                f"{file} has the format {file_format.value}, for which `domain: {domain}` means nothing. "
                "Domains select responses of DSP data only; leave `domain` out."
            )
        return
    records = [record.value for record in head if _shape(record.value) is Format.DSP]
    domains = sorted({style for record in records for style in record["responses"]})
    if domain not in domains:
        given = "no domain was given" if domain is None else f"there is no domain '{domain}' in it"
        raise QAdapterError(
            f"{file} is DSP data, and {given}. Its domains are {', '.join(map(_printable, domains[:20])) or '(none)'}; "
            "set `domain` to one of them."
        )


def _characters(pair: PreferencePair) -> int:
    return sum(len(turn["content"]) for turn in pair.prompt) + max(len(pair.chosen), len(pair.rejected))


PARSERS: dict[Format, Callable[[dict[str, Any], str | None], parsers.Candidates]] = {
    Format.DSP: parsers.parse_dsp,
    Format.TEXT_SCORE: parsers.parse_text_score,
    Format.HH: parsers.parse_hh,
    Format.TRL_CONVERSATION: parsers.parse_conversation,
    Format.TRL_CONVERSATION_IMPLICIT: parsers.parse_conversation,
    Format.TRL_PLAIN: parsers.parse_plain,
    Format.TRL_PLAIN_IMPLICIT: parsers.parse_plain_implicit,
}
