"""Methods compared along their dial: curves, adaptation at a forgetting budget, area under the front."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from qadapter.config.budget import Budget
from qadapter.errors import QAdapterError
from qadapter.evaluation.curve.budget import Choice, Part, area_interval, choose_on, split_curves
from qadapter.evaluation.curve.points import CURVE, Curve
from qadapter.evaluation.statistics import Interval
from qadapter.report.rows import Row, listed, methods_of, ordered
from qadapter.report.tables import Cell, Table, bracket, number

BUDGETS = (0.005, 0.01, 0.02, 0.05)
"""Shares of the retention tasks' mean that may be forgotten."""
LEGEND = (
    "Each method at the value of its dial (weight on Q: 0 is the base, 1 the policy as trained) that learnt most "
    "within the budget. The value is chosen on one half of the held-out pairs and benchmark items and everything shown "
    "is measured on the other half (split `dial-1`, by content). In brackets: 95 % intervals over items and seeds. A "
    "star: the whole interval of what was forgotten lies within the budget. *area*: adaptation that is reached, "
    "averaged over all budgets from 0 to 5 %."
)


@dataclass(frozen=True)
class MethodCurve:
    """The curves of one method in one domain, over its seeds."""

    domain: str
    method: str
    curves: tuple[Curve, ...]

    @cached_property
    def parts(self) -> tuple[Part, Part]:
        """The part that a dial is chosen on, and the part that is reported."""
        return split_curves(self.curves)

    def at(self, budget: float) -> Choice:
        """The operating point under a budget."""
        return choose_on(*self.parts, Budget(max_forgetting=budget))

    @cached_property
    def area(self) -> Interval:
        """Area under the front."""
        return area_interval(*self.parts)


def curves_of(rows: Sequence[Row]) -> list[MethodCurve]:
    """The curves behind the rows, by domain and method; those whose items cannot be split are left out."""
    found = []
    for domain in ordered(row.domain for row in rows):
        for method in methods_of(row for row in rows if row.domain == domain):
            folders = [row.curve for row in rows if (row.domain, row.method) == (domain, method) and row.curve]
            curves = tuple(Curve.read(folder) for folder in folders if (folder / CURVE).is_file())
            if not curves:
                continue
            one = MethodCurve(domain, method, curves)
            try:
                _ = one.parts
            except QAdapterError:  # too few items in a half
                continue
            found.append(one)
    return found


def budget_table(curves: Sequence[MethodCurve]) -> Table | None:
    """A row per domain and method: adaptation, dial and forgetting at each budget, and the area; None: no curves."""
    if not curves:
        return None
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
        rows.append((f"{one.domain} · {one.method}", (*cells, Cell(number(one.area.estimate), bracket(one.area)))))
    groups = (*((f"budget {100 * budget:g} %", 3) for budget in BUDGETS), ("front", 1))
    columns = (*("adaptation", "dial", "forgotten") * len(BUDGETS), "area")
    return Table("domain · method", groups, columns, tuple(rows))


def budget_metrics(curves: Sequence[MethodCurve]) -> dict[str, float]:
    """`curve/<domain>/<method>/adaptation_at_<budget>` with its interval, dial and forgetting, and the area."""
    found: dict[str, float] = {}
    for one in curves:
        name = f"curve/{one.domain}/{one.method}"
        for budget in BUDGETS:
            choice, key = one.at(budget), f"{name}/adaptation_at_{100 * budget:g}_percent"
            found |= {
                key: choice.adaptation.estimate,
                f"{key}/low": choice.adaptation.low,
                f"{key}/high": choice.adaptation.high,
                f"{key}/dial": choice.value,
                f"{key}/forgetting": choice.forgetting.estimate,
            }
        found |= {
            f"{name}/area": one.area.estimate,
            f"{name}/area/low": one.area.low,
            f"{name}/area/high": one.area.high,
        }
    return found


def budget_sentences(curves: Sequence[MethodCurve], budget: float = 0.01) -> list[str]:
    """For each domain which method learnt most at one budget, and where a dial takes back what training overshot."""
    sentences = []
    for domain in ordered(one.domain for one in curves):
        here = {one.method: one.at(budget) for one in curves if one.domain == domain}
        best = max(found.adaptation.estimate for found in here.values())
        ahead = [method for method, found in here.items() if found.adaptation.estimate >= best - 1e-9]
        unsure = [
            method
            for method, found in here.items()
            if method not in ahead and found.adaptation.high >= min(here[m].adaptation.low for m in ahead)
        ]
        others = f"; not surely behind: {listed(unsure)}" if unsure else ""
        sentences.append(
            f"{domain}, at most {100 * budget:g} % forgotten: {listed(ahead)} "
            f"{'learns' if len(ahead) == 1 else 'learn'} most, adaptation {best:.3f}{others}."
        )
    return sentences + _overshoot(curves, budget)


def _overshoot(curves: Sequence[MethodCurve], budget: float) -> list[str]:
    """Policies that forgot more than the budget as trained and stay within it at a smaller dial without a loss."""
    saved = []
    for one in curves:
        _, reported = one.parts
        last, found = len(reported.values) - 1, one.at(budget)
        before, after = reported.adaptation(last), found.adaptation.estimate
        if reported.forgetting(last) > budget and found.value > 0 and after >= before - 0.01:
            saved.append(
                f"{one.domain} · {one.method} (forgotten {reported.forgetting(last):.3f} as trained, "
                f"{found.forgetting.estimate:.3f} at {found.value:g}; adaptation {before:.3f} and {after:.3f})"
            )
    if not saved:
        return []
    return [f"What the dial takes back at no cost in adaptation: {listed(saved)}."]
