"""The toy world's exact rule as judge: it costs nothing and is always right."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

from qadapter.judging.kind import Case, JudgeKind, Material
from qadapter.judging.verdicts import Prompts, Verdict, by_score
from qadapter.toyworld.rules import follows_rule
from qadapter.toyworld.world import ToyWorld


@dataclass(frozen=True)
class RuleJudge:
    """The reply that follows the rule beats one that does not.

    Attributes:
        world: the world the prompts are about.
        style: a domain's style; None for harmless.
    """

    world: ToyWorld
    style: str | None
    name: ClassVar[str] = "rule"
    free: ClassVar[bool] = True

    def verdicts(self, prompts: Prompts, base: Sequence[str], replies: Sequence[str]) -> list[Verdict]:
        """See `AnswerJudge`."""
        right, base_right = (follows_rule(self.world, self.style, prompts, answers) for answers in (replies, base))
        return [by_score(float(mine), float(its)) for mine, its in zip(right, base_right, strict=True)]

    def metrics(self) -> dict[str, float]:
        """Nothing: the rule is the truth."""
        return {}


def _contradictions(case: Case) -> Iterable[str]:
    if case.asked and not case.toy_world:
        yield "evaluation.adaptation.judge: 'rule' is a toy world's; expected 'reward-model', 'endpoint' or 'none'"


def _open(case: Case, material: Material) -> RuleJudge:
    if material.world is None:
        raise ValueError("The rule judges answers about a toy world, and none was given.")
    return RuleJudge(ToyWorld.read(material.world), case.style)


JUDGE = JudgeKind(
    name=RuleJudge.name,
    open=_open,
    is_default=lambda case: case.toy_world,
    contradictions=_contradictions,
)
