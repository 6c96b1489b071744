"""The judges, in the order in which the first that fits is the default. One line per judge."""

from __future__ import annotations

from qadapter.judging import endpoint, reward_model, rule
from qadapter.judging.kind import JudgeKind

JUDGES: tuple[JudgeKind, ...] = (
    rule.JUDGE,
    reward_model.JUDGE,
    endpoint.JUDGE,
)

NO_JUDGE = "none"
"""The word for `evaluation.adaptation.judge` where no judge compares the answers."""


def judge_names() -> list[str]:
    """What `evaluation.adaptation.judge` may say."""
    return [*(kind.name for kind in JUDGES), NO_JUDGE]


def find_judge(name: str) -> JudgeKind | None:
    """The judge of that name; None for `none`.

    Raises:
        KeyError: there is no such judge; a validated config names none of those.
    """
    return None if name == NO_JUDGE else {kind.name: kind for kind in JUDGES}[name]
