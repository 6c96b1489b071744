"""Whether a generated reply answers a question: by its right answers, or by a regular expression."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence
from typing import Any

from qadapter.preferences.scripts import main_script
from qadapter.preferences.thoughts import split

_WITHOUT_SPACES = {"Han", "Japanese", "Thai"}


def score_reply(doc: Mapping[str, Any], results: Sequence[str]) -> dict[str, float]:
    """lm-eval's `process_results` of the user's own benchmarks: 1 for a right reply, else 0."""
    reply = said(results[0])
    if doc["regex"] is not None:
        return {"acc": float(re.search(doc["regex"], reply) is not None)}
    return {"acc": float(any(contains(reply, answer) for answer in doc["answers"]))}


def said(reply: str) -> str:
    """A reply without the thought at its beginning."""
    thought_and_answer = split(reply)
    return thought_and_answer[1] if thought_and_answer else reply.strip()


def contains(reply: str, answer: str) -> bool:
    """Whether an answer occurs in a reply as whole words; case, width and white space do not count.

    `4` does not occur in `14`, `4.5` or `-4`. In scripts without spaces between words any occurrence counts.
    """
    text, wanted = _plain(reply), _plain(answer)
    if main_script(wanted) in _WITHOUT_SPACES:
        return wanted in text
    before = r"(?<!\w)" + (r"(?<![-+])(?<!\d[.,])" if wanted[:1].isdigit() else "")
    after = r"(?!\w)" + (r"(?![.,]\d)" if wanted[-1:].isdigit() else "")
    before, after = (before if re.match(r"\w", wanted) else ""), (after if re.search(r"\w$", wanted) else "")
    return re.search(before + re.escape(wanted) + after, text) is not None


def _plain(text: str) -> str:
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())
