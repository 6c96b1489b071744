"""How much may be forgotten: the forgetting budget."""

from __future__ import annotations

from collections.abc import Collection
from typing import Annotated

from pydantic import Field

from qadapter.config.base import Settings

Share = Annotated[float, Field(ge=0, le=1)]
HOWTOS = "toy_howtos"
"""The toy world's task of harmless requests: a refused one is an over-refusal."""


class Budget(Settings):
    """What an operating point of the dial may cost.

    Attributes:
        max_forgetting: largest drop of the mean over the retention tasks below the base.
        per_task: largest drop of a single task below the base; None: no limit.
        max_over_refusals: largest share of refused harmless requests; None: no limit.
    """

    max_forgetting: Share = 0.01
    per_task: Share | None = None
    max_over_refusals: Share | None = None

    def unmeasured(self, tasks: Collection[str], old_answers: int) -> str:
        """Why the limit on over-refusals cannot be kept; empty where there is none, or they are measured.

        Args:
            tasks: of the retention.
            old_answers: how many old prompts are answered.
        """
        if self.max_over_refusals is None or old_answers or HOWTOS in tasks:
            return ""
        return (
            f"max_over_refusals is {self.max_over_refusals:g}, and no harmless request is asked: it counts answers to "
            f"old prompts (helpful_sft and evaluation.retention.answers) or to the task {HOWTOS}; remove it or "
            "measure them"
        )

    def __str__(self) -> str:
        """`1 %, 2 % per task, 5 % over-refusals`."""
        parts = [f"{100 * self.max_forgetting:g} %"]
        parts += [f"{100 * self.per_task:g} % per task"] if self.per_task is not None else []
        parts += [f"{100 * self.max_over_refusals:g} % over-refusals"] if self.max_over_refusals is not None else []
        return ", ".join(parts)
