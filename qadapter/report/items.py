"""Scores item by item, as the evaluation wrote them: what an interval is drawn from."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qadapter.errors import QAdapterError
from qadapter.evaluation.items import items_digests, owner
from qadapter.evaluation.prompts import by_prompt
from qadapter.files.artifacts import read_json, read_json_lines
from qadapter.inference.pair_scores import implied_margin, won
from qadapter.judging.verdicts import WORTH
from qadapter.report.rows import Row, kind, run_of

Floats = NDArray[np.float64]

SCORE = "adaptation/score"
RULE = "adaptation/exact_rule"  # the toy world's; where it is measured it is the score
WIN_RATE = "adaptation/win_rate"
_VERDICTS = {verdict: 2 * worth - 1 for verdict, worth in WORTH.items()}  # 1, 0, -1
_CLOSE = 1e-6


@dataclass(frozen=True)
class Items:
    """One measure of one policy, item by item.

    Attributes:
        ids: which items; two policies are compared only over the same ones.
        values: [n].
        weights: [n], what an item counts: 1, or for bits per byte its bytes.
    """

    ids: tuple[Any, ...]
    values: Floats
    weights: Floats

    @property
    def mean(self) -> float:
        """Weighted mean."""
        return float((self.values * self.weights).sum() / self.weights.sum())


def read_lines(folder: Path | None, name: str) -> list[dict[str, Any]]:
    """Rows of a JSON lines file; none where there is no such folder or file."""
    if folder is None or not (folder / name).is_file():
        return []
    return read_json_lines(folder / name)


def directions_of(rows: Sequence[Row]) -> dict[str, bool]:
    """Metric name → whether higher is better, for metrics with a known direction."""
    found: dict[str, bool] = {}
    for row in rows:
        file = row.retention / "directions.json" if row.retention else None
        if file and file.is_file():
            found |= read_json(file)
    return found


def retention_measures(rows: Sequence[Row]) -> list[str]:
    """The one measure of each retention task (`retention/<task>/<metric>`): those with a forgetting of their own."""
    names = dict.fromkeys(name for row in rows for name in row.metrics if name.count("/") == 2)
    forgotten = [name for name in names if name.startswith("forgetting/")]
    if forgotten:
        return [name.replace("forgetting/", "retention/", 1) for name in forgotten]
    return [name for name in names if name.startswith("retention/")]


def refuse_other_items(rows: Sequence[Row]) -> None:
    """Refuse to compare scores on different questions, whose difference does not measure retention.

    Raises:
        QAdapterError: a policy and the base of its domain and run were measured on different items.
    """
    digests: dict[Path, dict[str, str]] = {}  # the base's rows of several domains share a folder

    def asked(row: Row) -> dict[str, str]:
        if row.retention is None:
            return {}
        if row.retention not in digests:
            digests[row.retention] = items_digests(read_lines(row.retention, "items.jsonl"))
        return digests[row.retention]

    bases = {(row.domain, run_of(row.method)): row for row in rows if kind(row.method) == "base"}
    for row in rows:
        base = bases.get((row.domain, run_of(row.method)))
        if base is None or row is base:
            continue
        before, now = asked(base), asked(row)
        if other := sorted(task for task in before.keys() & now.keys() if before[task] != now[task]):
            raise QAdapterError(
                f"{row.domain}, {row.method}: {', '.join(other)} was measured on other items than the base's score, so "
                "the two cannot be compared. Measure both again with the same items."
            )


def retention_items(row: Row, measures: Sequence[str]) -> dict[str, Items]:
    """Per measure the item scores of a row, where they are written and give the reported number.

    A group's items are those of its subtasks: `mmlu` is made of `mmlu_anatomy` and so on. Another measured task may
    have such a name, as `mmlu_pro` or a single subject. Its items count as the group's only if that gives the group's
    reported number.
    """
    by_task: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for record in read_lines(row.retention, "items.jsonl"):
        by_task[record["task"]].append(record)
    measured = {name.split("/")[1] for name in measures}
    owners = {other: owner(other, measured) for other in by_task}
    found = {}
    for name in measures:
        _, task, metric = name.split("/")
        below = [other for other in by_task if other.startswith(f"{task}_")]
        for names in [[task]] if task in by_task else [[other for other in below if owners[other] == task], below]:
            items = _items([record for other in names for record in by_task[other]], metric)
            if items is not None and agrees(items.mean, row.metrics.get(name)):
                found[name] = items
                break
    return found


def _items(records: Sequence[Mapping[str, Any]], metric: str) -> Items | None:
    """One metric of some items; None if an item lacks it or it is no number."""
    ids, values, weights = [], [], []
    for record in records:
        score = record.get("scores", {}).get(metric)
        if isinstance(score, list) and len(score) == 2:  # lm-eval's bits per byte: log-likelihood (nats), bytes
            nats, size = score
            score, weight = -nats / math.log(2) / size, float(size)
        else:
            weight = 1.0
        if not isinstance(score, int | float) or not math.isfinite(score):
            return None
        ids.append((record["task"], record["doc_id"]))
        values.append(float(score))
        weights.append(weight)
    return Items(tuple(ids), np.array(values), np.array(weights)) if ids else None


def adaptation_gain(row: Row, base: Row | None) -> Items | None:
    """The headline score minus the base's, item by item; None where the files do not give the reported difference.

    With an exact rule an item is a held-out prompt, its difference 1, 0 or -1 by the rule's verdict against the base.
    Otherwise it is a prompt's held-out pairs (`of_prompts`): of each, 1 if the implied reward prefers the chosen reply,
    ½ for a tie, minus the base's ½.
    """
    if RULE in row.metrics:
        answers = read_lines(row.adaptation, "answers.jsonl")
        if base is None or any(a.get("judge") not in ("rule", None) or "verdict" not in a for a in answers):
            return None
        values = [_VERDICTS.get(answer["verdict"], math.nan) for answer in answers]
        ids = tuple(json.dumps(answer["prompt"], sort_keys=True) for answer in answers)
        difference = row.metrics.get(SCORE, math.nan) - base.metrics.get(SCORE, math.nan)
        items = Items(ids, np.array(values), np.ones(len(values)))
    else:
        pairs = read_lines(row.adaptation, "pairs.jsonl")
        columns = ("chosen_log_prob", "rejected_log_prob", "base_chosen_log_prob", "base_rejected_log_prob")
        margins = implied_margin(*(np.array([pair[name] for pair in pairs], dtype=np.float64) for name in columns))
        items = of_prompts(pairs, won(margins) - 0.5)
        difference = row.metrics.get(SCORE, math.nan) - 0.5
    return items if len(items.values) and agrees(items.mean, difference) else None


def of_prompts(pairs: Sequence[Mapping[str, Any]], values: Floats) -> Items:
    """Values of held-out pairs with their prompts as items: the mean over a prompt's pairs, weighted by their number.

    Args:
        pairs: rows of `pairs.jsonl`; each is an item of its own where one lacks its prompt.
        values: one for each.
    """
    prompts = by_prompt([pair.get("prompt") for pair in pairs], [pair["pair"] for pair in pairs])
    return Items(prompts.keys, prompts.means(values), prompts.pairs)


def wins(row: Row) -> Items | None:
    """Decided verdicts on held-out answers, minus the ½ of the base against itself; None where they do not add up.

    A win is ½, a tie 0, a loss -½.
    """
    answers = read_lines(row.adaptation, "answers.jsonl")
    decided = [a for a in answers if a.get("judge") != "none" and a.get("verdict") in _VERDICTS]
    if not decided:
        return None
    values = np.array([_VERDICTS[answer["verdict"]] / 2 for answer in decided])
    ids = tuple(json.dumps(answer["prompt"], sort_keys=True) for answer in decided)
    items = Items(ids, values, np.ones(len(values)))
    return items if agrees(items.mean, row.metrics.get(WIN_RATE, math.nan) - 0.5) else None


def agrees(mean: float, reported: float | None) -> bool:
    """Whether the items give the reported number: an interval must be of the number beside it."""
    return reported is not None and math.isclose(mean, reported, rel_tol=_CLOSE, abs_tol=_CLOSE)
