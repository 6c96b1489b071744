"""What a trained judge is worth: how often it prefers the reply of a held-out pair that people preferred."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from qadapter.evaluation.statistics import Interval, proportion_interval
from qadapter.report.items import WIN_RATE
from qadapter.report.rows import Row, listed

CHANCE = 0.5


def judge_interval(row: Row) -> Interval | None:
    """How often the judge of a row's answers agrees with people, with its interval; None where it was not tried.

    The number of pairs is the judge's own, not the policy's `n`: it may have been tried on fewer. The interval is the
    judge's where that is wider than Wilson's: it knows which pairs have a prompt in common.
    """
    names = ("judge_accuracy", "judge_accuracy_n", "judge_accuracy_low", "judge_accuracy_high")
    accuracy, n, low, high = (row.metrics.get(f"adaptation/{name}", math.nan) for name in names)
    if not (n >= 1 and 0 <= accuracy <= 1):
        return None
    found = proportion_interval(accuracy * n, int(n))
    return found.wider(replace(found, low=low, high=high)) if low <= high else found


def judge_intervals(rows: Sequence[Row]) -> dict[str, Interval]:
    """Domain → `judge_interval`, of the judge that agrees least where compared runs have several."""
    found: dict[str, Interval] = {}
    for row in rows:
        if (own := judge_interval(row)) is not None and (row.domain not in found or own.low < found[row.domain].low):
            found[row.domain] = own
    return found


def judged_by_chance(rows: Sequence[Row]) -> list[str]:
    """The domains whose judge may decide as a coin does."""
    return [domain for domain, interval in judge_intervals(rows).items() if interval.low <= CHANCE]


def without_win_rates_by_chance(rows: Sequence[Row]) -> list[Row]:
    """The rows; those of the domains whose judge may decide as a coin does are without their win rate."""
    chance = judged_by_chance(rows)
    return [
        replace(row, metrics={name: value for name, value in row.metrics.items() if name != WIN_RATE})
        if row.domain in chance
        else row
        for row in rows
    ]


def left_out_sentence(chance: Sequence[str]) -> str:
    """Why some domains have no win rate; nothing where all have.

    Args:
        chance: `judged_by_chance`.
    """
    return f"No win rate for {listed(chance)}: the judge may decide by chance." if chance else ""
