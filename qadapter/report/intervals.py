"""Intervals of the report: what a method learnt and forgot, and how two methods differ, with the noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
from scipy import stats

from qadapter.evaluation.statistics import LEVEL, Interval, across_seeds, mean_of_tasks_interval, proportion_interval
from qadapter.report.items import (
    SCORE,
    WIN_RATE,
    Floats,
    Items,
    adaptation_gain,
    directions_of,
    retention_items,
    retention_measures,
    wins,
)
from qadapter.report.rows import Row, Spread, kind, known_domains, methods_of, ordered, partial_spread, run_of, spread

RESAMPLES = 2000
"""Bootstrap draws: the ends of an interval move by about 2 % of its width from one set of draws to the next."""
_Z = float(stats.norm.ppf((1 + LEVEL) / 2))
_EVEN = 0.5  # the base's win rate against itself


@dataclass(frozen=True)
class Sample:
    """A measure of one method, or of the difference of two: an unweighted mean over parts.

    Attributes:
        seeds: S of them; (None,) for the base.
        ids: of each part.
        parts: [S, n_k] for each part k (a domain, a task).
        weights: [n_k] for each.
        grain: how much one changed answer moves an item: 1, or 1/D where an item is a mean over D domains. 0 where an
            item is no yes or no (bits per byte).
    """

    seeds: tuple[int | None, ...]
    ids: tuple[tuple[object, ...], ...]
    parts: tuple[Floats, ...]
    weights: tuple[Floats, ...]
    grain: float = 1.0

    def minus(self, other: Sample) -> Sample | None:
        """The difference item by item, over the seeds both have (over each one's mean if none); None: other items."""
        if self.ids != other.ids:
            return None
        common = [seed for seed in self.seeds if seed in other.seeds]
        sides = [s._of(common) if common else s._averaged() for s in (self, other)]
        differences = tuple(a - b for a, b in zip(*sides, strict=True))
        return Sample(tuple(common) or (None,), self.ids, differences, self.weights, self.grain)

    def _of(self, seeds: Sequence[int | None]) -> tuple[Floats, ...]:
        return tuple(part[[self.seeds.index(seed) for seed in seeds]] for part in self.parts)

    def _averaged(self) -> tuple[Floats, ...]:
        return tuple(part.mean(axis=0, keepdims=True) for part in self.parts)

    @cached_property
    def interval(self) -> Interval:
        """Mean and 95 % interval, over items and, where there are several, over seeds (`docs/evaluation.md`)."""
        found = mean_of_tasks_interval(self.parts, weights=self.weights, resamples=RESAMPLES)
        if self.grain:
            half = np.sqrt(sum(self._least(p, w) ** 2 for p, w in zip(self.parts, self.weights, strict=True)))
            half = float(half) / len(self.parts)
            found = replace(
                found, low=min(found.low, found.estimate - half), high=max(found.high, found.estimate + half)
            )
        if len(self.seeds) > 1:
            scores = [
                np.mean([np.average(part[s], weights=w) for part, w in zip(self.parts, self.weights, strict=True)])
                for s in range(len(self.seeds))
            ]
            found = _wider(found, across_seeds(scores))
        return found

    def _least(self, part: Floats, weight: Floats) -> float:
        """Half the width that a part has at least: Wilson's upper end for the share of changed answers, less the share.

        A bootstrap knows only the changes that were seen, so rare ones look surer than none or many. The share counts
        up to where the distance is largest: from there on the bootstrap's own width is as large.
        """
        changes = part.mean(axis=0)
        size = weight.sum() ** 2 / (weight**2).sum() / self.grain
        share = np.average(np.abs(changes - np.median(changes)), weights=weight)
        widest = max(0.0, (1 - _Z / np.sqrt(size)) / 2)
        share = min(float(share), widest)
        n = max(1, round(size))
        return proportion_interval(share * n, n).high - share


def _wider(one: Interval, other: Interval) -> Interval:
    return replace(one, low=min(one.low, other.low), high=max(one.high, other.high))


class Measured:
    """All rows of a comparison with their item scores, read once.

    Attributes:
        rows: one a policy.
        domains, methods: in order.
        measures: `retention/<task>/<metric>`, one a task.
        higher: metric to whether higher is better.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = list(rows)
        self.domains = ordered(row.domain for row in rows)
        self.methods = methods_of(rows)
        self.measures = retention_measures(rows)
        self.higher = directions_of(rows)
        self._by_cell = {(row.domain, row.method, row.seed): row for row in rows}
        self._kept = {cell: retention_items(row, self.measures) for cell, row in self._by_cell.items()}
        self._samples: dict[tuple[object, ...], Sample | None] = {}
        self._won = {cell: wins(row) for cell, row in self._by_cell.items()}
        self._gained = {
            cell: adaptation_gain(row, self._by_cell.get((row.domain, self.base_of(row.method), None)))
            for cell, row in self._by_cell.items()
        }

    def base_of(self, method: str) -> str:
        """What a method is measured against: `base`, or where compared runs have bases of their own, that run's."""
        own = f"base{run_of(method)}"
        return own if own in self.methods else "base"

    def seeds(self, method: str) -> list[int | None]:
        """The seeds of a method, in order."""
        return list(dict.fromkeys(row.seed for row in self.rows if row.method == method))

    def domains_of(self, *methods: str) -> list[str]:
        """The domains that all these methods were trained on."""
        return [d for d in self.domains if all(any(c[:2] == (d, m) for c in self._by_cell) for m in methods)]

    @property
    def accuracies(self) -> list[str]:
        """The measures that `retention/mean` averages: those where higher is better."""
        return [name for name in self.measures if self.higher.get(name, True)]

    def gain(self, method: str, domains: Sequence[str]) -> Sample | None:
        """`adaptation/score` minus the base's; the domains are the parts."""
        return self._once(("gain", method, *domains), lambda: self._gain(method, domains))

    def _gain(self, method: str, domains: Sequence[str]) -> Sample | None:
        seeds = self.seeds(method)
        parts = [self._stack([self._gained.get((domain, method, seed)) for seed in seeds]) for domain in domains]
        return _sample(seeds, parts)

    def wins(self, method: str, domains: Sequence[str]) -> Sample | None:
        """`adaptation/win_rate` minus the ½ of the base against itself; the domains are the parts."""

        def make() -> Sample | None:
            seeds = self.seeds(method)
            return _sample(seeds, [self._stack([self._won.get((d, method, s)) for s in seeds]) for d in domains])

        return self._once(("wins", method, *domains), make)

    def win_rate(self, method: str) -> tuple[Spread, Interval | None]:
        """Mean over the domains that have verdicts, and its interval over the decided answers."""
        value = partial_spread(self.rows, WIN_RATE, method)
        domains = [d for d in known_domains(self.rows, WIN_RATE) if d in self.domains_of(method)]
        sample = self.wins(method, domains) if domains and kind(method) != "base" else None
        if sample is None or not value.n:
            return value, None
        moved = sample.interval
        low, high = max(_EVEN + moved.low, 0.0), min(_EVEN + moved.high, 1.0)
        return value, replace(moved, estimate=_EVEN + moved.estimate, low=low, high=high)

    def forgetting(self, method: str, domains: Sequence[str], measure: str | None = None) -> Sample | None:
        """The base's score minus the policy's (reversed where lower is better): one task, or (None) their mean.

        The base's items are the same in every domain, so an item's difference is first averaged over the domains.
        """
        key = ("forgetting", method, measure, *domains)
        return self._once(key, lambda: self._forgetting(method, domains, measure))

    def _once(self, key: tuple[object, ...], make: Callable[[], Sample | None]) -> Sample | None:
        """Table, figure and sentences ask for the same samples, whose intervals take a while."""
        if key not in self._samples:
            self._samples[key] = make()
        return self._samples[key]

    def _forgetting(self, method: str, domains: Sequence[str], measure: str | None) -> Sample | None:
        seeds, parts = self.seeds(method), []
        for name in [measure] if measure else self.accuracies:
            sign = 1.0 if self.higher.get(name, True) else -1.0
            tables = []
            for domain in domains:
                policy = self._stack([self._kept.get((domain, method, seed), {}).get(name) for seed in seeds])
                before = self._kept.get((domain, self.base_of(method), None), {}).get(name)
                if policy is None or before is None or policy[0] != before.ids:
                    return None
                tables.append((policy[0], sign * (before.values - policy[1]), policy[2]))
            if not tables or len({table[0] for table in tables}) > 1:
                return None
            parts.append((tables[0][0], np.mean([table[1] for table in tables], axis=0), tables[0][2]))
        is_share = all(self.higher.get(name, True) for name in ([measure] if measure else self.accuracies))
        return _sample(seeds, parts, 1 / len(domains) if is_share else 0.0)

    def score(self, method: str, domain: str | None) -> Interval | None:
        """Interval of `adaptation/score`: the base's, taken as it is, plus the interval of what was gained."""
        return self._around(SCORE, method, domain, self.gain(method, self._domains(method, domain)), 1.0)

    def retention(self, method: str, domain: str | None, measure: str | None = None) -> Interval | None:
        """Interval of a task's score, or (None) of `retention/mean`: the base's less the interval of what was lost."""
        sample = self.forgetting(method, self._domains(method, domain), measure)
        sign = -1.0 if measure is None or self.higher.get(measure, True) else 1.0
        return self._around(measure or "retention/mean", method, domain, sample, sign)

    def _domains(self, method: str, domain: str | None) -> list[str]:
        return [domain] if domain else self.domains_of(method)

    def _around(
        self, metric: str, method: str, domain: str | None, change: Sample | None, sign: float
    ) -> Interval | None:
        domains = self._domains(method, domain)
        before = spread([row for row in self.rows if row.domain in domains], metric, None, self.base_of(method))
        if change is None or kind(method) == "base" or not before.n:
            return None
        moved = change.interval
        low, high = sorted((before.mean + sign * moved.low, before.mean + sign * moved.high))
        if self.higher.get(metric, True):  # a share
            low, high = max(low, 0.0), min(high, 1.0)
        return replace(moved, estimate=before.mean + sign * moved.estimate, low=low, high=high)

    @staticmethod
    def _stack(items: Sequence[Items | None]) -> tuple[tuple[object, ...], Floats, Floats] | None:
        """ids, [S, n] and [n] of the same items under several seeds; None if one is missing or has others."""
        found = [item for item in items if item is not None]
        if not found or len(found) < len(items) or len({item.ids for item in found}) > 1:
            return None
        return found[0].ids, np.stack([item.values for item in found]), found[0].weights


def _sample(
    seeds: Sequence[int | None],
    parts: Sequence[tuple[tuple[object, ...], Floats, Floats] | None],
    grain: float = 1.0,
) -> Sample | None:
    whole = [part for part in parts if part is not None]
    if not whole or len(whole) < len(parts):
        return None
    ids, values, weights = zip(*whole, strict=True)
    return Sample(tuple(seeds), ids, values, weights, grain)
