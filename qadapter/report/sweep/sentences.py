"""What a sweep's tables do not say by themselves: edges of the grids, whose front is best, how far the best leads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pandas as pd

from qadapter.evaluation.statistics import Interval, signed
from qadapter.methods.table import knobs
from qadapter.report.rows import listed
from qadapter.report.sweep.points import Point, best_by_trade, differences, edges


def edge_sentences(tuned: Mapping[str, Sequence[Point]]) -> str:
    """For each method whether its best trade lies on the edge of its grid, where a better one may lie beyond.

    Args:
        tuned: method → the settings of its tuning.

    Returns:
        A list, or one sentence where none does; nothing where there is no grid.
    """
    lines, found_any = [], False
    words = {name: knob.words for name, knob in knobs().items()}
    for method, own in tuned.items():
        if len(own) < 2:
            continue
        best = best_by_trade(own)
        values = best.setting.settings
        found = [f"the {end} {words.get(knob, knob)} ({values[knob]:g})" for knob, end in edges(best, own).items()]
        found_any = found_any or bool(found)
        lines.append(
            f"- The best trade of {method} has {listed(found)} that {'was' if len(found) == 1 else 'were'} tried: "
            "a better one may lie beyond."
            if found
            else f"- The best trade of {method} is on no edge of its grid."
        )
    if lines and not found_any:
        return "No method's best trade is on an edge of its grid."
    return "\n".join(lines)


def largest_front(areas: Mapping[str, float]) -> str:
    """Whose front is best as a whole, by its area; all of those that three digits cannot tell apart."""
    shown = {name: f"{area:.3f}" for name, area in areas.items()}
    largest = max(shown.values(), default="")
    return f"The largest front area, {largest}, is that of {listed([n for n in shown if shown[n] == largest])}."


def difference_table(best: Point, tuned: Mapping[str, Point], tried: int) -> list[str]:
    """How far the best setting of all is ahead of each method's best tuned one.

    Args:
        best: of everything.
        tuned: method → the best of its tuning.
        tried: the number of settings that `best` was chosen from.

    Returns:
        Heading line, table and a note on reading it; empty if there is no method to compare with.
    """
    others = {method: point for method, point in tuned.items() if point.setting.name != best.setting.name}
    if not others:
        return []
    found = {method: differences(best, point) for method, point in others.items()}
    table = [
        {"method": method, "its best tuned setting": others[method].setting.name}
        | {measure: _difference(interval) for measure, interval in of_method.items()}
        for method, of_method in found.items()
    ]
    seeds = len(best.by_seed)
    noise = (
        f"In brackets 95 %, Student, {seeds} seeds; a star: larger than the noise."
        if seeds > 1
        else "One seed: nothing is known of the noise."
    )
    return [
        f"**{best.setting.name}** minus each method's best tuned setting, paired by seed:",
        str(pd.DataFrame(table).to_markdown(index=False, disable_numparse=True)),
        f"{noise} The best of all was chosen among {tried} settings, on the seeds that it is scored on: its lead is "
        "optimistic. *trade* here: the mean of each seed's own.",
    ]


def _difference(interval: Interval) -> str:
    return signed(interval.estimate) if interval.seeds < 2 else starred(interval)


def starred(interval: Interval) -> str:
    """A difference with its interval in a table of Markdown, and a star where it is larger than its noise."""
    return interval.as_difference(r"\*" if interval.excludes_zero else "")
