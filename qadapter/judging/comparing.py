"""Measure what a policy learnt with its answers judged: one function that a process of its own can call.

The evaluation itself knows no judges, and a judge that is open cannot be passed to another process.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qadapter.evaluation.measure import measure_adaptation
from qadapter.judging.verdicts import AnswerJudge, comparison

if TYPE_CHECKING:
    from qadapter.judging.kind import Case, Material


def measure_judged(
    open_judge: Callable[[Case, Material], AnswerJudge] | None,
    case: Case | None,
    material: Material | None,
    limit: int,
    *positional: Any,
    out: Path,
    scratch: Path | None = None,
    **named: Any,
) -> None:
    """`measure_adaptation` with the comparison of a judge, which is opened when the first answers are compared.

    Args:
        open_judge, case, material: of the judge's table (`qadapter.judging.kind`); None for no judge.
        limit: how many answers a judge that is not free is asked about.
        positional, out, scratch, named: as `measure_adaptation` takes them.
    """

    def compare(*answers: Any) -> Any:
        judge = open_judge(case, material) if open_judge and case and material else None
        return comparison(judge, limit)(*answers)

    measure_adaptation(*positional, compare=compare, out=out, scratch=scratch, **named)
