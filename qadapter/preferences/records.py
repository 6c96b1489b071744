"""Raw records, and the reasons why a record or a pair is not used.

`containers.py` reads records out of files. A record that cannot be read is passed on with the reason, so that every
record is counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any

MAX_RECORD_BYTES = 4 * 2**20
"""A larger record is skipped unread, so that a file without line ends cannot fill the memory."""

MAX_RECORD_VALUES = 200_000
"""A record with more JSON values is skipped: an empty list takes 2 bytes in a file and 56 in memory."""


class Reason(StrEnum):
    """The reason why a record, or one of its candidate pairs, is not used.

    The values are what users read. They become names of metrics too: letters, spaces, dashes and colons only.
    """

    BROKEN_JSON = "broken JSON"
    BREAKS_OFF = "the file breaks off or is damaged here: nothing behind this point was read"
    NOT_AN_OBJECT = "not a JSON object"
    WRONG_FIELDS = "a field is missing or has the wrong type"
    NOT_UNICODE = "the text is not valid Unicode"
    NOT_TEXT = "not text alone: an image or sound or file or tool call"
    NOT_A_DIALOGUE = "not a dialogue that begins with a user turn and ends with a reply"
    EMPTY_PROMPT = "the prompt is empty or has an empty turn"
    EMPTY_REPLY = "empty reply"
    DIFFERENT_PROMPTS = "chosen and rejected have different prompts"
    IDENTICAL_REPLIES = "chosen and rejected are identical"
    NO_PREFERENCE = "no preference: the score is missing or tied or not a number"
    WEAK_PREFERENCE = "the margin is below min_margin"
    UNCLEAR_PROMPT = "no prompt field and unclear where the prompt ends: the replies begin alike"
    NO_PARTNER = "no row with the same prompt and the opposite label"
    NO_DOMAIN_RESPONSE = "no response in the wanted domain"
    TOO_LONG = "over-long"
    BROKEN_ROW = "a CSV row that does not fit the columns"
    EQUAL_COLUMNS = "two columns have the same name"
    EMPTY_FILE = "the file is empty"
    BUDGET = "the file expands beyond its budget: nothing behind this point was read"


@dataclass(frozen=True, slots=True)
class RawRecord:
    """A record of a file.

    Attributes:
        line: line number in JSON lines, else the record's number; both count from 1.
        value: what the record holds; None where `problem` is given.
        problem: why it could not be read.
        size: its size in the file in bytes or characters, for callers that hold several records.
    """

    line: int
    value: Any = None
    problem: Reason | None = None
    size: int = 0
