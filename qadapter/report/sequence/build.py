"""The report of a sequence: which way has what of all preferences at the end, and what each step did to the others."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qadapter.evaluation.sequence.matrix import Passage
from qadapter.evaluation.statistics import Interval, signed
from qadapter.files.artifacts import write_json
from qadapter.report import markdown
from qadapter.report.page import data_uri, page
from qadapter.report.rows import listed
from qadapter.report.sequence.figure import KEPT, heat_maps
from qadapter.report.tables import Cell, Table, bracket, number

FIGURE = "continual.png"
LEGEND = (
    "*ACC*: mean over all preferences of the score after the last step. *BWT*, backward transfer: how the score on the "
    "earlier ones has changed since each was learnt, negative is forgotten. *learnt*: mean of the scores at the "
    "moment each preference arrived. *base forgotten*: the base's retention minus the policy's after the last step. In "
    "brackets: 95 % intervals over items and seeds, of differences paired ones; a star: the interval excludes 0. "
    "Everything is measured on the half of the items that no weight was chosen on. Training: per seed, all steps "
    "together."
)
MATRIX_LEGEND = "A row per step, a column per preference that had arrived by then; the last column is the retention."


@dataclass(frozen=True)
class Cost:
    """What a way's trainings cost, per seed and for all steps.

    Attributes:
        seconds: of training.
        tokens: read in training.
    """

    seconds: float
    tokens: float


def build_continual_report(
    passages: Mapping[str, Passage], *, title: str, budget: float, costs: Mapping[str, Cost], out: Path
) -> None:
    """Write `continual.md`, `continual.html` (complete in itself), `continual.png`, `matrix.json` and `metrics.json`.

    Args:
        passages: way → its passage.
        title: of page and figure.
        budget: how much of the base may be forgotten, for the recommendation.
        costs: way → its trainings.
        out: an empty folder.
    """
    heat_maps(passages, out / FIGURE, title)
    ways, matrices = ways_table(passages, costs), [(way, matrix_table(one)) for way, one in passages.items()]
    sentences = told(passages, budget, costs)
    sections = [
        f"# {title}",
        "\n".join(f"- {sentence}" for sentence in sentences),
        "## The ways",
        markdown.table(ways),
        LEGEND,
        "## After each step",
        f"![accuracy on each preference after each step]({FIGURE})",
        MATRIX_LEGEND,
        *(part for way, table in matrices for part in (f"### {way}", markdown.table(table))),
    ]
    (out / "continual.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    content: dict[str, Any] = {
        "title": title,
        "sentences": sentences,
        "ways": ways,
        "legend": LEGEND.replace("*", ""),
        "matrix_legend": MATRIX_LEGEND,
        "matrices": matrices,
        "figure": data_uri(out / FIGURE),
    }
    (out / "continual.html").write_text(page(content, "sequence/continual.html.j2"), encoding="utf-8")
    write_json(out / "matrix.json", _columns(passages))
    write_json(out / "metrics.json", continual_metrics(passages))


def ways_table(passages: Mapping[str, Passage], costs: Mapping[str, Cost]) -> Table:
    """A row per way: ACC, BWT, what was learnt on arrival, the base's forgetting, the cost."""
    accuracy = {way: one.accuracy for way, one in passages.items()}
    best = max(round(found.estimate, 3) for found in accuracy.values())
    rows = []
    for way, one in passages.items():
        found = accuracy[way]
        rows.append(
            (
                way,
                (
                    Cell(number(found.estimate), bracket(found), best=round(found.estimate, 3) == best),
                    _difference(one.backward_transfer),
                    Cell(number(one.learnt)),
                    _difference(one.forgetting),
                    Cell(number(costs[way].seconds, 0)),
                    Cell(number(costs[way].tokens, 0)),
                ),
            )
        )
    columns = ("ACC", "BWT", "learnt", "base forgotten", "training, s", "training, tokens")
    return Table("way", (("After the last step", 4), ("Cost", 2)), columns, tuple(rows))


def _difference(found: Interval) -> Cell:
    return Cell(signed(found.estimate), bracket(found), sure=found.excludes_zero)


def matrix_table(passage: Passage) -> Table:
    """The accuracy matrix of one way, with the retention as its last column."""
    rows = []
    for step, (name, scores) in enumerate(zip(passage.domains, passage.matrix, strict=True)):
        cells = [Cell("" if math.isnan(score) else number(score)) for score in scores]
        rows.append((f"{step + 1}. {name}", (*cells, Cell(number(float(passage.retention[step]))))))
    groups = (("Score on", len(passage.domains)), ("Base", 1))
    return Table("after", groups, (*passage.domains, KEPT), tuple(rows))


def recommended(passages: Mapping[str, Passage], budget: float, costs: Mapping[str, Cost]) -> str:
    """The way to take by default.

    Of the ways that forget no more of the base than the budget, or of all where none does, the one with the largest
    ACC; among those that are not surely behind it, the one that trains on the fewest tokens.
    """
    within = [way for way, one in passages.items() if one.forgetting.estimate <= budget] or list(passages)
    first = max(within, key=lambda way: passages[way].accuracy.estimate)
    level = [way for way in within if way == first or passages[first].difference(passages[way]).low <= 0]
    return min(level, key=lambda way: (costs[way].tokens, -passages[way].accuracy.estimate))


def told(passages: Mapping[str, Passage], budget: float, costs: Mapping[str, Cost]) -> list[str]:
    """The report in sentences, the recommendation first."""
    best = recommended(passages, budget, costs)
    one = passages[best]
    within = [way for way, other in passages.items() if other.forgetting.estimate <= budget]
    sentences = [
        f"By default: {best}. After {len(one.domains)} preferences it has ACC {one.accuracy.estimate:.3f} "
        f"{bracket(one.accuracy)}, BWT {signed(one.backward_transfer.estimate)}, and has forgotten "
        f"{number(one.forgetting.estimate)} {bracket(one.forgetting)} of the base.",
        f"Rule: of the ways that forget at most {budget:g} of the base ({listed(within) or 'none does, so of all'}) "
        "the one with the largest ACC; of those not surely behind it, the one that trains on the fewest tokens.",
    ]
    for way, other in passages.items():
        if way == best:
            continue
        found = one.difference(other)
        sure = "surely" if found.excludes_zero else "not surely"
        moved, lost = signed(other.backward_transfer.estimate), number(other.forgetting.estimate)
        sentences.append(
            f"{best} − {way}: ACC {signed(found.estimate)} {bracket(found)}, {sure} different; {way} has BWT "
            f"{moved} and has forgotten {lost} of the base."
        )
    return sentences


def continual_metrics(passages: Mapping[str, Passage]) -> dict[str, float]:
    """`continual/<way>/accuracy`, `…/backward_transfer`, `…/forgetting` with intervals, and `…/learnt`."""
    found: dict[str, float] = {}
    for way, one in passages.items():
        for name, interval in (
            ("accuracy", one.accuracy),
            ("backward_transfer", one.backward_transfer),
            ("forgetting", one.forgetting),
        ):
            key = f"continual/{way}/{name}"
            found |= {key: interval.estimate, f"{key}/low": interval.low, f"{key}/high": interval.high}
        found[f"continual/{way}/learnt"] = one.learnt
    return found


def _columns(passages: Mapping[str, Passage]) -> dict[str, list[Any]]:
    """The matrices as a table in the long form, for MLflow: way, after, domain, score (`kept`: the retention)."""
    columns: dict[str, list[Any]] = {"way": [], "after": [], "domain": [], "score": []}
    for way, one in passages.items():
        for step, name in enumerate(one.domains):
            scores = {other: float(one.matrix[step, place]) for place, other in enumerate(one.domains[: step + 1])}
            for other, score in {**scores, KEPT: float(one.retention[step])}.items():
                for column, value in zip(columns, (way, name, other, score), strict=True):
                    columns[column].append(value)
    return columns
