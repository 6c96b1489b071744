"""Verdicts on a policy's answers against its base's, whoever judges: win, tie, loss or undecided."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol

from qadapter.config.evaluation import Judge
from qadapter.preferences.pair import Message
from qadapter.toyworld.rules import follows_rule
from qadapter.toyworld.world import ToyWorld

Verdict = Literal["win", "tie", "loss", "undecided"]
WORTH: dict[str, float] = {"win": 1.0, "tie": 0.5, "loss": 0.0}
"""What a verdict adds to the wins; an undecided one counts in neither direction."""

Prompts = Sequence[Sequence[Message]]


class AnswerJudge(Protocol):
    """Whoever compares two answers to a prompt."""

    name: ClassVar[Judge]

    def verdicts(self, prompts: Prompts, base: Sequence[str], replies: Sequence[str]) -> list[Verdict]:
        """Whether each reply is better than the base's reply to the same prompt, n verdicts for n prompts."""

    def metrics(self) -> dict[str, float]:
        """How far the judge can be trusted and what it cost, under full metric names."""


@dataclass(frozen=True)
class RuleJudge:
    """The toy world's exact rule: the reply that follows it beats one that does not.

    Attributes:
        world: the world the prompts are about.
        style: a domain's style; None for harmless.
    """

    world: ToyWorld
    style: str | None
    name: ClassVar[Judge] = "rule"

    def verdicts(self, prompts: Prompts, base: Sequence[str], replies: Sequence[str]) -> list[Verdict]:
        """See `AnswerJudge`."""
        right, base_right = (follows_rule(self.world, self.style, prompts, answers) for answers in (replies, base))
        return [by_score(float(mine), float(its)) for mine, its in zip(right, base_right, strict=True)]

    def metrics(self) -> dict[str, float]:
        """Nothing: the rule is the truth."""
        return {}


def by_score(score: float, base_score: float) -> Verdict:
    """The verdict of two scores, higher is better."""
    return "win" if score > base_score else "loss" if score < base_score else "tie"


def judge_answers(
    judge: AnswerJudge | None, prompts: Prompts, base: Sequence[str], replies: Sequence[str], limit: int | None = None
) -> tuple[list[dict[str, Any]], dict[str, float]]:
    """Compare a policy's answers with the base's.

    Args:
        judge: asked about answers that differ; equal ones are a tie by definition. None: nobody judges.
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
