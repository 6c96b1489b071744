"""Intervals of the report: what a method learnt and forgot, and how two methods differ, with the noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy import stats

from qadapter.evaluation.prompts import effective_number
from qadapter.evaluation.statistics import LEVEL, Interval, mean_of_tasks_interval, proportion_interval, with_seeds
from qadapter.report.changes import MARGIN, OF_OLD_PROMPTS, OF_PAIRS, changes, refusals
from qadapter.report.items import (
    RULE,
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
from qadapter.report.judges import judged_by_chance, without_win_rates_by_chance
from qadapter.report.rows import Row, Spread, kind, methods_of, ordered, run_of, spread_over

RESAMPLES = 2000
"""Bootstrap draws: the ends of an interval move by about 2 % of its width from one set of draws to the next."""
_Z = float(stats.norm.ppf((1 + LEVEL) / 2))
_EVEN = 0.5  # the base's win rate against itself


_Table = tuple[tuple[object, ...], Floats, Floats]
"""Ids, [S, n] and weights [n] of the same items under several seeds."""


@dataclass(frozen=True)
class Sample:
    """A measure of one method, or of the difference of two: an unweighted mean over parts.

    Attributes:
        seeds: S of them; (None,) for the base.
        ids: of each part.
        parts: [S, n_k] for each part k (one domain or task).
        weights: [n_k] for each.
        grain: how much one changed answer moves an item: 1, or 1/D where an item is a mean over D domains. 0 where an
            item is no yes or no (bits per byte).
        base: what it is a difference to.
        reach: largest size that the mean can have where items are yes or no: 1 for a difference of two shares, 2 for a
            difference of two such differences to bases of their own.
    """

    seeds: tuple[int | None, ...]
    ids: tuple[tuple[object, ...], ...]
    parts: tuple[Floats, ...]
    weights: tuple[Floats, ...]
    grain: float = 1.0
    base: str = ""
    reach: float = 1.0

    def minus(self, other: Sample) -> Sample | None:
        """The difference item by item, over the seeds both have (over each one's mean if none); None: other items."""
        if self.ids != other.ids:
            return None
        common = [seed for seed in self.seeds if seed in other.seeds]
        sides = [s._of(common) if common else s._averaged() for s in (self, other)]
        differences = tuple(a - b for a, b in zip(*sides, strict=True))
        reach = 1.0 if self.base == other.base else self.reach + other.reach
        return Sample(tuple(common) or (None,), self.ids, differences, self.weights, self.grain, self.base, reach)

    def only(self, seeds: Sequence[int | None]) -> Sample:
        """The same over some of its seeds; over all of them where none is named."""
        return replace(self, seeds=tuple(seeds), parts=self._of(seeds)) if seeds else self

    def _of(self, seeds: Sequence[int | None]) -> tuple[Floats, ...]:
        return tuple(part[[self.seeds.index(seed) for seed in seeds]] for part in self.parts)

    def _averaged(self) -> tuple[Floats, ...]:
        return tuple(part.mean(axis=0, keepdims=True) for part in self.parts)

    @property
    def estimate(self) -> float:
        """The mean of the interval, without the draws."""
        parts = zip(self.parts, self.weights, strict=True)
        return float(np.mean([(part @ weight).mean() / weight.sum() for part, weight in parts]))

    @cached_property
    def interval(self) -> Interval:
        """Mean and 95 % interval, over items and, where there are several, over seeds (`docs/evaluation.md`).

        It is the widest of a bootstrap percentile interval, which holds no value that the items cannot have, and of two
        that are put symmetrically around the estimate, Wilson's half-width for rare changes and Student's interval of
        the seeds. These two know no bounds and can give a difference of two shares values beyond ±1. No true value
        lies there, so the interval is cut at `reach`, which does not lower its coverage.
        """
        found = mean_of_tasks_interval(self.parts, weights=self.weights, resamples=RESAMPLES)
        if self.grain:
            half = np.sqrt(sum(self._least(p, w) ** 2 for p, w in zip(self.parts, self.weights, strict=True)))
            found = found.at_least(float(half) / len(self.parts))
        found = with_seeds(found, self.parts, self.weights)
        return found.within(-self.reach, self.reach) if self.grain else found

    def _least(self, part: Floats, weight: Floats) -> float:
        """Half the width that a part has at least: Wilson's upper end for the share of changed answers, less the share.

        A bootstrap knows only the changes that were seen, so rare ones look surer than none or many. The share counts
        up to where the distance is largest: from there on the bootstrap's own width is as large.

        An item of several answers (a prompt with its pairs) counts as one where they changed together, and as more the
        less its mean varies; a whole changed item is added to what was seen.
        """
        changes = part.mean(axis=0)
        share = np.average(np.abs(changes - np.median(changes)), weights=weight)
        items = effective_number(weight)
        varies = np.average((changes - np.average(changes, weights=weight)) ** 2, weights=weight)
        together = (varies + 1 / items) / (share * (1 - share) + 1 / items)
        size = float(np.clip(items / together, items, max(items, weight.sum()))) / self.grain
        widest = max(0.0, (1 - _Z / np.sqrt(size)) / 2)
        share = min(float(share), widest)
        n = max(1, round(size))
        return proportion_interval(share * n, n).high - share


class Measured:
    """All rows of a comparison with their item scores, read once.

    Attributes:
        rows: one per policy, without the win rates of judges that may decide by chance.
        judged_by_chance: the domains of these judges.
        domains, methods: in order.
        measures: `retention/<task>/<metric>`, one a task.
        higher: metric to whether higher is better.
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self.rows = without_win_rates_by_chance(rows)
        self.judged_by_chance = judged_by_chance(rows)
        self.domains = ordered(row.domain for row in rows)
        self.methods = methods_of(rows)
        self.measures = retention_measures(rows)
        self.higher = directions_of(rows)
        self._by_cell = {(row.domain, row.method, row.seed): row for row in self.rows}
        self._measured = {(row.domain, row.method) for row in rows}
        self._kept = {cell: retention_items(row, self.measures) for cell, row in self._by_cell.items()}
        self._samples: dict[tuple[object, ...], Sample | None] = {}
        self._changed: dict[tuple[str, str, int | None], dict[str, Items]] = {}
        self._refused: dict[Path | None, Items | None] = {}
        self._won = {cell: wins(row) for cell, row in self._by_cell.items()}
        self._gained = {
            cell: adaptation_gain(row, self._by_cell.get((row.domain, self.base_of(row.method), None)))
            for cell, row in self._by_cell.items()
        }

    def base_of(self, method: str) -> str:
        """What a method is measured against: `base`, or where compared runs have bases of their own, that run's."""
        own = f"base{run_of(method)}"
        return own if own in self.methods else "base"

    def seeds(self, method: str, domains: Sequence[str] = ()) -> list[int | None]:
        """The seeds of a method that have a row in each of some domains, in order; all of them by default."""
        seeds = dict.fromkeys(row.seed for row in self.rows if row.method == method)
        return [seed for seed in seeds if all((domain, method, seed) in self._by_cell for domain in domains)]

    def domains_of(self, *methods: str) -> list[str]:
        """The domains in which all these methods have a row."""
        return [domain for domain in self.domains if all((domain, method) in self._measured for method in methods)]

    @property
    def accuracies(self) -> list[str]:
        """The measures that `retention/mean` averages: those where higher is better."""
        return [name for name in self.measures if self.higher.get(name, True)]

    def gain(self, method: str, domains: Sequence[str]) -> Sample | None:
        """`adaptation/score` minus the base's; the domains are the parts."""
        return self._once(("gain", method, *domains), lambda: self._gain(method, domains))

    def _gain(self, method: str, domains: Sequence[str]) -> Sample | None:
        seeds = self.seeds(method, domains)
        parts = [self._stack([self._gained.get((domain, method, seed)) for seed in seeds]) for domain in domains]
        return _sample(seeds, parts, base=self.base_of(method))

    def wins(self, method: str, domains: Sequence[str]) -> Sample | None:
        """`adaptation/win_rate` minus the ½ of the base against itself; the domains are the parts."""

        def make() -> Sample | None:
            seeds = self.seeds(method, domains)
            parts = [self._stack([self._won.get((d, method, s)) for s in seeds]) for d in domains]
            return _sample(seeds, parts, base=self.base_of(method))

        return self._once(("wins", method, *domains), make)

    def win_rate(self, method: str, domains: Sequence[str]) -> tuple[Spread, Interval | None]:
        """Mean over some domains, and its interval over the decided answers."""
        value = spread_over(self.rows, WIN_RATE, domains, method)
        sample = self.wins(method, domains) if domains and kind(method) != "base" else None
        if sample is None or not value.n:
            return value, None
        return value, _moved(_EVEN, sample)

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
        seeds, parts, shares = self.seeds(method, domains), [], True
        for name in [measure] if measure else self.accuracies:
            higher = self.higher.get(name, True)
            sign = 1.0 if higher else -1.0
            tables: list[_Table | None] = []
            for domain in domains:
                policy = self._stack([self._kept.get((domain, method, seed), {}).get(name) for seed in seeds])
                before = self._kept.get((domain, self.base_of(method), None), {}).get(name)
                if policy is None or before is None or policy[0] != before.ids:
                    return None
                shares = shares and higher and are_shares(before.values) and are_shares(policy[1])
                tables.append((policy[0], sign * (before.values - policy[1]), policy[2]))
            parts.append(_over_domains(tables))
        return _sample(seeds, parts, 1 / len(domains) if shares and domains else 0.0, self.base_of(method))

    def change(self, name: str, method: str, domains: Sequence[str]) -> Sample | None:
        """A further measure (`qadapter.report.changes`) minus the base's.

        Pairs are others in every domain, so the domains are the parts; old prompts are the same ones, so a prompt's
        change is first averaged over the domains.
        """

        def make() -> Sample | None:
            seeds = self.seeds(method, domains)
            tables = [self._stack([self._changes(d, method, s).get(name) for s in seeds]) for d in domains]
            if name in OF_OLD_PROMPTS:
                return _sample(seeds, [_over_domains(tables)], 1 / max(len(domains), 1), self.base_of(method))
            return _sample(seeds, tables, 0.0 if name == MARGIN else 1.0, self.base_of(method))

        return self._once(("change", name, method, *domains), make)

    def _changes(self, domain: str, method: str, seed: int | None) -> dict[str, Items]:
        cell = (domain, method, seed)
        if cell not in self._changed:
            row, base = self._by_cell[cell], self._by_cell.get((domain, self.base_of(method), None))
            self._changed[cell] = changes(row, base, self._refusals(row), self._refusals(base) if base else None)
        return self._changed[cell]

    def _refusals(self, row: Row) -> Items | None:
        """The base's are the same in every domain, and its items are many."""
        if row.retention not in self._refused:
            self._refused[row.retention] = refusals(row)
        return self._refused[row.retention]

    def further(self, name: str, method: str, domains: Sequence[str]) -> Interval | None:
        """Interval of a measure that is neither the score nor of a task, over some domains; None without items."""
        if name == WIN_RATE:
            return self.win_rate(method, domains)[1]
        if name == RULE:
            return self._around(SCORE, method, domains, self.gain(method, domains), 1.0)
        if name not in (*OF_PAIRS, *OF_OLD_PROMPTS):
            return None
        return self._around(name, method, domains, self.change(name, method, domains), 1.0)

    def score(self, method: str, domain: str | None) -> Interval | None:
        """Interval of `adaptation/score`: the base's, taken as it is, plus the interval of what was gained."""
        domains = self._domains(domain)
        return self._around(SCORE, method, domains, self.gain(method, domains), 1.0)

    def retention(self, method: str, domain: str | None, measure: str | None = None) -> Interval | None:
        """Interval of a task's score, or (None) of `retention/mean`: the base's less the interval of what was lost."""
        domains = self._domains(domain)
        sign = -1.0 if measure is None or self.higher.get(measure, True) else 1.0
        sample = self.forgetting(method, domains, measure)
        return self._around(measure or "retention/mean", method, domains, sample, sign)

    def _domains(self, domain: str | None) -> list[str]:
        return [domain] if domain else self.domains

    def _around(
        self, metric: str, method: str, domains: Sequence[str], change: Sample | None, sign: float
    ) -> Interval | None:
        before = spread_over(self.rows, metric, domains, self.base_of(method))
        if change is None or kind(method) == "base" or not before.n:
            return None
        return _moved(before.mean, change, sign)

    @staticmethod
    def _stack(items: Sequence[Items | None]) -> _Table | None:
        """ids, [S, n] and [n] of the same items under several seeds; None if one is missing or has others."""
        found = [item for item in items if item is not None]
        if not found or len(found) < len(items) or len({item.ids for item in found}) > 1:
            return None
        return found[0].ids, np.stack([item.values for item in found]), found[0].weights


def _moved(before: float, change: Sample, sign: float = 1.0) -> Interval:
    """The interval of a change, around where it starts from; a share stays in [0, 1]."""
    found = change.interval
    low, high = sorted((before + sign * found.low, before + sign * found.high))
    moved = replace(found, estimate=before + sign * found.estimate, low=low, high=high)
    return moved.within(0.0, 1.0) if change.grain else moved


def are_shares(values: Floats) -> bool:
    """Whether scores can be shares. BLEU from 0 to 100, for one, is none, although higher is better."""
    return bool(((values >= 0) & (values <= 1)).all())


def _over_domains(tables: Sequence[_Table | None]) -> _Table | None:
    """Each item's mean over the domains; None if a domain lacks them or has others."""
    whole = [table for table in tables if table is not None]
    if not whole or len(whole) < len(tables) or len({table[0] for table in whole}) > 1:
        return None
    return whole[0][0], np.mean([table[1] for table in whole], axis=0), whole[0][2]


def _sample(
    seeds: Sequence[int | None], parts: Sequence[_Table | None], grain: float = 1.0, base: str = ""
) -> Sample | None:
    whole = [part for part in parts if part is not None]
    if not whole or len(whole) < len(parts):
        return None
    ids, values, weights = zip(*whole, strict=True)
    return Sample(tuple(seeds), ids, values, weights, grain, base)
