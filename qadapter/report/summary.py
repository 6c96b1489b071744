"""The comparison in single figures and in sentences, all computed (`docs/evaluation.md` defines each)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qadapter.evaluation.distance import far_from_base
from qadapter.evaluation.old_text import unmeasured_on_old_text
from qadapter.evaluation.statistics import Interval
from qadapter.methods.table import METHODS, SUBJECT
from qadapter.report.cuts import cut_sentences
from qadapter.report.front import pareto_front
from qadapter.report.intervals import Measured
from qadapter.report.items import SCORE, WIN_RATE
from qadapter.report.judges import CHANCE, judge_intervals
from qadapter.report.rows import Row, kind, listed, methods_of, spread, spread_over
from qadapter.report.speaking import judged_sentences, silent_methods, speech_sentences
from qadapter.report.tables import bracket, number

OURS = SUBJECT.name
_MOST_DUELS = 12  # more, of a whole sweep, would be no summary


@dataclass(frozen=True)
class Duel:
    """One method against a baseline, over the domains both were trained on.

    Attributes:
        domains: those.
        adaptation: adaptation score, method minus baseline.
        avoided: degradation avoided: the baseline's forgetting minus the method's.
        share: `avoided` as a share of the baseline's forgetting, over the same seeds; NaN where that is not larger than
            its noise, and without intervals.
        adaptation_interval, avoided_interval: 95 %; None if item scores are missing or intervals were not requested.
    """

    method: str
    baseline: str
    domains: tuple[str, ...]
    adaptation: float
    avoided: float
    share: float
    adaptation_interval: Interval | None
    avoided_interval: Interval | None


def adherence_gained(measured: Measured, method: str) -> tuple[float, Interval | None]:
    """Mean over its domains of a method's adaptation score minus the base's, and its interval."""
    base = measured.base_of(method)
    domains = measured.domains_of(method, base)
    sample = measured.gain(method, domains) if domains else None
    before = spread_over(measured.rows, SCORE, domains, base).mean
    gained = spread_over(measured.rows, SCORE, domains, method).mean - before
    if sample is None:
        return gained, None
    found = sample.interval  # a score is a share, so a gain is at most what the base lacks
    return gained, replace(found, low=max(found.low, -before), high=min(found.high, 1 - before))


def duel(
    measured: Measured, method: str, baseline: str, domain: str | None = None, *, intervals: bool = True
) -> Duel | None:
    """Compare two methods, in one domain or over (None) those that have both; None if there is no such domain.

    Args:
        intervals: whether to draw them; they are what takes long.
    """
    domains = [d for d in measured.domains_of(method, baseline) if domain in (None, d)]
    if not domains:
        return None
    common = [seed for seed in measured.seeds(method, domains) if seed in measured.seeds(baseline, domains)]
    bases_differ = measured.base_of(method) != measured.base_of(baseline)

    def difference(metric: str) -> float:
        """Of the changes against each one's own base, over the seeds both have: of what the intervals are of."""
        values = []
        for name in (method, baseline):
            own = [r for r in measured.rows if r.method == name and (not common or r.seed in common)]
            base = measured.base_of(name)
            before = spread_over(measured.rows, metric, domains, base).mean if bases_differ else 0.0
            values.append(spread_over(own, metric, domains, name).mean - before)
        return values[0] - values[1]

    gains = [measured.gain(name, domains) for name in (method, baseline)]
    losses = [measured.forgetting(name, domains) for name in (baseline, method)]
    learnt = gains[0].minus(gains[1]) if gains[0] and gains[1] else None
    avoided = losses[0].minus(losses[1]) if losses[0] and losses[1] else None
    value = avoided.estimate if avoided else difference("retention/mean")
    lost = losses[0].only(common).interval if losses[0] and intervals else None
    share = value / lost.estimate if lost is not None and lost.low > 0 else math.nan
    return Duel(
        method,
        baseline,
        tuple(domains),
        learnt.estimate if learnt else difference(SCORE),
        value,
        share,
        learnt.interval if learnt and intervals else None,
        avoided.interval if avoided and intervals else None,
    )


def duels(measured: Measured) -> list[Duel]:
    """Every Q-Adapter of the comparison against everything else in it that was trained.

    Those that the summary tells, the first ones of methods that speak, have intervals; the others, thousands in a
    sweep, have none.
    """
    silent, told = silent_methods(measured.rows), 0
    ours = [method for method in measured.methods if kind(method) == OURS]
    pairs = [
        (method, other)
        for i, method in enumerate(ours)
        for other in [*ours[i + 1 :], *(m for m in measured.methods if kind(m) not in (OURS, "base"))]
    ]
    found: list[Duel] = []
    for method, other in pairs:
        speak = method not in silent and other not in silent
        one = duel(measured, method, other, intervals=speak and told < _MOST_DUELS)
        if one is not None:
            found.append(one)
            told += speak
    return found


def points(rows: Sequence[Row], domain: str | None) -> dict[str, tuple[float, float]]:
    """Method to (adaptation score, retention mean), in a domain or over (None) all; those that have both."""
    found = {m: (spread(rows, SCORE, domain, m), spread(rows, "retention/mean", domain, m)) for m in methods_of(rows)}
    return {method: (x.mean, y.mean) for method, (x, y) in found.items() if x.n and y.n}


def summary_metrics(measured: Measured, fought: Sequence[Duel] | None = None) -> dict[str, float]:
    """Each method's means over domains and the single figures, for the MLflow run of the whole comparison.

    Args:
        fought: its `duels`, where the caller has them already.
    """
    result = {}
    for method in measured.methods:
        for name in (SCORE, "retention/mean", "forgetting/mean", "forgetting/kl_per_token"):
            value = spread(measured.rows, name, None, method).mean
            if not math.isnan(value):
                result[f"mean/{name}/{method}"] = value
        gained = adherence_gained(measured, method)[0]
        if kind(method) != "base" and not math.isnan(gained):
            result[f"summary/adherence_gained/{method}"] = gained
    for found in duels(measured) if fought is None else fought:
        if not math.isnan(found.avoided):
            result[f"summary/degradation_avoided/{found.method}/against_{found.baseline}"] = found.avoided
    return result


def _settings(config: Mapping[str, Any], labels: Sequence[str]) -> str:
    """The methods' strengths, where the config, nested or as MLflow's flat parameters, has them."""
    shared, sections = config.get("shared", {}), config.get("methods", {})
    found = []
    for method in METHODS:
        if method.strength is None or all(kind(label) != method.name for label in labels):
            continue
        flat = shared.get(f"methods.{method.name}.{method.strength}")
        value = sections.get(method.name, {}).get(method.strength, flat)
        if value is not None:
            label = next(knob.label for knob in method.knobs if knob.name == method.strength)
            found.append(f"{method.name}: {label} = {value}")
    return f" ({', '.join(found)})" if found else ""


def sentences(
    measured: Measured, config: Mapping[str, Any] | None = None, fought: Sequence[Duel] | None = None
) -> list[str]:
    """The plain-language summary.

    Args:
        measured: what it is of.
        config: the experiment's settings, where they are known.
        fought: its `duels`, where the caller has them already.
    """
    return [line for lines in _by_subject(measured, config, fought).values() for line in lines]


def first_sentences(
    measured: Measured, config: Mapping[str, Any] | None = None, fought: Sequence[Duel] | None = None
) -> tuple[list[str], list[str]]:
    """The summary in at most `LONGEST_SUMMARY` sentences, and the further ones; arguments as of `sentences`.

    The subjects come first in the order of `_FIRST`; the rest keep the order of `sentences`.
    """
    found = _by_subject(measured, config, fought)
    wanted = [line for subject in _FIRST for line in found[subject]]
    first = wanted[:LONGEST_SUMMARY]
    return first, [line for lines in found.values() for line in lines if line not in first]


LONGEST_SUMMARY = 6
_FIRST = ("speech", "judged", "portraits", "ranking", "coverage", "seeds")


def _by_subject(
    measured: Measured, config: Mapping[str, Any] | None, fought: Sequence[Duel] | None
) -> dict[str, list[str]]:
    """The sentences by what they are about, in the order of the summary."""
    config = config or {}
    rows = measured.rows
    silent = silent_methods(rows)
    labels = [m for m in measured.methods if kind(m) != "base"]
    setting = []
    if len(labels) > 1 and len({kind(m) for m in labels}) == len(labels):
        setting.append(
            f"Each method is shown at one setting{_settings(config, labels)}, not at the best of a search: another "
            "setting may learn or keep more."
        )
    seeds = []
    if single := [m for m in labels if len(measured.seeds(m)) == 1]:
        seeds.append(
            f"One seed only ({listed(single)}): such intervals say how the choice of held-out items matters, not how "
            "another training would come out."
        )
    return {
        "speech": speech_sentences(rows),
        "coverage": coverage_sentences(measured),
        "portraits": [_portrait(measured, m) for m in measured.methods if kind(m) == OURS and m not in silent],
        "duels": _told_duels(measured, silent, duels(measured) if fought is None else fought),
        "front": _front_sentences(measured, silent),
        "ranking": _rankings(measured, silent),
        "chance": chance_sentences(measured),
        "distance": distance_sentences(measured),
        "judged": judged_sentences(rows, measured.judged_by_chance) + judge_sentences(measured, by_chance=True),
        "judge": judge_sentences(measured, by_chance=False)
        + undecided_sentences(measured)
        + unmeasured_on_old_text(config),
        "setting": setting,
        "cuts": cut_sentences(rows),
        "seeds": seeds,
    }


def _told_duels(measured: Measured, silent: Sequence[str], fought: Sequence[Duel]) -> list[str]:
    """The duels of methods that speak, the first ones in full."""
    fought = [one for one in fought if one.method not in silent and one.baseline not in silent]
    told = [(_duel_sentence(measured, one), _by_domain(measured, one)) for one in fought[:_MOST_DUELS]]
    result = [line for lines in told for line in lines if line]
    if len(fought) > _MOST_DUELS:
        result.append(f"{len(fought) - _MOST_DUELS} further pairs of settings are compared in metrics.json.")
    return result


def _front_sentences(measured: Measured, silent: Sequence[str]) -> list[str]:
    found = {method: place for method, place in points(measured.rows, None).items() if method not in silent}
    if len(found) < 2:
        return []
    front = [m for m in pareto_front(found) if kind(m) != "base"]
    if not front:
        return ["No method is on the Pareto front: the base itself has at least as much of both."]
    result = [
        f"On the Pareto front (of the means; no other method{_with_every_domain(measured)} has at least as much of "
        f"both): {listed(front)}."
    ]
    if bare := [method for method in front if not _above_base(measured, method)]:
        result.append(f"On that front, but not above the base in what was learnt, beyond the noise: {listed(bare)}.")
    return result


def _rankings(measured: Measured, silent: Sequence[str]) -> list[str]:
    result = []
    for subject, metric in (("Learnt most", SCORE), ("Kept most", "retention/mean")):
        values = {m: spread(measured.rows, metric, None, m).mean for m in measured.methods if kind(m) != "base"}
        ranked = [m for m in values if not math.isnan(values[m]) and m not in silent]
        ranked.sort(key=lambda m: -values[m])
        if len(ranked) > 1:
            result.append(f"{subject}, best first: " + ", ".join(f"{m} {number(values[m])}" for m in ranked) + ".")
    return result


def coverage_sentences(measured: Measured) -> list[str]:
    """Which methods lack which domains, and which seeds of them; nothing where all have all."""
    lacking: dict[tuple[str, ...], list[str]] = {}
    seeds = []
    for method in measured.methods:
        own = measured.domains_of(method)
        if missing := tuple(domain for domain in measured.domains if domain not in own):
            lacking.setdefault(missing, []).append(method)
        for domain in own:
            there = measured.seeds(method, [domain])
            if absent := [str(seed) for seed in measured.seeds(method) if seed not in there]:
                seeds.append(f"{method} lacks seed{'s' if len(absent) > 1 else ''} {listed(absent)} in {domain}")
    result = []
    if lacking:
        each = [
            f"{listed(methods)} {'lacks' if len(methods) == 1 else 'lack'} {listed(missing)}"
            for missing, methods in lacking.items()
        ]
        result.append(
            f"Not every method was measured in every domain: {'; '.join(each)}. A method that lacks one has no mean "
            "over domains and no place among the means, in the ranking or on the front; two methods are compared over "
            "the domains that both have."
        )
    if seeds:
        result.append(
            f"Not every seed was measured in every domain: {'; '.join(seeds)}. A mean over domains is of the seeds "
            "that have them all."
        )
    return result


def _with_every_domain(measured: Measured) -> str:
    """Whom a sentence about means is about, where not every method has one."""
    complete = all(measured.domains_of(method) == measured.domains for method in measured.methods)
    return "" if complete else " with every domain"


def _portrait(measured: Measured, method: str) -> str:
    """What one method learnt and kept in the domains that it was trained on."""
    gained, interval = adherence_gained(measured, method)
    domains = measured.domains_of(method, measured.base_of(method)) or measured.domains_of(method)
    base = spread_over(measured.rows, "retention/mean", domains, measured.base_of(method)).mean
    score, kept = (spread_over(measured.rows, name, domains, method).mean for name in (SCORE, "retention/mean"))
    parts = []
    if base > 0 and not math.isnan(kept):
        parts.append(f"keeps {100 * kept / base:.1f} % of the base's retention ({number(kept)} of {number(base)})")
    if not math.isnan(gained):
        parts.append(f"reaches an adaptation score of {number(score)}, {_signed(gained, interval)} against the base")
    known = {row.domain for row in measured.rows if row.method == method and WIN_RATE in row.metrics}
    judged = [domain for domain in domains if domain in known]
    wins, sure = measured.win_rate(method, judged)
    if wins.n:
        ends = f" [{100 * sure.low:.0f}, {100 * sure.high:.0f}]" if sure else ""
        there = f" in {listed(judged)}" if len(judged) < len(domains) else ""
        parts.append(
            f"wins {100 * wins.mean:.0f} %{ends} of its answers{there} against the base's (a tie is half a win)"
        )
    where = f"{found}," if (found := _where(measured, domains)) else ""
    return f"{method}{where} {listed(parts)}." if parts else f"{method} was not measured."


def _where(measured: Measured, domains: Sequence[str]) -> str:
    """Which domains a sentence is about, unless it is about all."""
    return f", in {listed(domains)} only" if len(domains) < len(measured.domains) else ""


def _duel_sentence(measured: Measured, found: Duel) -> str:
    share = "" if math.isnan(found.share) else f", {100 * found.share:.0f} % of what {found.baseline} forgets"
    one_seed = all(len(measured.seeds(name)) == 1 for name in (found.method, found.baseline))
    return (
        f"{found.method} against {found.baseline}{_where(measured, found.domains)}: {_learnt(found)} "
        f"({_noise(found.adaptation, found.adaptation_interval, one_seed)}); degradation avoided "
        f"{_signed(found.avoided, found.avoided_interval)}{share} "
        f"({_noise(found.avoided, found.avoided_interval, one_seed)})."
    )


def _learnt(found: Duel) -> str:
    """Which method learnt more: a negative number would read as if something was unlearnt."""
    value, interval = found.adaptation, found.adaptation_interval
    if round(value, 3) == 0:
        return f"learnt the same, {_signed(value, interval)}"
    if value < 0:
        turned = replace(interval, low=-interval.high, high=-interval.low) if interval else None
        return f"{found.baseline} learnt {number(-value)} {bracket(turned)}".strip() + " more"
    return f"learnt {_signed(value, interval)}"


def _by_domain(measured: Measured, found: Duel) -> str:
    """A duel's differences in each domain, where the baseline is ahead in both, and what hangs on one domain."""
    values = {}
    for domain in found.domains:
        here = duel(measured, found.method, found.baseline, domain, intervals=False)
        if here is not None and not math.isnan(here.adaptation) and not math.isnan(here.avoided):
            values[domain] = (here.adaptation, here.avoided)
    if len(values) < 2:
        return ""
    each = ", ".join(f"{domain} {_signed(x, None)} and {_signed(y, None)}" for domain, (x, y) in values.items())
    text = f"{found.method} against {found.baseline} by domain, learnt and degradation avoided: {each}."
    top = max(values, key=lambda domain: values[domain][1] * math.copysign(1, found.avoided))
    rest = sum(y for domain, (_, y) in values.items() if domain != top) / (len(values) - 1)
    if abs(found.avoided) > 0 and rest * math.copysign(1, found.avoided) < abs(found.avoided) / 2:
        text += f" Most of the mean of what was avoided is from {top}: without it {_signed(rest, None)}."
    ahead = [domain for domain, (x, y) in values.items() if x <= 0 and y <= 0 and (x < 0 or y < 0)]
    if ahead:
        text += f" {found.baseline} has at least as much of both, and more of one, in {listed(ahead)}."
    return text


def _above_base(measured: Measured, method: str) -> bool:
    value, interval = adherence_gained(measured, method)
    return value > 0 and (interval is None or interval.low > 0)


def judge_sentences(measured: Measured, *, by_chance: bool | None = None) -> list[str]:
    """What a trained judge is worth, domain by domain.

    Args:
        measured: what it is of.
        by_chance: only of the judges that may (True) or cannot (False) decide by chance; None: of all.
    """
    result, intervals = [], judge_intervals(measured.rows)
    for domain in (domain for domain in measured.domains if domain in intervals):
        found, chance = intervals[domain], domain in measured.judged_by_chance
        if by_chance in (None, chance):
            left_out = ", which may be chance: its win rates are left out" if chance else ""
            result.append(
                f"{domain}: the judge of the answers agrees with {number(found.estimate)} {bracket(found)} of "
                f"{found.items} held-out pairs{left_out}."
            )
    return result


def undecided_sentences(measured: Measured) -> list[str]:
    """How many answers the judge left undecided, over all domains and seeds; nothing if none."""
    counts = {
        method: sum(row.metrics.get("adaptation/undecided", 0.0) for row in measured.rows if row.method == method)
        for method in measured.methods
    }
    each = [f"{method} {count:.0f}" for method, count in counts.items() if count]
    if not each:
        return []
    return [
        f"Answers that the judge left undecided, over all domains and seeds: {sum(counts.values()):.0f} "
        f"({', '.join(each)}). Win rates are over the others."
    ]


def distance_sentences(measured: Measured) -> list[str]:
    """Which methods moved so far from the base that they may have lost its abilities, by domain."""
    result = []
    for method in (m for m in measured.methods if kind(m) != "base"):
        for domain in measured.domains_of(method):
            kl = spread(measured.rows, "forgetting/kl_per_token", domain, method).mean
            if far := far_from_base(kl):
                result.append(f"{domain}: {method} is {far}.")
    return result


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


def _noise(value: float, interval: Interval | None, one_seed: bool) -> str:
    if math.isnan(value):
        return "not measured"
    if interval is None:
        return "noise unknown: no item scores"
    noise = "the item noise, one seed" if one_seed else "the noise"
    return f"larger than {noise}" if interval.excludes_zero else f"not larger than {noise}"
