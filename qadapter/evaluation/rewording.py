"""Questions in other words: a benchmark's question asked differently, with the same answer.

What this project generates itself is paraphrased by templates, in words that its questions have anyway. Any other text
keeps its words: its first line gets a prefix, a small first letter, or loses its question mark.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

_TEMPLATES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), other)
    for pattern, other in (
        (r"how do i (.+) \?", r"tell me how to \1 ."),
        (r"tell me how to (.+) \.", r"how do i \1 ?"),
        (r"what should i do with the (.+) \?", r"any idea for the \1 ?"),
        (r"any idea for the (.+) \?", r"what should i do with the \1 ?"),
        (r"what is the (.+) of (.+) \?", r"tell me the \1 of \2 ."),
        (r"what is (\d+) plus (\d+) \?", r"tell me what \1 plus \2 is ."),
        (r"describe the (.+) \.", r"tell me what the \1 is ."),
    )
)
_PREFIX = "Question: "


def _prefixed(line: str) -> str:
    return line if line.lower().startswith(("question", "q:")) else _PREFIX + line


def _small(line: str) -> str:
    return line[:1].lower() + line[1:] if re.match(r"[A-Z][a-z]", line) else line


def _unasked(line: str) -> str:
    return line.rstrip()[:-1].rstrip() if line.rstrip().endswith("?") else line


_CHANGES: tuple[Callable[[str], str], ...] = (_prefixed, _small, _unasked)


def reworded(text: str) -> str:
    """A question in other words, the same ones in every run; the text itself where nothing can be changed."""
    for pattern, other in _TEMPLATES:
        if pattern.fullmatch(text.strip()):
            return pattern.sub(other, text.strip())
    if not text.strip():
        return text
    line, newline, rest = text.partition("\n")
    first = hashlib.sha256(text.encode()).digest()[0] % len(_CHANGES)
    for place in range(len(_CHANGES)):
        changed = _CHANGES[(first + place) % len(_CHANGES)](line)
        if changed not in (line, ""):
            return changed + newline + rest
    return text


def reworded_rows(
    items: Sequence[Mapping[str, Any]], asked_again: Mapping[str, Sequence[Mapping[str, Any]]]
) -> list[dict[str, Any]]:
    """A row per question that was asked in other words too, and has a score of its own.

    Args:
        items: of the benchmarks as they are: {task, doc_id, prompt, score, response, …}.
        asked_again: task → its items in other words.

    Returns:
        Rows {task, doc_id, prompt (in other words), response, score, change (of the score by the rewording), same
        (whether the answer is the same)}. Questions that could not be re-worded are left out.
    """
    before = {(row["task"], row["doc_id"]): row for row in items}
    rows = []
    for task, again in asked_again.items():
        for row in again:
            was = before.get((task, row["doc_id"]))
            if was is None or was["prompt"] == row["prompt"] or not isinstance(row["score"], int | float):
                continue
            same = " ".join(str(was["response"]).split()) == " ".join(str(row["response"]).split())
            rows.append(
                {
                    "task": task,
                    "doc_id": row["doc_id"],
                    "prompt": row["prompt"],
                    "response": row["response"],
                    "score": row["score"],
                    "change": float(row["score"]) - float(was["score"]),
                    "same": float(same),
                }
            )
    return rows
