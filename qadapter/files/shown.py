"""Make text safe to show: mask secrets, hidden characters and spreadsheet formulas; silence idle warnings.

All text that this project prints, logs, reports or raises passes through one of these functions. The module imports
nothing else of the project, so that `qadapter/errors.py` can use it.
"""

from __future__ import annotations

import logging
import re
import threading
import unicodedata
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, quote_plus

if TYPE_CHECKING:
    import pandas as pd

_USER = re.compile(r"(\b[a-z][a-z0-9+.-]*://)[^/\s\"']*@", re.IGNORECASE)
_QUERY = re.compile(r"(\b[a-z][a-z0-9+.-]*://[^\s\"'?#]*[?#])[^\s\"']*", re.IGNORECASE)
_KEYS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,}"
    r"|glpat-[A-Za-z0-9_-]{16,}|xox[abeprs]-[A-Za-z0-9-]{10,}|AKIA[0-9A-Z]{16}|AIza[0-9A-Za-z_-]{30,}"
    r"|eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]+)"
    r"|-----BEGIN [A-Z ]*PRIVATE KEY-----[\s\S]*"
)
_NUMBER = re.compile(r"[-+\d.,\s±\[\]%*–]*")
_SHORTEST = 4
"""Shortest value that is masked, in characters; shorter values occur in ordinary text."""

_filled: dict[str, str] = {}
_lock = threading.Lock()


def remember_secret(value: str, name: str) -> None:
    """From now on, `shown` replaces this value by `${NAME}`, also in its URL-quoted form.

    Args:
        value: the value of the environment variable.
        name: the name of the variable.
    """
    with _lock:
        for form in {value, quote(value, safe=""), quote(value), quote_plus(value)}:
            if len(form) >= _SHORTEST:
                _filled[form] = f"${{{name}}}"


def holds_key(text: str) -> bool:
    """Whether a text contains something that looks like a known kind of key or token."""
    return bool(_KEYS.search(text))


def shown(text: str) -> str:
    """Mask the secrets in a text, so that it may be printed, logged, stored or raised.

    Masked are the user, query and fragment of every URL, each value that came from the environment
    (`remember_secret`), and everything that looks like a known kind of key.
    """
    text = _QUERY.sub(r"\1…", _USER.sub(r"\1", text))
    for value, name in sorted(_filled.items(), key=lambda item: -len(item[0])):
        text = text.replace(value, name)
    return _KEYS.sub("…", text)


def visible(text: str, keep: str = "\n\t") -> str:
    r"""Escape characters that are hidden or control a terminal: controls and bidi marks become `\x1b`, `\u202e`.

    Args:
        text: text from a model, from data, or from a user.
        keep: control characters that stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(c if c in keep or not _hidden(c) else _code(c) for c in text)


def _hidden(character: str) -> bool:
    """Controls, format characters (bidi marks, zero-width ones but the joiners that scripts need), lone surrogates."""
    category = unicodedata.category(character)
    return category in {"Cc", "Cs", "Zl", "Zp"} or (category == "Cf" and character not in "\u200c\u200d\u00ad")


def _code(character: str) -> str:
    number = ord(character)
    return f"\\x{number:02x}" if number < 0x100 else f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def csv_cell(value: Any) -> Any:
    """A cell that no spreadsheet evaluates: text that starts like a formula gets a leading apostrophe."""
    if not isinstance(value, str):
        return value
    text = visible(value)
    if _NUMBER.fullmatch(text):
        return text
    return f"'{text}" if text.lstrip()[:1] in {"=", "+", "-", "@", "|", "%"} or value[:1] in {"\t", "\r"} else text


def to_csv(frame: pd.DataFrame, file: Path) -> None:
    """Write a table as CSV, headings and cells through `csv_cell`."""
    frame.map(csv_cell).rename(columns=csv_cell).to_csv(file, index=False)


def quiet_libraries() -> None:
    """Silence library warnings that neither the project nor the user can fix, in every process that trains."""
    # TRL 1.16 and PEFT 0.21 use names that transformers 5.23 deprecates.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    # Without a GPU, it warns at import (by PEFT) that a kernel of the hub is missing, and uses its own.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    # It orders checkpoints of less than a second by their numbers instead of their times, and warns of that.
    logging.getLogger("transformers.trainer_utils").addFilter(_not_of_checkpoint_times)


def _not_of_checkpoint_times(record: logging.LogRecord) -> bool:
    return not str(record.msg).startswith("mtime may not be reliable")


def guard_logs() -> None:
    """Mask secrets and hidden characters in every log record of this process, including those of libraries.

    Repeated calls have no further effect.
    """
    factory = logging.getLogRecordFactory()
    if getattr(factory, "guards", False):
        return

    def guarded(*arguments: Any, **named: Any) -> logging.LogRecord:
        record = factory(*arguments, **named)
        try:
            message = record.getMessage()
        except (TypeError, ValueError):  # a faulty call by a library, which logging itself reports
            return record
        clean = visible(shown(message))
        if clean != message:
            record.msg, record.args = clean, None
        return record

    guarded.guards = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(guarded)
