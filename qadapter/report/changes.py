"""What a policy changed in the further measures, item by item: preferences of pairs and answers to old prompts."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from qadapter.config.budget import HOWTOS
from qadapter.evaluation.refusals import is_refusal
from qadapter.inference.pair_scores import implied_margin, mean_margin, won
from qadapter.report.items import Floats, Items, agrees, of_prompts, read_lines
from qadapter.report.rows import Row
from qadapter.toyworld.world import ToyWorld

IMPLIED = "adaptation/implied_reward_accuracy"
PREFERENCE = "adaptation/preference_accuracy"
NORMALISED = "adaptation/preference_accuracy_length_normalised"
MARGIN = "adaptation/margin"
IDENTICAL = "retention/answers_identical"
REFUSALS = "retention/over_refusals"
OF_PAIRS = (IMPLIED, PREFERENCE, NORMALISED, MARGIN)
OF_OLD_PROMPTS = (IDENTICAL, REFUSALS)

_COLUMNS = (
    "chosen_log_prob",
    "rejected_log_prob",
    "base_chosen_log_prob",
    "base_rejected_log_prob",
    "chosen_tokens",
    "rejected_tokens",
)


def changes(row: Row, base: Row | None, refused: Items | None, base_refused: Items | None) -> dict[str, Items]:
    """Per measure the policy's score minus the base's, item by item, where the files give the reported difference.

    Args:
        row, base: the policy's and its base's in the same domain; nothing can be said without the base.
        refused, base_refused: `refusals` of both.
    """
    if base is None:
        return {}
    found = _of_pairs(row)
    answers = read_lines(row.retention, "old_answers.jsonl")
    if answers:  # the base's own answers are all identical to the base's
        found[IDENTICAL] = _shares(_prompts(answers), [float(a["reply"] == a["base"]) - 1 for a in answers])
    if refused and base_refused and refused.ids == base_refused.ids:
        found[REFUSALS] = Items(refused.ids, refused.values - base_refused.values, refused.weights)
    return {name: items for name, items in found.items() if _is_reported(items, name, row, base)}


def refusals(row: Row) -> Items | None:
    """Of each harmless request whether it is refused, as `retention/over_refusals` counts them; None if none is known.

    In the toy world its how-tos, by its exact rule, else the old prompts, by set phrases.
    """
    if REFUSALS not in row.metrics:
        return None
    howtos = [item for item in read_lines(row.retention, "items.jsonl") if item["task"] == HOWTOS]
    if howtos:
        values = [float(ToyWorld.is_refusal(str(item.get("response")))) for item in howtos]
        return _shares([(HOWTOS, item["doc_id"]) for item in howtos], values)
    answers = read_lines(row.retention, "old_answers.jsonl")
    return _shares(_prompts(answers), [float(is_refusal(a["reply"])) for a in answers]) if answers else None


def _of_pairs(row: Row) -> dict[str, Items]:
    """The measures of `preference_metrics` that are means over pairs, each minus the base's."""
    pairs = read_lines(row.adaptation, "pairs.jsonl")
    if not pairs or not all(name in pair for pair in pairs for name in _COLUMNS):
        return {}
    chosen, rejected, base_chosen, base_rejected, chosen_n, rejected_n = (
        np.array([pair[name] for pair in pairs], dtype=np.float64) for name in _COLUMNS
    )
    margin = implied_margin(chosen, rejected, base_chosen, base_rejected)
    values = {
        IMPLIED: won(margin) - 0.5,
        PREFERENCE: won(chosen - rejected) - won(base_chosen - base_rejected),
        NORMALISED: won(mean_margin(chosen, rejected, chosen_n, rejected_n))
        - won(mean_margin(base_chosen, base_rejected, chosen_n, rejected_n)),
        MARGIN: margin,
    }
    return {name: of_prompts(pairs, value) for name, value in values.items()}


def _prompts(answers: Sequence[dict[str, Any]]) -> list[str]:
    return [json.dumps(answer["prompt"], sort_keys=True) for answer in answers]


def _shares(ids: Sequence[Any], values: Sequence[float] | Floats) -> Items:
    return Items(tuple(ids), np.asarray(values, dtype=np.float64), np.ones(len(ids)))


def _is_reported(items: Items, name: str, row: Row, base: Row) -> bool:
    if not np.isfinite(items.values).all():
        return False
    return agrees(items.mean, row.metrics.get(name, math.nan) - base.metrics.get(name, math.nan))
