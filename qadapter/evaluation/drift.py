"""How a policy's way of answering has moved from its base's, beyond accuracy.

Base and policy answer the same benign prompts of the old distribution, which an evaluation generates anyway. Each reply
is described by a few traits; the drift of a trait is the difference of its means, policy minus base, with a bootstrap
interval paired by prompt. Differences are absolute: a ratio to a base that never uses tables would be no number.

Length, hedging, lists and tables are counted as CapTrack does (arXiv 2603.06610), hedges per 100 words, since nearly
every long reply has one. Refusals are `refusals.is_refusal`'s. Entropy, the first token and missing ends are ours.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np

from qadapter.evaluation.refusals import is_refusal
from qadapter.evaluation.statistics import Interval, paired_difference

DRIFT = "drift.jsonl"
"""File beside `old_answers.jsonl`: the traits of each reply."""
REWORDED = "reworded.jsonl"
"""File beside `items.jsonl`: the questions that were asked in other words (`rewording.reworded_rows`)."""
MOVED = "drift/moved"
"""Metric: how many traits moved beyond noise."""

Trait = Literal[
    "words", "hedges", "lists", "tables", "refusals", "evasions", "unended", "first_token", "entropy",
    "rewording", "agreement",
]  # fmt: skip
TRAITS: dict[Trait, str] = {
    "words": "words per reply",
    "hedges": "hedges per 100 words",
    "lists": "replies with a list",
    "tables": "replies with a table",
    "refusals": "refusals of harmless prompts",
    "evasions": "evasions of harmless prompts",
    "unended": "replies without an end",
    "first_token": "replies that begin with another token",
    "entropy": "entropy on the base's own replies, nats per token",
    "rewording": "change of the score by re-wording a question",
    "agreement": "same answer to a re-worded question",
}
_OF_REWORDED: dict[Trait, str] = {"rewording": "change", "agreement": "same"}
"""Trait → its column in `reworded.jsonl`."""

_WORD = re.compile(r"\b\w+\b")
_HEDGE = re.compile(
    r"\b(?:might|may|could|would|should|possibly|perhaps|probably|likely|apparently|seems?|appears?|suggests?|generally"
    r"|usually|often|sometimes|typically|however|although|i think|i believe|in my opinion|it depends|as an ai"
    r"|not sure|uncertain|to some extent)\b",
    re.IGNORECASE,
)
_LIST = re.compile(r"^[ \t]*(?:[-*•]|\d{1,3}[.)]|[a-z][.)])[ \t]+\S", re.MULTILINE)
_TABLE = re.compile(r"^[ \t]*\|.*\|[ \t]*$", re.MULTILINE)
_DEFLECTION = re.compile(
    r"\b(?:could you (?:please )?(?:clarify|provide|specify|tell)|can you (?:please )?(?:clarify|provide|specify)"
    r"|please (?:clarify|provide|specify|give me more)|what do you mean|what exactly"
    r"|i'm not sure what|i am not sure what|need more (?:information|context|details)"
    r"|let's talk about something else|let us talk about something else)\b",
    re.IGNORECASE,
)
_SHORT = 50  # words: a longer reply that also asks something back has answered


def traits(reply: str) -> dict[str, float]:
    """What can be seen in one reply's text."""
    words = len(_WORD.findall(reply))
    plain = reply.replace("\u2019", "'")
    refused = is_refusal(reply)
    evades = not refused and words < _SHORT and (reply.count("?") >= 2 or bool(_DEFLECTION.search(plain)))
    return {
        "words": float(words),
        "hedges": 100 * len(_HEDGE.findall(plain)) / words if words else 0.0,
        "lists": float(bool(_LIST.search(reply))),
        "tables": float(len(_TABLE.findall(reply)) >= 2),
        "refusals": float(refused),
        "evasions": float(evades),
    }


def trait_rows(
    replies: Sequence[str], ended: Sequence[bool], first: Sequence[int | None], entropy: Sequence[float | None]
) -> list[dict[str, Any]]:
    """The traits of a policy's replies, one row per prompt, JSON values.

    Args:
        replies: to the prompts.
        ended: whether each ended by itself.
        first: its first token; None for an empty reply.
        entropy: of the policy's next token on the base's reply to this prompt, mean over its tokens; None where that
            was not measured.
    """
    return [
        {**traits(reply), "unended": float(not end), "first_token": token, "entropy": value}
        for reply, end, token, value in zip(replies, ended, first, entropy, strict=True)
    ]


Rows = Sequence[Mapping[str, Any]]


def drifts(rows: Rows, base: Rows, reworded: Rows = (), base_reworded: Rows = ()) -> dict[Trait, Interval]:
    """Trait → policy minus base, over the prompts for which both were measured.

    Args:
        rows, base: of `trait_rows`, for the same prompts.
        reworded, base_reworded: of `rewording.reworded_rows`, for the same questions.
    """
    found = {}
    for trait, column in _OF_REWORDED.items():
        pairs = [(row[column], before[column]) for row, before in zip(reworded, base_reworded, strict=True)]
        if pairs:
            found[trait] = paired_difference(*np.array(pairs, dtype=np.float64).T)
    for trait in (trait for trait in TRAITS if trait not in _OF_REWORDED):
        both = [(row[trait], before[trait]) for row, before in zip(rows, base, strict=True)]
        if trait == "first_token":
            both = [(float(now != before), 0.0) for now, before in both]
        values = np.array([pair for pair in both if None not in pair], dtype=np.float64).reshape(-1, 2)
        if len(values):
            found[trait] = paired_difference(values[:, 0], values[:, 1])
    return {trait: found[trait] for trait in TRAITS if trait in found}


def drift_metrics(rows: Rows, base: Rows, reworded: Rows = (), base_reworded: Rows = ()) -> dict[str, float]:
    """`drift/<trait>` with the ends of its interval (`…/low`, `…/high`), and `drift/moved`; nothing without a row.

    Args:
        rows, base, reworded, base_reworded: as in `drifts`.
    """
    found = drifts(rows, base, reworded, base_reworded)
    metrics = {
        name: value + 0.0  # never -0.0
        for trait, interval in found.items()
        for name, value in (
            (f"drift/{trait}", interval.estimate),
            (f"drift/{trait}/low", interval.low),
            (f"drift/{trait}/high", interval.high),
        )
    }
    return metrics | ({MOVED: float(sum(interval.excludes_zero for interval in found.values()))} if found else {})
