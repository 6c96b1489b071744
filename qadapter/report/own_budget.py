"""Each method's operating point under the budget that the profile names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from qadapter.config.budget import Budget
from qadapter.evaluation.curve.budget import Choice, choose_on
from qadapter.report.budget import MethodCurve, kinds_of, label_of
from qadapter.report.tables import Cell, Table, bracket, number

LEGEND = (
    "The value that learnt most within the budget on one half of the items, measured on the other half. *kept to*: "
    "`surely` where the whole interval of what was forgotten, of each task where these have a limit, lies within the "
    "budget; else how far an interval reaches beyond it; where no value above 0 stays within the budget, by how much "
    "the nearest exceeds it."
)


def budget_of(config: Mapping[str, Any]) -> Budget | None:
    """The budget that an experiment's settings name."""
    found = (config.get("evaluation") or {}).get("budget")
    return None if found is None else Budget.model_validate(found)


def own_budget_table(curves: Sequence[MethodCurve], budget: Budget | None) -> Table | None:
    """A row per domain, method and kind; None where there is no budget or no curve."""
    if budget is None or not curves:
        return None
    many = len(kinds_of(curves)) > 1
    rows = []
    for one in curves:
        found = choose_on(*one.parts, budget)
        cells = (
            Cell(number(found.adaptation.estimate), bracket(found.adaptation)),
            Cell(f"{found.value:g}"),
            Cell(number(found.forgetting.estimate), bracket(found.forgetting)),
            Cell(_kept_to(found)),
        )
        rows.append((label_of(one.domain, one, many), cells))
    columns = ("adaptation", "dial", "forgotten", "kept to")
    return Table("domain · method" + (" · dial" if many else ""), ((f"budget {budget}", 4),), columns, tuple(rows))


def _kept_to(found: Choice) -> str:
    if found.nearest is not None:
        return f"no: {found.nearest[0]:g} exceeds it by {found.nearest[1]:.4f}"
    return "surely" if found.sure else f"perhaps: {found.beyond:.4f} beyond"
