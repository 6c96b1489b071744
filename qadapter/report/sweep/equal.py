"""The methods of a sweep at equal forgetting budgets, each with its best setting and dial there."""

from __future__ import annotations

from collections.abc import Sequence

from qadapter.methods.table import SUBJECT
from qadapter.policy.dial import DialKind
from qadapter.report import markdown
from qadapter.report.budget import (
    BUDGETS,
    MethodCurve,
    ahead_of,
    difference_text,
    kinds_of,
    means_of,
    over_domains,
)
from qadapter.report.rows import ordered
from qadapter.report.sweep.points import Setting
from qadapter.report.tables import Cell, Table, bracket, number

_LEGEND = (
    "For each method and budget the setting, and for each domain the value of its dial, that learnt most within the "
    "budget, mean over domains. Both are chosen on one half of the held-out pairs and benchmark items and everything "
    "shown is measured on the other half. In brackets: 95 % intervals over items and seeds. A star: the whole interval "
    "of what was forgotten lies within the budget."
)
Chosen = dict[float, list[MethodCurve]]
"""Budget → the curves, one for each domain, of the chosen setting."""


def equal_budgets_section(
    curves: Sequence[MethodCurve], settings: Sequence[Setting]
) -> tuple[list[str], dict[str, float]]:
    """The section of the report, and its metrics; empty where no tuned setting has a curve.

    Args:
        curves: of the trained settings; their `method` is the setting's name.
        settings: all settings of the sweep.
    """
    parts: list[str] = []
    metrics: dict[str, float] = {}
    kinds = kinds_of(curves)
    for kind in kinds:
        chosen = _chosen([one for one in curves if one.kind == kind], settings)
        if not chosen:
            continue
        if len(kinds) > 1:
            parts.append(f"### Dial {kind}")
        parts += [markdown.table(_table(chosen)), *_differences(chosen, kind, metrics)]
        for method, at in chosen.items():
            for budget, own in at.items():
                learnt, lost = means_of(own, [one.at(budget) for one in own])
                key = f"{_name(kind)}/{method}/adaptation_at_{100 * budget:g}_percent"
                metrics |= {key: learnt.estimate, f"{key}/low": learnt.low, f"{key}/high": learnt.high}
                metrics[f"{key}/forgetting"] = lost.estimate
    return (["## The methods at equal forgetting budgets", *parts, _LEGEND] if parts else []), metrics


def _name(kind: DialKind) -> str:
    return "sweep/equal" if kind == "q-weight" else f"sweep/equal/{kind}"


def _chosen(curves: Sequence[MethodCurve], settings: Sequence[Setting]) -> dict[str, Chosen]:
    """Method → budget → the tuned setting that learnt most on the selection part."""
    whole = {own[0].method: own for own in over_domains(curves)}
    found: dict[str, Chosen] = {}
    for method in ordered(setting.method for setting in settings):
        own = [whole[s.name] for s in settings if s.method == method and s.tuning and s.name in whole]
        if own:
            found[method] = {budget: max(own, key=lambda one: _expected(one, budget)) for budget in BUDGETS}
    return found


def _expected(own: Sequence[MethodCurve], budget: float) -> tuple[float, float]:
    """What a setting learnt, and did not forget, on the selection part."""
    expected = [one.at(budget).expected for one in own]
    return sum(learnt for learnt, _ in expected), -sum(lost for _, lost in expected)


def _table(chosen: dict[str, Chosen]) -> Table:
    rows = []
    for method, at in chosen.items():
        cells: list[Cell] = []
        for budget, own in at.items():
            choices = [one.at(budget) for one in own]
            learnt, lost = means_of(own, choices)
            dials = ", ".join(f"{choice.value:g}" for choice in choices)
            cells += [
                Cell(number(learnt.estimate), bracket(learnt), sure=lost.high <= budget),
                Cell(f"{own[0].method}, dial {dials}"),
                Cell(number(lost.estimate), bracket(lost)),
            ]
        rows.append((method, tuple(cells)))
    groups = tuple((f"budget {100 * budget:g} %", 3) for budget in BUDGETS)
    return Table("method", groups, ("adaptation", "setting", "forgotten") * len(BUDGETS), tuple(rows))


def _differences(chosen: dict[str, Chosen], kind: DialKind, metrics: dict[str, float]) -> list[str]:
    """How far the Q-Adapter is ahead of each other method, at each budget."""
    ours = chosen.get(SUBJECT.name)
    if ours is None or len(chosen) < 2:
        return []
    lines = []
    for method, theirs in chosen.items():
        if method == SUBJECT.name:
            continue
        texts = []
        for budget in BUDGETS:
            found = ahead_of(ours[budget], theirs[budget], budget)
            metrics[f"{_name(kind)}/difference_at_{100 * budget:g}_percent/{method}"] = found.estimate
            texts.append(f"at {100 * budget:g} % {difference_text(found)}")
        lines.append(f"- {SUBJECT.name} − {method}: {'; '.join(texts)}.")
    return ["\n".join(lines)]
