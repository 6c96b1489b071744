"""A curve on one part of its items, as differences to the base, and means over domains with their intervals."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from qadapter.errors import QAdapterError
from qadapter.evaluation.curve.points import Curve, Point
from qadapter.evaluation.prompts import Prompts, by_prompt, effective_number
from qadapter.evaluation.statistics import Interval, mean_of_tasks_interval, proportion_interval, with_seeds
from qadapter.policy.dial import DialKind

SPLIT = "dial-1"
"""Name of the split of held-out items into the part that the dial is chosen on and the part that is reported."""
DRAWS = 2000
"""Bootstrap draws of an interval."""
FEWEST = 4
"""Items that each part needs of what is compared."""
Mask = NDArray[np.bool_]


def selects(item: str) -> bool:
    """Whether an item belongs to the selection part: a coin thrown by its content, the same in every run.

    Args:
        item: digest of its content; of a held-out pair, the name of its prompt (`qadapter.evaluation.prompts`).
    """
    return hashlib.sha256(f"{SPLIT}\n{item}".encode()).digest()[0] % 2 == 0


@dataclass(frozen=True)
class Part:
    """A curve on one part of the items, as differences to its base (point 0).

    Attributes:
        kind: of the dial.
        values: [P], of the dial.
        gained: [S, P, n], adaptation minus the base's, for S adapters that differ in their seed: of each of n prompts
            the mean over its pairs.
        lost: task → [S, P, n], the base's score minus the policy's (reversed where lower is better).
        weights: task → [n].
        averaged: names of the tasks that the mean forgetting averages.
        refused: [P], share of refused harmless requests; NaN where it is not measured.
        before: the base's own adaptation.
        pairs: [n], how many held-out pairs (in the toy world: one answer) each item of `gained` is the mean of.
    """

    kind: DialKind
    values: tuple[float, ...]
    gained: NDArray[np.float64]
    lost: Mapping[str, NDArray[np.float64]]
    weights: Mapping[str, NDArray[np.float64]]
    averaged: tuple[str, ...]
    refused: NDArray[np.float64]
    before: float
    pairs: NDArray[np.float64]

    def over(self, places: Sequence[int]) -> Part:
        """The same over some of its adapters; over the mean of all where none is named."""

        def chosen(table: NDArray[np.float64]) -> NDArray[np.float64]:
            return table[list(places)] if places else table.mean(axis=0, keepdims=True)

        lost = {name: chosen(table) for name, table in self.lost.items()}
        return replace(self, gained=chosen(self.gained), lost=lost)

    def adaptation(self, place: int) -> float:
        """Adaptation at a point, mean over seeds and pairs."""
        return self.before + float(np.average(self.gained[:, place].mean(axis=0), weights=self.pairs))

    def forgetting(self, place: int, task: str | None = None) -> float:
        """Forgetting at a point: of a task, or the mean over tasks."""
        names = [task] if task else self.averaged
        found = [np.average(self.lost[name][:, place], axis=1, weights=self.weights[name]).mean() for name in names]
        return float(np.mean(found)) if found else math.nan


def mean_adaptation(parts: Sequence[Part], places: Sequence[int]) -> Interval:
    """95 % interval of the adaptation, mean over domains, each at its own point.

    Args:
        parts: of each domain, with the same seeds.
        places: of each domain's point.
    """
    return _moved(mean_gain(parts, places), float(np.mean([part.before for part in parts])))


def mean_gain(parts: Sequence[Part], places: Sequence[int]) -> Interval:
    """95 % interval of the adaptation minus the base's; arguments as in `mean_adaptation`."""
    tables = [part.gained[:, place] for part, place in zip(parts, places, strict=True)]
    return wide_enough(tables, [part.pairs for part in parts])


def mean_forgetting(parts: Sequence[Part], places: Sequence[int], task: str | None = None) -> Interval:
    """95 % interval of the forgetting, mean over domains; as wide at least as its number of items can tell.

    Domains share their retention items: an item is drawn for all of them at once. The least width is put around the
    estimate; where all tasks are shares it is cut at ±1, beyond which no difference of shares lies.

    Args:
        parts, places: as in `mean_adaptation`.
        task: of which; the mean over tasks without it.
    """
    names = [task] if task else list(parts[0].averaged)
    tables = [
        np.mean([part.lost[name][:, place] for part, place in zip(parts, places, strict=True)], axis=0)
        for name in names
    ]
    return wide_enough(tables, [parts[0].weights[name] for name in names])


def mean_difference(
    ours: Sequence[Part], our_places: Sequence[int], theirs: Sequence[Part], their_places: Sequence[int]
) -> Interval:
    """95 % interval of how much more one method learnt than another, mean over domains, paired by item and seed.

    Args:
        ours, theirs: of each domain, on the same items and with the same seeds.
        our_places, their_places: of each domain's point.
    """
    sides = [
        [part.gained[:, place] for part, place in zip(parts, places, strict=True)]
        for parts, places in ((ours, our_places), (theirs, their_places))
    ]
    tables = [a - b for a, b in zip(*sides, strict=True)]
    return wide_enough(tables, [part.pairs for part in ours])


def wide_enough(tables: Sequence[NDArray[np.float64]], weights: Sequence[NDArray[np.float64]]) -> Interval:
    """The interval of a mean over tables of shares or differences [S, n_k], at least as wide as items and seeds tell.

    Where all are shares or differences of shares it is cut at ±1, beyond which none lies.
    """
    found = with_seeds(mean_of_tasks_interval(tables, weights=weights, resamples=DRAWS), tables, weights)
    reach = 1.0 if all(np.abs(table).max() <= 1.0 for table in tables) else math.inf
    return found.at_least(least_half(weights)).within(-reach, reach)


def least_half(weights: Sequence[NDArray[np.float64]]) -> float:
    """Half the width that a mean over tables of items with weights [n_k] has at least.

    A bootstrap of items that all agree has no width; Wilson's interval for none of n has.
    """
    return math.sqrt(sum(_rarest(effective_number(weight)) ** 2 for weight in weights)) / len(weights)


def _rarest(items: float) -> float:
    return proportion_interval(0.0, max(1, round(items))).high


def _moved(found: Interval, by: float) -> Interval:
    """A share's interval around where it starts from; a share stays in [0, 1]."""
    return replace(found, estimate=found.estimate + by, low=found.low + by, high=found.high + by).within(0.0, 1.0)


def split_curves(curves: Sequence[Curve]) -> tuple[Part, Part]:
    """The selection part and the reported part of curves that were measured on the same items at the same values.

    Args:
        curves: of one method in one domain, one for each seed; values that not all have are left out.

    Raises:
        QAdapterError: they were measured on different items or along different dials, a part has too few items, or no
            task has a score of which more is better, so that there is no mean that could fall.
    """
    if len({curve.points[0].learnt.ids for curve in curves}) != 1:
        raise QAdapterError("The curves were measured on different held-out items, so that they cannot be averaged.")
    if len({curve.kind for curve in curves}) != 1:
        raise QAdapterError("The curves are of different kinds of dial, so that they cannot be averaged.")
    common = sorted(set.intersection(*({point.value for point in curve.points} for curve in curves)))
    rows = [[next(p for p in curve.points if p.value == value) for value in common] for curve in curves]
    first = rows[0][0]
    learnt_ids = first.learnt.ids
    for one in rows:
        if one[0].kept.keys() != first.kept.keys() or any(
            one[0].kept[name].ids != task.ids for name, task in first.kept.items()
        ):
            raise QAdapterError("The curves were measured on different retention items, so they cannot be averaged.")
    prompts = by_prompt(learnt_ids, range(len(first.learnt.values)))
    chosen = np.array([selects(str(prompt)) for prompt in prompts.keys])
    kept = {name: np.array([selects(item) for item in task.ids]) for name, task in first.kept.items()}
    parts = []
    for side in (True, False):
        masks = {name: mask == side for name, mask in kept.items()}
        parts.append(_part(curves[0].kind, common, rows, prompts, chosen == side, masks))
    return parts[0], parts[1]


def _part(
    kind: DialKind,
    values: Sequence[float],
    rows: Sequence[Sequence[Point]],
    prompts: Prompts,
    chosen: Mask,
    masks: Mapping[str, Mask],
) -> Part:
    fewest = min([int(chosen.sum()), *(int(mask.sum()) for mask in masks.values())])
    if fewest < FEWEST:
        raise QAdapterError(
            f"A half of the held-out items has only {fewest}, too few to choose a dial on and report another half; "
            "hold out more prompts, or give benchmarks with more items."
        )
    first = rows[0][0]
    pairs, learnt = prompts.pairs[chosen], prompts.means([[point.learnt.values for point in one] for one in rows])
    of_base = learnt[0, 0, chosen]
    gained = learnt[:, :, chosen] - of_base
    lost, weights = {}, {}
    for name, task in first.kept.items():
        mask, sign = masks[name], 1.0 if task.higher else -1.0
        start = np.array(task.values)[mask]
        lost[name] = sign * np.array(
            [[start - np.array(point.kept[name].values)[mask] for point in one] for one in rows]
        )
        weights[name] = np.ones(int(mask.sum())) if task.weights is None else np.array(task.weights)[mask]
    refused = np.array(
        [
            np.mean([one[place].refused.mean for one in rows])  # type: ignore[union-attr]
            if all(one[place].refused is not None for one in rows)
            else math.nan
            for place in range(len(values))
        ]
    )
    averaged = tuple(name for name, task in first.kept.items() if task.higher)
    if not averaged:
        raise QAdapterError(
            f"None of the benchmarks ({', '.join(first.kept) or 'none given'}) has a score of which more is better, so "
            "no mean can fall below the base's; add a benchmark that is scored by accuracy."
        )
    before = float(np.average(of_base, weights=pairs))
    return Part(kind, tuple(values), gained, lost, weights, averaged, refused, before, pairs)
