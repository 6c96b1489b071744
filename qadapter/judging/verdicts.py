"""Verdicts on a policy's answers against its base's, by any judge: win, tie, loss or undecided."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, Protocol

from qadapter.preferences.pair import Message

Verdict = Literal["win", "tie", "loss", "undecided"]
WORTH: dict[str, float] = {"win": 1.0, "tie": 0.5, "loss": 0.0}
"""What a verdict adds to the wins; an undecided one counts in neither direction."""

Prompts = Sequence[Sequence[Message]]

Compared = tuple[list[dict[str, Any]], dict[str, float]]
"""Rows of answers with verdicts, and metrics; see `judge_answers`."""


class AnswerJudge(Protocol):
    """A judge that compares two answers to a prompt.

    Attributes:
        name: the judge's word in a config.
        free: whether a verdict costs next to nothing, so that all answers are judged and not only the first few.
    """

    name: ClassVar[str]
    free: ClassVar[bool]

    def verdicts(self, prompts: Prompts, base: Sequence[str], replies: Sequence[str]) -> list[Verdict]:
        """Whether each reply is better than the base's reply to the same prompt, n verdicts for n prompts."""

    def metrics(self) -> dict[str, float]:
        """How far the judge can be trusted and what it cost, under full metric names."""


def by_score(score: float, base_score: float) -> Verdict:
    """The verdict of two scores, higher is better."""
    return "win" if score > base_score else "loss" if score < base_score else "tie"


def comparison(judge: AnswerJudge | None, limit: int) -> Callable[[Prompts, Sequence[str], Sequence[str]], Compared]:
    """`judge_answers` with its judge, for an evaluation that knows no judges.

    Args:
        judge: None for no judge.
        limit: how many answers a judge that is not free is asked about.
    """
    return partial(judge_answers, judge, limit=None if judge is None or judge.free else limit)


def judge_answers(
    judge: AnswerJudge | None, prompts: Prompts, base: Sequence[str], replies: Sequence[str], limit: int | None = None
) -> Compared:
    """Compare a policy's answers with the base's.

    Args:
        judge: asked about answers that differ; equal ones are a tie by definition. None: no answer is judged.
        prompts: n conversations.
        base, replies: n answers each.
        limit: only the first so many are judged.

    Returns:
        n rows for people to read, {prompt, base, reply, verdict, judge}, an unjudged one `undecided` by `none`; and
        `adaptation/win_rate` (share of wins, a tie counts one half; over the decided answers, absent if there are
        none), `adaptation/ties` and `adaptation/undecided` (numbers of answers), and what the judge says of itself.
    """
    judged = len(prompts[:limit]) if judge else 0
    verdicts: list[Verdict] = ["tie" if i < judged else "undecided" for i in range(len(prompts))]
    differ = [i for i in range(judged) if base[i].strip() != replies[i].strip()]
    if judge and differ:
        asked = judge.verdicts([prompts[i] for i in differ], [base[i] for i in differ], [replies[i] for i in differ])
        for i, verdict in zip(differ, asked, strict=True):
            verdicts[i] = verdict
    rows = [
        {
            "prompt": list(prompt),
            "base": before,
            "reply": reply,
            "verdict": verdict,
            "judge": judge.name if judge and i < judged else "none",
        }
        for i, (prompt, before, reply, verdict) in enumerate(zip(prompts, base, replies, verdicts, strict=True))
    ]
    metrics = {**verdict_metrics(verdicts[:judged]), **judge.metrics()} if judge else {}
    return rows, metrics


def verdict_metrics(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Win rate, ties and undecided of some verdicts; see `judge_answers`."""
    worth = [WORTH[verdict] for verdict in verdicts if verdict in WORTH]
    return {
        **({"adaptation/win_rate": sum(worth) / len(worth)} if worth else {}),
        "adaptation/ties": float(verdicts.count("tie")),
        "adaptation/undecided": float(verdicts.count("undecided")),
    }
