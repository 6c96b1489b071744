"""Methods compared along their dial: curves, adaptation at a forgetting budget, area under the front."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import fmean

from qadapter.config.budget import Budget
from qadapter.errors import QAdapterError
from qadapter.evaluation.curve.area import area_interval, mean_area_interval
from qadapter.evaluation.curve.budget import Choice, choose_on
from qadapter.evaluation.curve.parts import Part, mean_adaptation, mean_difference, mean_forgetting, split_curves
from qadapter.evaluation.curve.points import CURVE, Curve, read_curves
from qadapter.evaluation.statistics import Interval, signed
from qadapter.methods.table import SUBJECT
from qadapter.policy.dial import KINDS, DialKind
from qadapter.report.rows import Row, groups_of, listed, methods_of, ordered
from qadapter.report.tables import Cell, Table, bracket, number

BUDGETS = (0.005, 0.01, 0.02, 0.05)
"""Shares of the retention tasks' mean that may be forgotten."""
_MANY = 6
"""Methods, beyond which a sentence no longer tells each one's numbers; the tables do."""
LEGEND = (
    "Each method at the value of its dial (0 is the base, 1 the policy as trained) that learnt most within the budget. "
    "The value is chosen on one half of the held-out pairs and benchmark items and everything shown is measured on the "
    "other half (split `dial-1`, by content). In brackets: 95 % intervals over items and seeds. A star: the whole "
    "interval of what was forgotten lies within the budget. *area*: adaptation that is reached, averaged over all "
    "budgets from 0 to 5 %. Outside of a toy world *adaptation* is here the share of held-out pairs whose chosen reply "
    "has the higher log-probability per token, which the base has too, and not the implied reward of the main table."
)
VALUES_LEGEND = (
    "Adaptation / retention at each value of the dial that all methods were measured at, mean over seeds, on all "
    "items. *q-weight*: base logits plus the weight times the difference that the policy makes. *scale*: the adapter "
    "multiplied by it. *adaptation*: as at equal budgets."
)


@dataclass(frozen=True)
class MethodCurve:
    """The curves of one method in one domain along one kind of dial, over its seeds.

    Attributes:
        curves: one for each seed.
        seeds: of the trainings.
    """

    domain: str
    method: str
    kind: DialKind
    curves: tuple[Curve, ...]
    seeds: tuple[int | None, ...]

    @property
    def metric(self) -> str:
        """Where its metrics stand."""
        return _metric(self.domain, self.method, self.kind)

    @cached_property
    def parts(self) -> tuple[Part, Part]:
        """The part that a dial is chosen on, and the part that is reported."""
        return split_curves(self.curves)

    @cached_property
    def choices(self) -> dict[float, Choice]:
        """The operating point under each of `BUDGETS`."""
        return {budget: choose_on(*self.parts, Budget(max_forgetting=budget)) for budget in BUDGETS}

    def at(self, budget: float) -> Choice:
        """The operating point under one of `BUDGETS`."""
        return self.choices[budget]

    @cached_property
    def area(self) -> Interval:
        """Area under the front."""
        return area_interval(*self.parts)

    def mean(self, value: float) -> tuple[float, float]:
        """Adaptation and retention at a value, mean over seeds, on all items."""
        points = [next(point for point in curve.points if point.value == value) for curve in self.curves]
        return fmean(point.learnt.mean for point in points), fmean(point.retention for point in points)


def _suffix(kind: DialKind) -> str:
    return "" if kind == "q-weight" else f"/{kind}"


def curves_of(rows: Sequence[Row]) -> list[MethodCurve]:
    """The curves behind the rows, by domain, method and kind; those whose items cannot be split are left out."""
    found = []
    for domain in ordered(row.domain for row in rows):
        for method in methods_of(row for row in rows if row.domain == domain):
            own = [row for row in rows if (row.domain, row.method) == (domain, method)]
            curves = [
                (row.seed, curve)
                for row in own
                if row.curve and (row.curve / CURVE).is_file()
                for curve in read_curves(row.curve)
            ]
            for kind in ordered(curve.kind for _, curve in curves):
                seeds, of_kind = zip(*(pair for pair in curves if pair[1].kind == kind), strict=True)
                one = MethodCurve(domain, method, kind, of_kind, seeds)  # type: ignore[arg-type]
                try:
                    _ = one.parts
                except QAdapterError:  # too few items in a half
                    continue
                found.append(one)
    return found


def kinds_of(curves: Sequence[MethodCurve]) -> list[DialKind]:
    """The kinds of dial that were measured."""
    found = {one.kind for one in curves}
    return [kind for kind in KINDS[::-1] if kind in found]


def over_domains(curves: Sequence[MethodCurve]) -> list[list[MethodCurve]]:
    """For each method and kind its curves in all domains; those that lack a domain or a seed are left out."""
    domains = ordered(one.domain for one in curves)
    found = []
    for kind in kinds_of(curves):
        for method in ordered(one.method for one in curves):
            own = [one for one in curves if (one.method, one.kind) == (method, kind)]
            if len(own) == len(domains) and len({one.seeds for one in own}) == 1:
                found.append(own)
    return found


def budget_table(curves: Sequence[MethodCurve]) -> Table | None:
    """A row per domain, method and kind: adaptation, dial and forgetting at each budget, and the area.

    With several domains each method has a row of its means over them as well. None without curves.
    """
    if not curves:
        return None
    many = len(kinds_of(curves)) > 1
    rows = []
    for one in curves:
        cells = []
        for budget in BUDGETS:
            found = one.at(budget)
            cells += [
                Cell(number(found.adaptation.estimate), bracket(found.adaptation), sure=found.sure),
                Cell(f"{found.value:g}"),
                Cell(number(found.forgetting.estimate), bracket(found.forgetting)),
            ]
        rows.append((label_of(one.domain, one, many), (*cells, Cell(number(one.area.estimate), bracket(one.area)))))
    if len({one.domain for one in curves}) > 1:
        for own in over_domains(curves):
            cells = []
            for budget in BUDGETS:
                choices = [one.at(budget) for one in own]
                learnt, lost = means_of(own, choices)
                cells += [
                    Cell(number(learnt.estimate), bracket(learnt), sure=lost.high <= budget),
                    Cell(f"{fmean(choice.value for choice in choices):.2f}"),
                    Cell(number(lost.estimate), bracket(lost)),
                ]
            area = mean_area_interval([one.parts for one in own])
            rows.append((label_of("mean", own[0], many), (*cells, Cell(number(area.estimate), bracket(area)))))
    groups = (*((f"budget {100 * budget:g} %", 3) for budget in BUDGETS), ("front", 1))
    columns = (*("adaptation", "dial", "forgotten") * len(BUDGETS), "area")
    return Table("domain · method" + (" · dial" if many else ""), groups, columns, tuple(rows), _sections(curves))


def _sections(curves: Sequence[MethodCurve]) -> tuple[tuple[str, int], ...]:
    """Where there are many methods: a heading per domain and kind of method."""
    domains = ordered(one.domain for one in curves)
    shown = {name: [one.method for one in curves if one.domain == name] for name in domains}
    if len(domains) > 1:
        shown["mean"] = [own[0].method for own in over_domains(curves)]
    found = {name: groups_of(methods) for name, methods in shown.items()}
    if not all(found[name] for name, methods in shown.items() if methods):
        return ()
    return tuple((f"{name}: {group}", count) for name, groups in found.items() for group, count in groups)


def label_of(domain: str, one: MethodCurve, many: bool) -> str:
    """`academy · dpo`, with the kind of dial where there are several."""
    return f"{domain} · {one.method}" + (f" · {one.kind}" if many else "")


def means_of(own: Sequence[MethodCurve], choices: Sequence[Choice]) -> tuple[Interval, Interval]:
    """Adaptation and forgetting of one method, mean over domains, each at its own operating point."""
    reported, places = [one.parts[1] for one in own], [choice.place for choice in choices]
    return mean_adaptation(reported, places), mean_forgetting(reported, places)


def values_table(curves: Sequence[MethodCurve]) -> Table | None:
    """A row per domain and method: adaptation / retention at each value that all were measured at; None: no curves."""
    if not curves:
        return None
    kinds = kinds_of(curves)
    common = {
        kind: set.intersection(
            *({point.value for point in curve.points} for one in curves if one.kind == kind for curve in one.curves)
        )
        for kind in kinds
    }
    shown: list[tuple[DialKind, float]] = [(kinds[0], 0.0), (kinds[0], 1.0)]
    shown += [(kind, value) for kind in kinds for value in sorted(common[kind] - {0.0, 1.0})]
    of = {(one.domain, one.method, one.kind): one for one in curves}
    domains = ordered(one.domain for one in curves)
    rows, means = [], []
    for method in ordered(one.method for one in curves):
        for domain in domains:
            numbers = [of[at].mean(value) if (at := (domain, method, kind)) in of else None for kind, value in shown]
            if any(numbers):
                rows.append((domain, (f"{domain} · {method}", tuple(_pair(found) for found in numbers))))
        if len(domains) > 1:
            cells = []
            for kind, value in shown:
                own = [of[domain, method, kind].mean(value) for domain in domains if (domain, method, kind) in of]
                whole = len(own) == len(domains)
                cells.append(_pair((fmean(a for a, _ in own), fmean(b for _, b in own)) if whole else None))
            means.append((f"mean · {method}", tuple(cells)))
    by_domain = [row for domain in domains for of_domain, row in rows if of_domain == domain]
    groups = (("", 2), *((kind, len(common[kind]) - 2) for kind in kinds if len(common[kind]) > 2))
    columns = ("base", "as trained", *(f"{value:g}" for _, value in shown[2:]))
    return Table("domain · method", groups, columns, (*by_domain, *means))


def _pair(found: tuple[float, float] | None) -> Cell:
    return Cell("–" if found is None else f"{number(found[0])} / {number(found[1])}")


def budget_metrics(curves: Sequence[MethodCurve]) -> dict[str, float]:
    """`curve/<domain>/<method>/adaptation_at_<budget>` with its interval, dial and forgetting, and the area.

    Means over several domains are those of the domain `mean`; those of the scale are under `<method>/scale`.
    """
    found: dict[str, float] = {}
    for one in curves:
        for budget in BUDGETS:
            choice, key = one.at(budget), f"{one.metric}/adaptation_at_{100 * budget:g}_percent"
            found |= _interval_metrics(key, choice.adaptation)
            found |= {f"{key}/dial": choice.value, f"{key}/forgetting": choice.forgetting.estimate}
        found |= _interval_metrics(f"{one.metric}/area", one.area)
    if len({one.domain for one in curves}) > 1:
        for own in over_domains(curves):
            name = _metric("mean", own[0].method, own[0].kind)
            for budget in BUDGETS:
                learnt, lost = means_of(own, [one.at(budget) for one in own])
                key = f"{name}/adaptation_at_{100 * budget:g}_percent"
                found |= {**_interval_metrics(key, learnt), f"{key}/forgetting": lost.estimate}
            found |= _interval_metrics(f"{name}/area", mean_area_interval([one.parts for one in own]))
    return found


def _metric(domain: str, method: str, kind: DialKind) -> str:
    """The beginning of a metric's name."""
    return f"curve/{domain}/{method}{_suffix(kind)}"


def _interval_metrics(name: str, interval: Interval) -> dict[str, float]:
    return {name: interval.estimate, f"{name}/low": interval.low, f"{name}/high": interval.high}


def budget_sentences(curves: Sequence[MethodCurve], budget: float = 0.01) -> list[str]:
    """Which methods learnt most at one budget, how far the Q-Adapter is ahead, and what a dial takes back."""
    kinds, sentences = kinds_of(curves), []
    for kind in kinds:
        of_kind = [one for one in curves if one.kind == kind]
        along = f" (dial {kind})" if len(kinds) > 1 else ""
        domains = ordered(one.domain for one in of_kind)
        sentences += _ahead(of_kind, budget, along)
        if kind != kinds[0] and len(domains) > 1:
            continue  # the table has them
        for domain in domains:
            here = {one.method: one.at(budget) for one in of_kind if one.domain == domain}
            if not any(found.value for found in here.values()):
                sentences.append(f"{domain}, at most {100 * budget:g} % forgotten{along}: no method leaves its base.")
                continue
            best = max(found.adaptation.estimate for found in here.values())
            ahead = [method for method, found in here.items() if found.adaptation.estimate >= best - 1e-9]
            unsure = [
                method
                for method, found in here.items()
                if method not in ahead and found.adaptation.high >= min(here[m].adaptation.low for m in ahead)
            ]
            others = f"; not surely behind: {listed(unsure)}" if unsure else ""
            sentences.append(
                f"{domain}, at most {100 * budget:g} % forgotten{along}: {listed(ahead)} "
                f"{'learns' if len(ahead) == 1 else 'learn'} most, adaptation {best:.3f}{others}."
            )
    sentences += _behind([one for one in curves if one.kind == kinds[0]]) + _not_shared(curves)
    return sentences + [sentence for kind in kinds for sentence in _overshoot(curves, kind, budget, len(kinds) > 1)]


def _not_shared(curves: Sequence[MethodCurve]) -> list[str]:
    """That values which a curve chose for one seed alone cannot be chosen for the method."""
    lacking = []
    for one in curves:
        measured = {point.value for curve in one.curves for point in curve.points}
        if left := len(measured) - len(one.parts[0].values):
            lacking.append((left, len(measured), f"{one.domain} · {one.method}"))
    if not lacking:
        return []
    left, of, name = max(lacking)
    return [
        "At equal budgets, values of the dial that not every seed was measured at cannot be chosen: in "
        f"{len(lacking)} of {len(curves)} curves, {left} of {of} for {name}. "
        "`evaluation.curve.values` measures the same for every seed."
    ]


def _behind(curves: Sequence[MethodCurve]) -> list[str]:
    """The methods that another one beats surely at every budget: their intervals of adaptation do not meet."""
    sentences = []
    for domain in ordered(one.domain for one in curves):
        here = {one.method: [one.at(budget).adaptation for budget in BUDGETS] for one in curves if one.domain == domain}
        lowest = [max(found[place].low for found in here.values()) for place in range(len(BUDGETS))]
        beaten = [
            method
            for method, found in here.items()
            if all(one.high < low for one, low in zip(found, lowest, strict=True))
        ]
        if beaten and len(here) > 2:
            sentences.append(f"{domain}, surely behind another method at every budget: {listed(beaten)}.")
    return sentences


def _ahead(curves: Sequence[MethodCurve], budget: float, along: str) -> list[str]:
    """How far the Q-Adapter is ahead of each method at equal budgets, mean over domains."""
    means = {own[0].method: own for own in over_domains(curves)}
    ours = means.pop(SUBJECT.name, None)
    if not ours or not means:
        return []
    found = {method: ahead_of(ours, theirs, budget) for method, theirs in means.items()}
    if len(found) > _MANY:
        differences = _by_verdict(found)
    else:
        differences = "; ".join(f"{method} {difference_text(ahead)}" for method, ahead in found.items())
    where = f"mean over {len(ours)} domains" if len(ours) > 1 else ours[0].domain
    return [
        f"At most {100 * budget:g} % forgotten, {where}{along}: adaptation of {SUBJECT.name} minus that of "
        f"{differences}."
    ]


def _by_verdict(found: Mapping[str, Interval]) -> str:
    """Many differences in one sentence: those larger than the noise, one by one, and the range of the others."""
    sure = [f"{method} {signed(one.estimate)} {bracket(one)}" for method, one in found.items() if one.excludes_zero]
    unsure = {method: one.estimate for method, one in found.items() if not one.excludes_zero}
    parts = [f"{', '.join(sure)}: larger than the noise"] if sure else []
    if unsure:
        ends = dict.fromkeys(signed(end) for end in (min(unsure.values()), max(unsure.values())))
        parts.append(f"{listed(list(unsure))} {' to '.join(ends)}: not larger than the noise")
    return "; ".join(parts)


def ahead_of(ours: Sequence[MethodCurve], theirs: Sequence[MethodCurve], budget: float) -> Interval:
    """How much more one method learnt than another at equal budgets, mean over the same domains.

    Over the seeds that both have; over each one's mean where they have none in common.
    """
    common = [seed for seed in ours[0].seeds if all(seed in one.seeds for one in (*ours, *theirs))]

    def reported(own: Sequence[MethodCurve]) -> tuple[list[Part], list[int]]:
        parts = [one.parts[1].over([one.seeds.index(seed) for seed in common]) for one in own]
        return parts, [one.at(budget).place for one in own]

    return mean_difference(*reported(ours), *reported(theirs))


def difference_text(found: Interval) -> str:
    """A difference with its interval, and whether it is larger than its noise."""
    verdict = "larger than the noise" if found.excludes_zero else "not larger than the noise"
    return f"{signed(found.estimate)} {bracket(found)}, {verdict}"


def _overshoot(curves: Sequence[MethodCurve], kind: DialKind, budget: float, many: bool) -> list[str]:
    """Policies that forgot more than the budget as trained and stay within it at a smaller dial without a loss.

    All three on the part that is reported: a dial that stays within the budget where it was chosen can exceed it here.
    """
    saved: list[tuple[MethodCurve, int]] = []  # with the place of the policy as trained
    for one in curves:
        if one.kind != kind:
            continue
        _, reported = one.parts
        last, found = reported.values.index(1.0), one.at(budget)
        before, after = reported.adaptation(last), found.adaptation.estimate
        within = found.forgetting.estimate <= budget < reported.forgetting(last)
        if within and 0 < found.value < 1 and after >= before - 1e-9:
            saved.append((one, last))
    if not saved:
        return []
    which = f"the dial {kind}" if many else "the dial"
    if len(saved) > _MANY:
        short: dict[str, list[str]] = {}
        for one, last in saved:
            lost, kept = one.parts[1].forgetting(last), one.at(budget).forgetting.estimate
            short.setdefault(one.domain, []).append(f"{one.method} {lost:.3f} → {kept:.3f}")
        each = "; ".join(f"{domain}: {', '.join(texts)}" for domain, texts in short.items())
        return [f"What {which} takes back at no cost in adaptation (forgotten as trained → with it): {each}."]
    long = []
    for one, last in saved:
        reported, found = one.parts[1], one.at(budget)
        long.append(
            f"{one.domain} · {one.method} (forgotten {reported.forgetting(last):.3f} as trained, "
            f"{found.forgetting.estimate:.3f} at {found.value:g}; adaptation {reported.adaptation(last):.3f} and "
            f"{found.adaptation.estimate:.3f})"
        )
    return [f"What {which} takes back at no cost in adaptation: {listed(long)}."]
