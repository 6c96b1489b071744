"""Which policies of a comparison do not answer in language, and whether the answers of the others were judged."""

from __future__ import annotations

from collections.abc import Sequence

from qadapter.evaluation.speech import SPEAKS, faults_of
from qadapter.report.items import RULE, WIN_RATE
from qadapter.report.rows import Row, kind, listed, methods_of, ordered


def speaks(row: Row) -> bool:
    """Whether a policy answers in language; true where that was not measured."""
    return row.metrics.get(SPEAKS, 1.0) > 0


def silent_methods(rows: Sequence[Row]) -> list[str]:
    """The methods of which at least one policy does not answer in language: they have no place in a ranking."""
    return [m for m in methods_of(rows) if any(row.method == m and not speaks(row) for row in rows)]


def speech_sentences(rows: Sequence[Row]) -> list[str]:
    """Which methods do not answer in language, with the reason and an example."""
    return [_silent(rows, method) for method in silent_methods(rows)]


def judged_sentences(rows: Sequence[Row], judged_by_chance: Sequence[str] = ()) -> list[str]:
    """That the answers were not judged, where no judge and no exact rule compared any; nothing where one did.

    Args:
        rows: one per policy.
        judged_by_chance: domains whose answers a judge compared in vain, of which other sentences tell.
    """
    trained = [row for row in rows if kind(row.method) != "base"]
    if not trained or judged_by_chance or any(WIN_RATE in row.metrics or RULE in row.metrics for row in trained):
        return []
    if any(SPEAKS in row.metrics for row in trained):
        return [
            "Answers not judged: no judge compared the generated answers with the base's, so what was learnt is how "
            "the policies score given replies, not how they answer."
        ]
    return ["Answers not judged: none are recorded, so it is not known whether the policies answer in language."]


def _silent(rows: Sequence[Row], method: str) -> str:
    own = [row for row in rows if row.method == method]
    broken = [row for row in own if not speaks(row)]
    domains = ordered(row.domain for row in broken)
    every = len(broken) == len(own)
    where = "" if every and len(own) == 1 else " in all domains" if every else f" in {listed(domains)}"
    why = faults_of(broken[0].adaptation) or "most of its replies are broken"
    return (
        f"{method} does not speak{where}: {why}. It has no place on the front, in the rankings or in the comparisons "
        "below."
    )
