"""What the gate compares: the results of one policy's evaluation, item by item."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qadapter.evaluation.curve.parts import selects
from qadapter.evaluation.curve.points import content_digest
from qadapter.evaluation.items import known_by
from qadapter.evaluation.prompts import by_prompt
from qadapter.evaluation.speech import faults_of
from qadapter.files.artifacts import Manifest, read_json, read_json_lines
from qadapter.inference.pair_scores import implied_margin, mean_margin, won

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class TaskItems:
    """A policy's items of one retention task, or the prompts of its held-out pairs.

    Attributes:
        items: [n] identities: position, prompt and right answer. Items of different benchmarks therefore differ.
        values: [n] scores.
        weights: [n], or None for a plain mean.
        higher_is_better: the score's direction.
    """

    items: tuple[Any, ...]
    values: Floats
    weights: Floats | None
    higher_is_better: bool

    @property
    def mean(self) -> float:
        """Weighted mean of the scores."""
        return float(np.average(self.values, weights=self.weights))


_NUMBERS_OF_A_PAIR = (
    *("chosen_log_prob", "rejected_log_prob", "base_chosen_log_prob", "base_rejected_log_prob"),
    *("chosen_tokens", "rejected_tokens"),
)


@dataclass(frozen=True)
class Measured:
    """The evaluation's results for one policy.

    Attributes:
        heldout: digest of the held-out pairs.
        pairs: [n] positions of the scored pairs in the held-out file.
        won: metric → [n], 1 where the chosen reply wins, one half for a tie, else 0.
        prompts: [n], the prompt of each pair; empty where the evaluation did not write it down.
        tasks: retention task → its items.
        metrics: every measured number by its full name.
        faults: what is wrong with the generated replies, with an example; empty where nothing is.
        changed: how many of the generated replies differ from the base's, and how many there are.
    """

    heldout: str
    pairs: tuple[int, ...]
    won: dict[str, Floats]
    tasks: dict[str, TaskItems]
    metrics: dict[str, float]
    faults: str = ""
    changed: tuple[int, int] = (0, 0)
    prompts: tuple[str, ...] = ()

    @classmethod
    def read(cls, adaptation: Path, retention: Path) -> Measured:
        """Read the folders that `measure_adaptation` and `measure_retention` wrote."""
        rows = read_json_lines(adaptation / "pairs.jsonl")
        column = {name: np.array([row[name] for row in rows], dtype=np.float64) for name in _NUMBERS_OF_A_PAIR}
        chosen, rejected = column["chosen_log_prob"], column["rejected_log_prob"]
        per_token = mean_margin(chosen, rejected, column["chosen_tokens"], column["rejected_tokens"])
        margins = {
            "implied_reward_accuracy": implied_margin(
                chosen, rejected, column["base_chosen_log_prob"], column["base_rejected_log_prob"]
            ),
            "preference_accuracy": chosen - rejected,
            "preference_accuracy_length_normalised": per_token,
        }
        directions = read_json(retention / "directions.json")
        answers = adaptation / "answers.jsonl"
        replies = read_json_lines(answers) if answers.is_file() else []
        by_task: dict[str, list[dict[str, Any]]] = {}
        for item in read_json_lines(retention / "items.jsonl"):
            by_task.setdefault(item["task"], []).append(item)
        return cls(
            heldout=Manifest.read(adaptation).inputs["data"],
            pairs=tuple(int(row["pair"]) for row in rows),
            won={name: won(margin) for name, margin in margins.items()},
            tasks={task: _task_items(task, items, directions) for task, items in by_task.items()},
            metrics={**read_json(adaptation / "metrics.json"), **read_json(retention / "metrics.json")},
            faults=faults_of(adaptation),
            changed=(sum(row.get("reply") != row.get("base") for row in replies), len(replies)),
            prompts=tuple(row["prompt"] for row in rows) if all(row.get("prompt") for row in rows) else (),
        )

    def reported(self, prompts: Sequence[str]) -> Measured:
        """Only the items that a dial was not chosen on (`qadapter.evaluation.curve.parts`).

        Args:
            prompts: name of the prompt of each held-out pair, by its position in the held-out file, as in the curve
                that the dial was chosen on (`qadapter.evaluation.prompts.prompt_names`).
        """
        pairs = np.array([not selects(prompts[pair]) for pair in self.pairs], dtype=bool)
        tasks = {}
        for name, task in self.tasks.items():
            kept = np.array([not selects(content_digest(name, *item)) for item in task.items], dtype=bool)
            tasks[name] = TaskItems(
                tuple(item for item, keep in zip(task.items, kept, strict=True) if keep),
                task.values[kept],
                None if task.weights is None else task.weights[kept],
                task.higher_is_better,
            )
        return replace(
            self,
            pairs=tuple(pair for pair, keep in zip(self.pairs, pairs, strict=True) if keep),
            prompts=tuple(prompts[pair] for pair, keep in zip(self.pairs, pairs, strict=True) if keep),
            won={metric: values[pairs] for metric, values in self.won.items()},
            tasks=tasks,
        )

    def by_prompt(self, metric: str, beside: Measured | None = None) -> TaskItems:
        """One accuracy on held-out pairs with their prompts as items: a prompt's mean, weighted by its pairs.

        Args:
            metric: of `won`.
            beside: another policy; where both scored the same pairs, its prompts stand for those that were not written
                down here. Without prompts each pair is an item of its own.
        """
        known = self.prompts or (beside.prompts if beside and self.on_the_pairs_of(beside) else ())
        prompts = by_prompt(known, self.pairs)
        values = self.won[metric] if self.pairs else np.zeros(0)
        return TaskItems(prompts.keys, prompts.means(values), prompts.pairs, True)

    def on_the_pairs_of(self, other: Measured) -> bool:
        """Whether both scored the same pairs. Positions alone are not enough: any set of this size has the same."""
        return (self.heldout, self.pairs) == (other.heldout, other.pairs)


def _task_items(task: str, items: Sequence[dict[str, Any]], directions: dict[str, bool]) -> TaskItems:
    metric = known_by(items[0]["scores"])
    scores = [item["scores"][metric] for item in items]
    places = tuple((item["doc_id"], item.get("prompt"), item.get("target")) for item in items)
    higher = directions.get(f"retention/{task}/{metric}", True)
    if isinstance(scores[0], list):  # lm-eval's (log-likelihood, bytes): bits per byte, weighted by bytes
        likelihood, size = np.array(scores, dtype=np.float64).T
        return TaskItems(places, -likelihood / size / math.log(2), size, higher)
    return TaskItems(places, np.array(scores, dtype=np.float64), None, higher)
