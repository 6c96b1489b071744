"""Settings of the curve: how many points of each adapter's dial are measured."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from qadapter.config.base import NonNegative, Settings


class CurveSettings(Settings):
    """Measure each adapter at several weights on Q between its base (0) and itself as trained (1).

    Attributes:
        points: how many, both ends among them.
        steps: the weights are multiples of 1/steps; likelihoods are computed for all of them in one pass.
        resolution: two neighbours whose adaptation and retention differ by no more than this are not divided further.
    """

    points: Annotated[int, Field(ge=2, le=33)] = 5
    steps: Annotated[int, Field(ge=2, le=32)] = 16
    resolution: NonNegative = 0.0

    @property
    def grid(self) -> tuple[float, ...]:
        """The weights, from 0 to 1."""
        return tuple(step / self.steps for step in range(self.steps + 1))
