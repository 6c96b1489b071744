"""The settings of a sweep as points: how much was learnt and kept, which are efficient, which a rule would choose."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal, NamedTuple

from qadapter.evaluation.statistics import Interval, across_seeds
from qadapter.report.front import pareto_front
from qadapter.report.items import RULE as RULE
from qadapter.report.rows import Row, Spread, spread
from qadapter.report.speaking import speaks

BASE = "base"
MEASURED = (
    "adaptation/score",
    "adaptation/win_rate",
    "retention/mean",
    "forgetting/mean",
    "forgetting/kl_per_token",
)
KEPT = 0.98  # share of the base's retention that the constrained rule asks for


@dataclass(frozen=True)
class Setting:
    """One setting of a sweep (`qadapter.config.sweep.Variant`, without its experiment).

    Attributes:
        name: also the `method` of its rows.
        family: the method; for the Q-Adapter its objective.
        method: its name.
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


class OfSeed(NamedTuple):
    """What one seed's trainings of a setting came to, means over domains.

    Attributes:
        trade: `trade` of this seed's own learnt and kept.
        retention, adaptation, kl: of `retention/mean`, `adaptation/score` and `forgetting/kl_per_token` (NaN where it
            was not measured).
    """

    trade: float
    retention: float
    adaptation: float
    kl: float


@dataclass(frozen=True)
class Point:
    """A setting as measured: means over domains, then mean and deviation over seeds.

    Attributes:
        setting: which; None for the base.
        adaptation, win_rate, retention, forgetting, kl: of `adaptation/score`, `adaptation/win_rate`, `retention/mean`,
            `forgetting/mean` and `forgetting/kl_per_token`.
        learnt: the adaptation as a share of what can be learnt (`learnt`); 0 for a policy that does what the base does.
        kept: the retention's mean as a share of the base's; 1 where the base had nothing to lose.
        by_seed: seed → what it came to.
        cells: how many domains and seeds were measured.
        complete: whether all were; a setting that lacks some is listed but not compared.
        speaks: whether all answer in language; a setting of which one does not is listed but not compared.
    """

    setting: Setting
    adaptation: Spread
    win_rate: Spread
    retention: Spread
    forgetting: Spread
    kl: Spread
    learnt: float
    kept: float
    by_seed: dict[int | None, OfSeed]
    cells: int
    complete: bool
    speaks: bool = True

    @property
    def trade(self) -> float:
        """`trade` of the means."""
        return trade(self.learnt, self.kept)


def learnt(metrics: Mapping[str, float]) -> float:
    """A row's `adaptation/score` as a share of what can be learnt.

    An implied-reward accuracy is 0.5 for a policy that does nothing, so it is stretched to 2 · accuracy − 1: 0 at
    chance, negative below. The toy world's rule is a share already, 0 for a policy that never follows it.
    """
    score = metrics["adaptation/score"]
    return score if RULE in metrics else 2 * score - 1


def trade(learnt: float, kept: float) -> float:
    """Harmonic mean of what was learnt and what was kept, both shares: near 1 only where both are.

    Args:
        learnt: see `learnt`; less than nothing counts as nothing.
        kept: retention as a share of the base's; more than the base's counts as all.
    """
    learnt, kept = max(learnt, 0.0), min(kept, 1.0)
    return 2 * learnt * kept / (learnt + kept) if learnt + kept > 0 else 0.0


def points_of(rows: Sequence[Row], settings: Sequence[Setting], expected: int) -> list[Point]:
    """Every setting that was measured at least once.

    Args:
        rows: one per domain, setting (as `method`) and seed, and those of the base.
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
        by_seed, learnt_by_seed = {}, {}
        metrics = {seed: [r.metrics for r in own if r.seed == seed] for seed in dict.fromkeys(r.seed for r in own)}
        for seed, of_seed in metrics.items():
            kept = fmean(m["retention/mean"] for m in of_seed)
            learnt_by_seed[seed] = fmean(learnt(m) for m in of_seed)
            by_seed[seed] = OfSeed(
                trade=trade(learnt_by_seed[seed], share(kept)),
                retention=kept,
                adaptation=fmean(m["adaptation/score"] for m in of_seed),
                kl=fmean(m.get("forgetting/kl_per_token", math.nan) for m in of_seed),
            )
        adaptation, win_rate, retention, forgetting, kl = (
            Spread.of(fmean(m.get(name, math.nan) for m in of_seed) for of_seed in metrics.values())
            for name in MEASURED
        )
        found.append(
            Point(
                setting=setting,
                adaptation=adaptation,
                win_rate=win_rate,
                retention=retention,
                forgetting=forgetting,
                kl=kl,
                learnt=fmean(learnt_by_seed.values()),
                kept=share(retention.mean),
                by_seed=by_seed,
                cells=len(own),
                complete=len(own) == expected,
                speaks=all(map(speaks, own)),
            )
        )
    return found


def front_of(points: Sequence[Point]) -> list[Point]:
    """The points on the front of adaptation and retention; most adaptation first."""
    places = {index: (point.adaptation.mean, point.retention.mean) for index, point in enumerate(points)}
    front = [points[index] for index in pareto_front(places)]
    return sorted(front, key=lambda point: (-point.adaptation.mean, -point.retention.mean))


def front_area(points: Sequence[Point]) -> float:
    """Area of all (learnt, kept) that some point reaches or beats: the hypervolume from the origin, at most 1."""
    area, highest = 0.0, 0.0
    for point in sorted(points, key=lambda p: -p.learnt):  # strips from the right, each as high as its best
        kept = min(point.kept, 1.0)
        if kept > highest:
            area += max(point.learnt, 0.0) * (kept - highest)
            highest = kept
    return area


def best_by_trade(points: Sequence[Point]) -> Point:
    """The highest harmonic mean; of equals the one with the smaller divergence from the base."""
    return max(points, key=lambda p: rank(p.trade, p.kl.mean))


def best_that_keeps(points: Sequence[Point], share: float = KEPT) -> Point | None:
    """The most adaptation among those that keep so much of the base's retention; None if none does."""
    keeping = [point for point in points if point.kept >= share]
    return max(keeping, key=lambda p: (p.adaptation.mean, *rank(p.kept, p.kl.mean)), default=None)


def chosen_on_other_seeds(points: Sequence[Point]) -> dict[int | None, float]:
    """Seed → the trade there of the setting whose mean trade over the *other* seeds is the best.

    Of equals it is the one with the smaller divergence there, as in `best_by_trade`. Unlike the best mean itself, this
    does not profit from how many settings were tried.
    """
    seeds = list(points[0].by_seed)
    if len(seeds) < 2:
        return {}
    result = {}
    for seed in seeds:
        chosen = max(points, key=lambda p: _rank_without(p, seed))
        result[seed] = chosen.by_seed[seed].trade
    return result


def differences(point: Point, other: Point) -> dict[str, Interval]:
    """Trade, retention and adaptation, each a point's minus another's, paired by seed, with Student's interval.

    Args:
        point, other: both complete, so they have the same seeds.
    """
    pairs = [(point.by_seed[seed], other.by_seed[seed]) for seed in point.by_seed]
    return {
        "trade": _difference([(one.trade, two.trade) for one, two in pairs]),
        "retention": _difference([(one.retention, two.retention) for one, two in pairs]),
        "adaptation": _difference([(one.adaptation, two.adaptation) for one, two in pairs]),
    }


def _difference(pairs: Sequence[tuple[float, float]]) -> Interval:
    """Of the first minus the second; within ±1 where all are shares (a benchmark may have another score)."""
    shares = all(0 <= value <= 1 for pair in pairs for value in pair)
    return across_seeds([one - two for one, two in pairs], bounds=(-1, 1) if shares else (-math.inf, math.inf))


def edges(best: Point, tried: Sequence[Point]) -> dict[str, Literal["lowest", "highest"]]:
    """The knobs of which a point has the lowest or highest tried value, independent of the other knobs.

    A knob of one value was not tuned. A value of 0 is no edge: no knob goes below it.

    Args:
        best: one of `tried`.
        tried: the settings of one method's tuning.
    """
    found: dict[str, Literal["lowest", "highest"]] = {}
    for knob, value in best.setting.settings.items():
        values = {point.setting.settings[knob] for point in tried if knob in point.setting.settings}
        if len(values) > 1 and value == max(values):
            found[knob] = "highest"
        elif len(values) > 1 and value == min(values) and value > 0:
            found[knob] = "lowest"
    return found


def rank(value: float, kl: float) -> tuple[float, float]:
    """To sort by: the larger value, of equals the smaller divergence from the base; an unknown one comes last."""
    return value, -math.inf if math.isnan(kl) else -kl


def _rank_without(point: Point, seed: int | None) -> tuple[float, float]:
    """`rank` by trade over all seeds but one."""
    others = [found for other, found in point.by_seed.items() if other != seed]
    return rank(fmean(found.trade for found in others), fmean(found.kl for found in others))
