"""The comparison in single figures and in sentences, all computed (`docs/evaluation.md` defines each)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from qadapter.evaluation.statistics import Interval
from qadapter.report.intervals import Measured
from qadapter.report.items import SCORE
from qadapter.report.rows import Row, kind, methods_of, spread
from qadapter.report.tables import bracket, number

OURS = "q-adapter"
CHANCE = 0.5


@dataclass(frozen=True)
class Duel:
    """One method against a baseline, over the domains both were trained on.

    Attributes:
        adaptation: adaptation score, method minus baseline.
        avoided: degradation avoided: the baseline's forgetting minus the method's.
        share: `avoided` as a share of the baseline's forgetting; NaN where that is not larger than its noise.
        adaptation_interval, avoided_interval: 95 %, None where item scores are missing.
    """

    method: str
    baseline: str
    adaptation: float
    avoided: float
    share: float
    adaptation_interval: Interval | None
    avoided_interval: Interval | None


def adherence_gained(measured: Measured, method: str) -> tuple[float, Interval | None]:
    """Mean over domains of the adaptation score minus the base's, and its interval."""
    base = measured.base_of(method)
    domains = measured.domains_of(method, base)
    rows = [row for row in measured.rows if row.domain in domains]
    sample = measured.gain(method, domains) if domains else None
    before = spread(rows, SCORE, None, base).mean
    gained = spread(rows, SCORE, None, method).mean - before
    if sample is None:
        return gained, None
    found = sample.interval  # a score is a share: nobody gains more than what the base lacks
    return gained, replace(found, low=max(found.low, -before), high=min(found.high, 1 - before))


def duel(measured: Measured, method: str, baseline: str) -> Duel | None:
    """Compare two methods; None if no domain has both."""
    domains = measured.domains_of(method, baseline)
    if not domains:
        return None
    rows = [row for row in measured.rows if row.domain in domains]

    def difference(metric: str) -> float:
        return spread(rows, metric, None, method).mean - spread(rows, metric, None, baseline).mean

    gains = [measured.gain(name, domains) for name in (method, baseline)]
    losses = [measured.forgetting(name, domains) for name in (baseline, method)]
    learnt = gains[0].minus(gains[1]) if gains[0] and gains[1] else None
    avoided = losses[0].minus(losses[1]) if losses[0] and losses[1] else None
    lost = losses[0].interval if losses[0] else None
    value = difference("retention/mean")
    share = value / lost.estimate if lost is not None and lost.low > 0 else math.nan
    return Duel(
        method,
        baseline,
        difference(SCORE),
        value,
        share,
        learnt.interval if learnt else None,
        avoided.interval if avoided else None,
    )


def duels(measured: Measured) -> list[Duel]:
    """Every Q-Adapter of the comparison against everything else in it that was trained."""
    ours = [method for method in measured.methods if kind(method) == OURS]
    pairs = [
        (method, other)
        for i, method in enumerate(ours)
        for other in [*ours[i + 1 :], *(m for m in measured.methods if kind(m) not in (OURS, "base"))]
    ]
    return [found for pair in pairs if (found := duel(measured, *pair)) is not None]


def pareto_front(points: dict[str, tuple[float, float]]) -> list[str]:
    """The names that no other beats: none is at least as good in both coordinates and better in one."""
    return [
        name
        for name, (x, y) in points.items()
        if not any(a >= x and b >= y and (a > x or b > y) for a, b in points.values())
    ]


def points(rows: Sequence[Row], domain: str | None) -> dict[str, tuple[float, float]]:
    """Method to (adaptation score, retention mean), those that have both."""
    found = {m: (spread(rows, SCORE, domain, m), spread(rows, "retention/mean", domain, m)) for m in methods_of(rows)}
    return {method: (x.mean, y.mean) for method, (x, y) in found.items() if x.n and y.n}


def summary_metrics(measured: Measured) -> dict[str, float]:
    """Each method's means over domains and the single figures, for the run that stands for the whole comparison."""
    result = {}
    for method in measured.methods:
        for name in (SCORE, "retention/mean", "forgetting/mean", "forgetting/kl_per_token"):
            value = spread(measured.rows, name, None, method).mean
            if not math.isnan(value):
                result[f"mean/{name}/{method}"] = value
        gained = adherence_gained(measured, method)[0]
        if kind(method) != "base" and not math.isnan(gained):
            result[f"summary/adherence_gained/{method}"] = gained
    for found in duels(measured):
        if not math.isnan(found.avoided):
            result[f"summary/degradation_avoided/{found.method}/against_{found.baseline}"] = found.avoided
    return {_metric_name(name): value for name, value in result.items()}


def _metric_name(name: str) -> str:
    """MLflow refuses brackets, which labels of compared runs have."""
    return "".join(c if c.isalnum() or c in "_-. /" else "_" for c in name)


def sentences(measured: Measured) -> list[str]:
    """The plain-language summary."""
    rows = measured.rows
    result = [_portrait(measured, method) for method in measured.methods if kind(method) == OURS]
    result += [_duel_sentence(found) for found in duels(measured)]
    found = points(rows, None)
    if len(found) > 1:
        front = [m for m in pareto_front(found) if kind(m) != "base"]
        result.append(
            f"On the Pareto front (of the means; no other method has at least as much of both): {_list(front)}."
            if front
            else "No method is on the Pareto front: the base itself has at least as much of both."
        )
    for subject, metric in (("Learnt most", SCORE), ("Kept most", "retention/mean")):
        values = {m: spread(rows, metric, None, m).mean for m in measured.methods if kind(m) != "base"}
        ranked = sorted((m for m in values if not math.isnan(values[m])), key=lambda m: -values[m])
        if len(ranked) > 1:
            result.append(f"{subject}, best first: " + ", ".join(f"{m} {number(values[m])}" for m in ranked) + ".")
    result += chance_sentences(measured)
    if single := [m for m in measured.methods if kind(m) != "base" and len(measured.seeds(m)) == 1]:
        result.append(
            f"One seed only ({_list(single)}): such intervals say how the choice of held-out items matters, not how "
            "another training would come out."
        )
    return result


def _portrait(measured: Measured, method: str) -> str:
    """What one method learnt and kept."""
    gained, interval = adherence_gained(measured, method)
    base = spread(measured.rows, "retention/mean", None, measured.base_of(method)).mean
    score, kept = (spread(measured.rows, name, None, method).mean for name in (SCORE, "retention/mean"))
    parts = []
    if base > 0 and not math.isnan(kept):
        parts.append(f"keeps {100 * kept / base:.1f} % of the base's retention ({number(kept)} of {number(base)})")
    if not math.isnan(gained):
        parts.append(f"reaches an adaptation score of {number(score)}, {_signed(gained, interval)} against the base")
    wins = spread(measured.rows, "adaptation/win_rate", None, method)
    if wins.n:
        parts.append(f"wins {100 * wins.mean:.0f} % of its answers against the base's (a tie is half a win)")
    return f"{method} {_list(parts)}." if parts else f"{method} was not measured."


def _duel_sentence(found: Duel) -> str:
    share = "" if math.isnan(found.share) else f", {100 * found.share:.0f} % of what {found.baseline} forgets"
    return (
        f"{found.method} against {found.baseline}: learnt {_signed(found.adaptation, found.adaptation_interval)} "
        f"({_noise(found.adaptation, found.adaptation_interval)}); degradation avoided "
        f"{_signed(found.avoided, found.avoided_interval)}{share} ({_noise(found.avoided, found.avoided_interval)})."
    )


def chance_sentences(measured: Measured) -> list[str]:
    """Domains with accuracies that could as well be a coin's."""
    result = []
    for domain in measured.domains:
        rows = [row for row in measured.rows if row.domain == domain]
        if any("adaptation/exact_rule" in row.metrics for row in rows):
            continue
        unsure, all_of_them = [], True
        for method in (m for m in methods_of(rows) if kind(m) != "base"):
            interval = measured.score(method, domain)
            if interval is not None and interval.low <= CHANCE <= interval.high:
                unsure.append(f"{method} {number(interval.estimate)} {bracket(interval)}")
            else:
                all_of_them = False
        if unsure:
            who = "no method's accuracy is" if all_of_them else "not"
            result.append(f"{domain}: {who} distinguishable from chance (0.5): {', '.join(unsure)}.")
    return result


def _signed(value: float, interval: Interval | None) -> str:
    sign = "+" if round(value, 3) > 0 else ""
    return f"{sign}{number(value)} {bracket(interval)}".strip()


def _noise(value: float, interval: Interval | None) -> str:
    if math.isnan(value):
        return "not measured"
    if interval is None:
        return "noise unknown: no item scores"
    return "larger than the noise" if interval.excludes_zero else "not larger than the noise"


def _list(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""
