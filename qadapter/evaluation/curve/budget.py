"""Choose a point of a curve under a forgetting budget, and report it on items that it was not chosen on."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qadapter.config.budget import Budget
from qadapter.errors import QAdapterError
from qadapter.evaluation.curve.points import Curve, Point
from qadapter.evaluation.statistics import Interval, mean_of_tasks_interval, proportion_interval
from qadapter.policy.dial import Dial, DialKind

SPLIT = "dial-1"
"""Name of the split of held-out items into the part that the dial is chosen on and the part that is reported."""
DRAWS = 2000
"""Bootstrap draws of an interval."""
LARGEST_BUDGET = 0.05
"""Of forgetting, for the area under the front."""
FEWEST = 4
"""Items that each part needs of what is compared."""
Mask = NDArray[np.bool_]


def selects(item: str) -> bool:
    """Whether an item belongs to the selection part: a coin thrown by its content, the same in every run.

    Args:
        item: digest of its content.
    """
    return hashlib.sha256(f"{SPLIT}\n{item}".encode()).digest()[0] % 2 == 0


@dataclass(frozen=True)
class Part:
    """A curve on one part of the items, as differences to its base (point 0).

    Attributes:
        kind: of the dial.
        values: [P], of the dial.
        gained: [S, P, n], adaptation minus the base's, for S adapters that differ in their seed.
        lost: task → [S, P, n], the base's score minus the policy's (reversed where lower is better).
        weights: task → [n].
        averaged: names of the tasks that the mean forgetting averages.
        refused: [P], share of refused harmless requests; NaN where it is not measured.
        before: the base's own adaptation.
    """

    kind: DialKind
    values: tuple[float, ...]
    gained: NDArray[np.float64]
    lost: Mapping[str, NDArray[np.float64]]
    weights: Mapping[str, NDArray[np.float64]]
    averaged: tuple[str, ...]
    refused: NDArray[np.float64]
    before: float

    def adaptation(self, place: int) -> float:
        """Adaptation at a point, mean over seeds and items."""
        return self.before + float(self.gained[:, place].mean())

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
    found = mean_of_tasks_interval(
        [part.gained[:, place] for part, place in zip(parts, places, strict=True)], resamples=DRAWS
    )
    return _moved(found, float(np.mean([part.before for part in parts])))


def mean_forgetting(parts: Sequence[Part], places: Sequence[int], task: str | None = None) -> Interval:
    """95 % interval of the forgetting, mean over domains; as wide at least as its number of items can tell.

    Domains share their retention items: an item is drawn for all of them at once.

    Args:
        parts, places: as in `mean_adaptation`.
        task: of which; the mean over tasks without it.
    """
    names = [task] if task else list(parts[0].averaged)
    tables = [
        np.mean([part.lost[name][:, place] for part, place in zip(parts, places, strict=True)], axis=0)
        for name in names
    ]
    found = mean_of_tasks_interval(tables, weights=[parts[0].weights[name] for name in names], resamples=DRAWS)
    # A bootstrap of items of which none changed has no width; Wilson's interval for none of n has.
    half = math.sqrt(sum(_rarest(table.shape[1]) ** 2 for table in tables)) / len(tables)
    low, high = min(found.low, found.estimate - half), max(found.high, found.estimate + half)
    return Interval(found.estimate, low, high, found.stderr, found.items, found.seeds)


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
    return mean_of_tasks_interval([a - b for a, b in zip(*sides, strict=True)], resamples=DRAWS)


def _rarest(items: int) -> float:
    return proportion_interval(0.0, items).high


def _moved(found: Interval, by: float) -> Interval:
    """A share's interval around where it starts from; a share stays in [0, 1]."""
    low, high = max(0.0, found.low + by), min(1.0, found.high + by)
    return Interval(found.estimate + by, low, high, found.stderr, found.items, found.seeds)


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
    chosen = np.array([selects(item) for item in learnt_ids])
    kept = {name: np.array([selects(item) for item in task.ids]) for name, task in first.kept.items()}
    parts = []
    for side in (True, False):
        masks = {name: mask == side for name, mask in kept.items()}
        parts.append(_part(curves[0].kind, common, rows, chosen == side, masks))
    return parts[0], parts[1]


def _part(
    kind: DialKind,
    values: Sequence[float],
    rows: Sequence[Sequence[Point]],
    chosen: Mask,
    masks: Mapping[str, Mask],
) -> Part:
    fewest = min([int(chosen.sum()), *(int(mask.sum()) for mask in masks.values())])
    if fewest < FEWEST:
        raise QAdapterError(
            f"A half of the held-out items has only {fewest}, too few to choose a dial on and report another half; "
            "hold out more pairs, or give benchmarks with more items."
        )
    first = rows[0][0]
    of_base = np.array(first.learnt.values)[chosen]
    gained = np.array([[np.array(point.learnt.values)[chosen] - of_base for point in one] for one in rows])
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
    return Part(kind, tuple(values), gained, lost, weights, averaged, refused, float(of_base.mean()))


@dataclass(frozen=True)
class Choice:
    """The operating point under a budget.

    Attributes:
        budget: that was asked for.
        kind: of the dial.
        value: of the dial; 0 (the base) where no point above it satisfies the budget.
        place: of the point.
        adaptation, forgetting: on the part that it was not chosen on.
        gain: adaptation minus the base's, there.
        expected: adaptation and forgetting on the part that it was chosen on.
        sure: whether the whole interval of the forgetting lies within the budget.
        nearest: where no point above 0 satisfies the budget, the value that comes nearest and by how much it exceeds
            the budget; None elsewhere.
        items: of the reported part: held-out items, retention items.
    """

    budget: Budget
    kind: DialKind
    value: float
    place: int
    adaptation: Interval
    forgetting: Interval
    gain: Interval
    expected: tuple[float, float]
    sure: bool
    nearest: tuple[float, float] | None
    items: tuple[int, int]

    @property
    def dial(self) -> Dial:
        """The dial of the point."""
        return Dial(self.kind, self.value)

    def sentence(self) -> str:
        """What was chosen and how sure it is, for people."""
        limit = self.budget.max_forgetting
        found = self.forgetting
        shown = f"forgetting {found.estimate:+.4f} [{found.low:+.4f}, {found.high:+.4f}]"
        learnt = f"adaptation {self.adaptation.estimate:.3f} [{self.adaptation.low:.3f}, {self.adaptation.high:.3f}]"
        where = f"on the {self.items[0]} held-out and {self.items[1]} retention items it was not chosen on ({SPLIT})"
        if self.nearest is not None:
            value, by = self.nearest
            return (
                f"no point above 0 stays within the budget of {limit:g}: the nearest, {Dial(self.kind, value)}, "
                f"exceeds it by {by:.4f}. The dial stays at 0, the base"
            )
        if self.sure:
            return f"dial {self.dial}: {learnt}, {shown}, within the budget of {limit:g} with confidence, {where}"
        over = found.high - limit
        return (
            f"dial {self.dial}: {learnt}, {shown}, {where}. Not surely within the budget of {limit:g}: the interval "
            f"reaches {over:.4f} beyond it"
        )


def excess(part: Part, place: int, budget: Budget) -> float:
    """By how much a point exceeds a budget, the largest of its limits; 0 or less where it satisfies it."""
    over = [part.forgetting(place) - budget.max_forgetting] if part.averaged else []
    if budget.per_task is not None:
        over += [part.forgetting(place, name) - budget.per_task for name in part.averaged]
    if budget.max_over_refusals is not None and not math.isnan(part.refused[place]):
        over.append(float(part.refused[place]) - budget.max_over_refusals)
    return max(over, default=0.0)


def choose(curves: Sequence[Curve], budget: Budget) -> Choice:
    """Choose the point that learnt most within a budget on the selection part, and measure it on the other part.

    Among equals the one that forgot less is taken, then the smaller dial. The base satisfies every budget of
    forgetting.

    Args:
        curves: as in `split_curves`.
        budget: how much may be forgotten.

    Raises:
        QAdapterError: as `split_curves`.
    """
    selection, reported = split_curves(curves)
    return choose_on(selection, reported, budget)


def choose_among(curves: Sequence[Curve], budget: Budget) -> Choice:
    """`choose` for one adapter's curves along several kinds of dial: that of the kind that learnt most.

    Among equals the one that forgot less on the selection part is taken, then the kind that comes first.

    Args:
        curves: one for each kind.
        budget: how much may be forgotten.

    Raises:
        QAdapterError: as `split_curves`.
    """
    found = [choose([curve], budget) for curve in curves]
    return max(found, key=lambda choice: (round(choice.expected[0], 12), -round(choice.expected[1], 12)))


def choose_on(selection: Part, reported: Part, budget: Budget) -> Choice:
    """`choose`, for parts that are there already."""
    places = range(len(selection.values))
    over = [excess(selection, place, budget) for place in places]
    within = [place for place in places if over[place] <= 1e-12]
    best = max(
        within or [0],
        key=lambda place: (
            round(selection.adaptation(place), 12),
            -round(selection.forgetting(place), 12),
            -selection.values[place],
        ),
    )
    nearest = None
    if not any(selection.values[place] > 0 for place in within):
        place = min((place for place in places if selection.values[place] > 0), key=over.__getitem__)
        nearest = (selection.values[place], over[place])
    forgetting = mean_forgetting([reported], [best])
    return Choice(
        budget=budget,
        kind=selection.kind,
        value=selection.values[best],
        place=best,
        adaptation=mean_adaptation([reported], [best]),
        forgetting=forgetting,
        gain=mean_of_tasks_interval([reported.gained[:, best]], resamples=DRAWS),
        expected=(selection.adaptation(best), selection.forgetting(best)),
        sure=forgetting.high <= budget.max_forgetting,
        nearest=nearest,
        items=(reported.gained.shape[2], sum(table.shape[2] for table in reported.lost.values())),
    )


def front_area(part: Part, place_of: Sequence[int] | None = None, largest: float = LARGEST_BUDGET) -> float:
    """Area under the front: adaptation that is reached, averaged over all forgetting budgets from 0 to `largest`.

    Args:
        part: of the items.
        place_of: which points count; all by default.
        largest: the largest budget.
    """
    places = range(len(part.values)) if place_of is None else place_of
    points = [(part.forgetting(place), part.adaptation(place)) for place in places]
    return _area(points, part.before, largest)


def _area(points: Sequence[tuple[float, float]], before: float, largest: float) -> float:
    area, best, at = 0.0, before, 0.0
    for forgetting, adaptation in sorted((max(0.0, lost), learnt) for lost, learnt in points):
        if forgetting > largest:
            break
        area += best * (forgetting - at)
        at, best = forgetting, max(best, adaptation)
    return (area + best * (largest - at)) / largest


def area_interval(
    selection: Part, reported: Part, *, largest: float = LARGEST_BUDGET, resamples: int = DRAWS
) -> Interval:
    """The area under the front with its 95 % bootstrap interval, on the reported part.

    Which points lie on the front is decided on the selection part. Seeds and items are drawn with replacement.
    """
    return mean_area_interval([(selection, reported)], largest=largest, resamples=resamples)


def mean_area_interval(
    domains: Sequence[tuple[Part, Part]], *, largest: float = LARGEST_BUDGET, resamples: int = DRAWS
) -> Interval:
    """`area_interval` of the mean over domains, which share their seeds and their retention items.

    Args:
        domains: selection part and reported part of each.
        largest: the largest budget.
        resamples: bootstrap draws.
    """
    rng = np.random.default_rng(0)
    first = domains[0][1]
    seeds = len(first.gained)
    of_seeds = rng.multinomial(seeds, [1 / seeds] * seeds, size=resamples) / seeds  # [R, S]
    counts = {name: _counts(rng, table.shape[2], resamples) for name, table in first.lost.items()}
    estimate, items, draws = 0.0, 0, np.zeros(resamples)
    for selection, reported in domains:
        places = _front(selection)
        gained = reported.gained[:, places]
        learnt = reported.before + _drawn(gained, _counts(rng, gained.shape[2], resamples), of_seeds)
        lost = np.mean(
            [
                _drawn(reported.lost[name][:, places], counts[name] * reported.weights[name], of_seeds)
                for name in reported.averaged
            ],
            axis=0,
        )
        draws += [
            _area(list(zip(*points, strict=True)), reported.before, largest)
            for points in zip(lost.tolist(), learnt.tolist(), strict=True)
        ]
        estimate += front_area(reported, places, largest)
        items += gained.shape[2]
    draws, estimate = draws / len(domains), estimate / len(domains)
    low, high = np.quantile(draws, [0.025, 0.975])
    return Interval(estimate, float(low), float(high), float(draws.std()), items, seeds)


def _counts(rng: np.random.Generator, items: int, resamples: int) -> NDArray[np.float64]:
    """[R, n], how often each item is drawn."""
    return rng.multinomial(items, [1 / items] * items, size=resamples).astype(np.float64)


def _drawn(
    table: NDArray[np.float64], weights: NDArray[np.float64], of_seeds: NDArray[np.float64]
) -> NDArray[np.float64]:
    """[R, P] weighted means of [S, P, n], under each draw of items [R, n] and of seeds [R, S]."""
    by_item = np.einsum("spn,rn->rsp", table, weights, optimize=True) / weights.sum(axis=1)[:, None, None]
    found: NDArray[np.float64] = np.einsum("rsp,rs->rp", by_item, of_seeds)
    return found


def _front(part: Part) -> list[int]:
    """Places of the points that no other beats on both sides."""
    at = [(part.adaptation(place), -part.forgetting(place)) for place in range(len(part.values))]
    return [place for place, (x, y) in enumerate(at) if not any(a >= x and b >= y and (a > x or b > y) for a, b in at)]


def facts_of(choice: Choice) -> dict[str, Any]:
    """A choice as plain values."""
    return {
        "kind": choice.kind,
        "dial": choice.value,
        "budget": choice.budget.model_dump(),
        "adaptation": [choice.adaptation.estimate, choice.adaptation.low, choice.adaptation.high],
        "forgetting": [choice.forgetting.estimate, choice.forgetting.low, choice.forgetting.high],
        "gain": [choice.gain.estimate, choice.gain.low, choice.gain.high],
        "chosen_on": {"adaptation": choice.expected[0], "forgetting": choice.expected[1]},
        "sure": choice.sure,
        "nearest": choice.nearest,
        "split": SPLIT,
        "items": list(choice.items),
        "sentence": choice.sentence(),
    }
