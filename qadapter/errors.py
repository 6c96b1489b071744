"""The exception whose message is written for the user, and the suggestion that ends many of these messages."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from qadapter.files.shown import shown, visible


class QAdapterError(Exception):
    """Something the user gave cannot work.

    The message is one to three sentences: what was given, what was expected, what to do. Command lines print it
    without a traceback and exit with a code that is not 0. Secrets and hidden characters are masked in it.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*(visible(shown(a)) if isinstance(a, str) else a for a in arguments))


def nearest(given: str, known: Iterable[str], most: int = 1) -> list[str]:
    """The known names that are most like a given one, best first; none where no name is like it."""
    return difflib.get_close_matches(given, list(dict.fromkeys(known)), n=most, cutoff=0.5)


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """Suggest a known name: the last part of a message that refuses an unknown one.

    Args:
        given: what the user wrote.
        known: every name that would have been right.

    Returns:
        `, did you mean 'smoke'?` where a known name is near, else `; known: mini, smoke`; empty where none is known.
    """
    names = list(dict.fromkeys(known))
    if near := nearest(given, names):
        return f", did you mean {near[0]!r}?"
    return f"; known: {', '.join(names)}" if names else ""


def first_reason(error: Exception) -> str:
    """What an error of a library says first, in one line: with the line behind one that ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return (" ".join(lines[:2]) if lines[0].endswith(":") else lines[0])[:300]
