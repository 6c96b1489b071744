"""The area under the front of a curve: adaptation that is reached, averaged over forgetting budgets."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from qadapter.evaluation.curve.parts import DRAWS, Part, least_half
from qadapter.evaluation.statistics import Interval, across_seeds

LARGEST_BUDGET = 0.05
"""Of forgetting, for the area under the front."""


def front_area(part: Part, place_of: Sequence[int] | None = None, largest: float = LARGEST_BUDGET) -> float:
    """Area under the front: adaptation that is reached, averaged over all forgetting budgets from 0 to `largest`.

    Args:
        part: of the items.
        place_of: which points count; all by default.
        largest: the largest budget.
    """
    places = range(len(part.values)) if place_of is None else place_of
    lost = np.array([[part.forgetting(place) for place in places]])
    learnt = np.array([[part.adaptation(place) for place in places]])
    return float(_areas(lost, learnt, part.before, largest)[0])


def _areas(
    lost: NDArray[np.float64], learnt: NDArray[np.float64], before: float, largest: float
) -> NDArray[np.float64]:
    """[R] areas under the fronts of R draws of P points: forgetting and adaptation [R, P], the base's adaptation."""
    order = np.argsort(lost, axis=1)
    edges = np.clip(np.take_along_axis(lost, order, axis=1), 0.0, largest)
    reached = np.maximum.accumulate(np.take_along_axis(learnt, order, axis=1), axis=1).clip(min=before)
    widths = np.diff(edges, axis=1, append=largest)
    return (before * edges[:, 0] + (reached * widths).sum(axis=1)) / largest


def area_interval(
    selection: Part, reported: Part, *, largest: float = LARGEST_BUDGET, resamples: int = DRAWS
) -> Interval:
    """The area under the front with its 95 % bootstrap interval, on the reported part.

    Which points lie on the front is decided on the selection part. Seeds and items are drawn with replacement; of
    several seeds the interval reaches as far as Student's of their own areas.
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
    estimate, items, draws, of_each = 0.0, 0, np.zeros(resamples), np.zeros(seeds)
    for selection, reported in domains:
        places = _front(selection)
        gained = reported.gained[:, places]
        # The base's adaptation is not drawn with it, so a draw of gains alone could pass the ends of its range.
        drawn = _counts(rng, gained.shape[2], resamples) * reported.pairs
        learnt = np.clip(reported.before + _drawn(gained, drawn, of_seeds), 0, 1)
        lost = np.mean(
            [
                _drawn(reported.lost[name][:, places], counts[name] * reported.weights[name], of_seeds)
                for name in reported.averaged
            ],
            axis=0,
        )
        draws += _areas(lost, learnt, reported.before, largest)
        estimate += front_area(reported, places, largest)
        of_each += [front_area(reported.over([seed]), places, largest) for seed in range(seeds)]
        items += gained.shape[2]
    draws, estimate = draws / len(domains), estimate / len(domains)
    low, high = np.quantile(draws, [0.025, 0.975])
    alone = across_seeds(of_each / len(domains))
    half = max(least_half([reported.pairs for _, reported in domains]), alone.high - alone.estimate)
    found = Interval(estimate, float(low), float(high), float(draws.std()), items, seeds)
    return found.at_least(half).within(0.0, 1.0)  # a mean of shares, around a base that is not drawn


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
