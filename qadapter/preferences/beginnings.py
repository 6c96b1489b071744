"""Where two sequences part, and where the prompt ends in two texts that begin with it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

# Scripts without spaces between words: Thai, Lao, Burmese, Khmer, kana, Bopomofo, Han with extensions, Yi, full-width.
_NO_SPACES = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u3007\u3040-\u312f\u31f0-\u9fff\ua000-\ua4cf"
_NO_SPACES += "\uf900-\ufaff\uff00-\uffef\U00020000-\U000323af"
_UNSPACED = re.compile(f"[{_NO_SPACES}\u3000-\u3003\u3008-\u301f]")
_COMBINING = re.compile(
    "[\u0300-\u036f\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece\u102b-\u103e"
    "\u17b4-\u17d3\u3099\u309a\u200d\ufe00-\ufe0f\U0001f3fb-\U0001f3ff]"
)
_LEADING_VOWEL = re.compile(
    "[\u0e40-\u0e44\u0ec0-\u0ec4\u200d]"
)  # Thai and Lao: written before the consonant they follow
# A question, an exclamation, a full stop that ends a sentence, or a line.
_SENTENCE_END = re.compile(r"[?!\u3002\uff01\uff1f\u2026\u17d4\u104b]+[\"'\u201d\u2019\u300d\u300f)\]]*|\.(?=\s)|\n")
_BORDER = re.compile(r"[?!:\u3002\uff01\uff1f\uff1a\u2026\u17d4\u104b.\"'\u201d\u2019\u300d\u300f)\]]\Z")


def shared_beginning(first: Sequence[Any], second: Sequence[Any]) -> int:
    """How many elements two sequences have in common from their beginning."""
    limit = min(len(first), len(second))
    if first[:limit] == second[:limit]:
        return limit
    low, high = 0, limit  # slices compare at C's speed: halve instead of going through the elements
    while high - low > 1:
        middle = (low + high) // 2
        if first[low:middle] == second[low:middle]:
            low = middle
        else:
            high = middle
    return low


def prompt_end(first: str, second: str) -> tuple[int, bool]:
    """Where the prompt ends that two different texts begin with; the one rule for files, Python and the command.

    The end is where the texts part, cut back to the end of a word, so that no word is torn ("bl|ue", "bl|ack") and each
    reply has something left. A question or exclamation mark ends a word too, and in scripts without spaces every
    character does.

    Returns:
        The number of characters of the prompt (0: the texts share none), and whether that is certain. It is not where
        the shared text holds a whole sentence and the beginning of another: that may be the prompt's or the replies'.
    """
    end = shared_beginning(first, second)
    while end and not _may_end(first, second, end):
        end -= 1
    common = first[:end].rstrip()
    if not common:
        return 0, True
    ends = [match.end() for match in _SENTENCE_END.finditer(common + " ")]
    certain = (
        not ends or not common[ends[-1] :].strip() or bool(_BORDER.search(common)) or "\n" in first[len(common) : end]
    )
    return end, certain


def _may_end(first: str, second: str, end: int) -> bool:
    if not (first[end:].strip() and second[end:].strip()):
        return False
    before, after = first[end - 1], (first[end], second[end])
    if before.isspace() or all(character.isspace() for character in after):
        return True
    if any(_COMBINING.match(character) for character in after) or _LEADING_VOWEL.match(before):
        return False
    if before in "?!":
        return not any(character in "?!\"')]\u201d\u2019" for character in after)
    return bool(_UNSPACED.match(before)) or all(_UNSPACED.match(character) for character in after)
