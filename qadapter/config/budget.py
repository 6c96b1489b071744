"""How much may be forgotten: the forgetting budget."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from qadapter.config.base import Settings

Share = Annotated[float, Field(ge=0, le=1)]


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

    def __str__(self) -> str:
        """`1 %, 2 % per task, 5 % over-refusals`."""
        parts = [f"{100 * self.max_forgetting:g} %"]
        parts += [f"{100 * self.per_task:g} % per task"] if self.per_task is not None else []
        parts += [f"{100 * self.max_over_refusals:g} % over-refusals"] if self.max_over_refusals is not None else []
        return ", ".join(parts)
