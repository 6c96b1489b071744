"""The settings of a sweep as points: how much was learnt and kept, which are efficient, which a rule would choose."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from qadapter.report.rows import Row, Spread, spread

BASE = "base"
KEPT = 0.98  # share of the base's retention that the constrained rule asks for


@dataclass(frozen=True)
class Setting:
    """One setting of a sweep (`qadapter.sweep.Variant`, without its experiment).

    Attributes:
        name: also the `method` of its rows.
        family: the method; for the Q-Adapter its objective.
        method: `sft`, `replay`, `dpo` or `q-adapter`.
        groups: the sweep's groups that it belongs to.
        tuning: whether it is part of its method's tuning.
        settings: its numbers, by name.
        trained_as: another setting's name where only α0 was changed, at inference.
    """

    name: str
    family: str
    method: str
    groups: Sequence[str]
    tuning: bool
    settings: dict[str, float]
    trained_as: str

    @property
    def dialled(self) -> bool:
        """Whether it is another setting's adapter with another α0."""
        return self.trained_as != self.name


@dataclass(frozen=True)
class Point:
    """A setting as measured: means over domains, then mean and deviation over seeds.

    Attributes:
        setting: which; None for the base.
        adaptation, retention, forgetting, kl: of `adaptation/score`, `retention/mean`, `forgetting/mean` and
            `forgetting/kl_per_token`.
        kept: the retention's mean as a share of the base's; 1 where the base had nothing to lose.
        by_seed: seed → the trade (`trade`).
        cells: how many domains and seeds were measured.
        complete: whether all were; a setting that lacks some is listed but not compared.
    """

    setting: Setting
    adaptation: Spread
    retention: Spread
    forgetting: Spread
    kl: Spread
    kept: float
    by_seed: dict[int | None, float]
    cells: int
    complete: bool

    @property
    def trade(self) -> float:
        """`trade` of the means."""
        return trade(self.adaptation.mean, self.kept)


def trade(adaptation: float, kept: float) -> float:
    """Harmonic mean of what was learnt and what was kept, both shares: near 1 only where both are.

    Args:
        adaptation: `adaptation/score`.
        kept: retention as a share of the base's; more than the base's counts as all.
    """
    kept = min(kept, 1.0)
    return 2 * adaptation * kept / (adaptation + kept) if adaptation + kept > 0 else 0.0


def points_of(rows: Sequence[Row], settings: Sequence[Setting], expected: int) -> list[Point]:
    """Every setting that was measured at least once.

    Args:
        rows: one a domain, setting (as `method`) and seed, and the base's.
        settings: those of the sweep.
        expected: rows that a complete setting has.
    """
    base = spread(rows, "retention/mean", None, BASE).mean

    def share(retention: float) -> float:
        return retention / base if base else 1.0

    found = []
    for setting in settings:
        own = [row for row in rows if row.method == setting.name]
        if not own:
            continue
        by_seed = {}
        for seed in dict.fromkeys(row.seed for row in own):
            of_seed = [row.metrics for row in own if row.seed == seed]
            learnt, kept = (fmean(m[name] for m in of_seed) for name in ("adaptation/score", "retention/mean"))
            by_seed[seed] = trade(learnt, share(kept))
        names = ("adaptation/score", "retention/mean", "forgetting/mean", "forgetting/kl_per_token")
        adaptation, retention, forgetting, kl = (spread(own, name, None, setting.name) for name in names)
        complete = len(own) == expected
        found.append(
            Point(setting, adaptation, retention, forgetting, kl, share(retention.mean), by_seed, len(own), complete)
        )
    return found


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """Those that no other beats in adaptation or retention without losing in the other; most adaptation first."""

    def beaten(point: Point) -> bool:
        here = (point.adaptation.mean, point.retention.mean)
        return any(
            other.adaptation.mean >= here[0]
            and other.retention.mean >= here[1]
            and (other.adaptation.mean, other.retention.mean) != here
            for other in points
        )

    front = [point for point in points if not beaten(point)]
    return sorted(front, key=lambda point: (-point.adaptation.mean, -point.retention.mean))


def front_area(points: Sequence[Point]) -> float:
    """Area of all (adaptation, kept) that some point reaches or beats: the hypervolume from the origin, at most 1."""
    area, highest = 0.0, 0.0
    for point in sorted(points, key=lambda p: -p.adaptation.mean):  # strips from the right, each as high as its best
        kept = min(point.kept, 1.0)
        if kept > highest:
            area += point.adaptation.mean * (kept - highest)
            highest = kept
    return area


def best_by_trade(points: Sequence[Point]) -> Point:
    """The highest harmonic mean; of equals the one with the smaller divergence from the base."""
    return max(points, key=lambda p: (p.trade, -_number(p.kl.mean)))


def best_that_keeps(points: Sequence[Point], share: float = KEPT) -> Point | None:
    """The most adaptation among those that keep so much of the base's retention; None if none does."""
    keeping = [point for point in points if point.kept >= share]
    return max(keeping, key=lambda p: (p.adaptation.mean, p.kept, -_number(p.kl.mean)), default=None)


def chosen_on_other_seeds(points: Sequence[Point]) -> dict[int | None, float]:
    """Seed → the trade there of the setting whose mean trade over the *other* seeds is the best.

    Unlike the best mean itself, this does not profit from how many settings were tried.
    """
    seeds = list(points[0].by_seed)
    if len(seeds) < 2:
        return {}
    result = {}
    for seed in seeds:
        chosen = max(points, key=lambda p: fmean(value for other, value in p.by_seed.items() if other != seed))
        result[seed] = chosen.by_seed[seed]
    return result


def _number(value: float) -> float:
    return 0.0 if math.isnan(value) else value
