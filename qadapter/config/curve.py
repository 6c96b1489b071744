"""Settings of the curve: which points of each adapter's dial are measured."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from qadapter.config.base import NonNegative, Settings, refuse_repeats
from qadapter.policy.dial import LARGEST_DIAL, DialKind

Value = Annotated[float, Field(gt=0, le=LARGEST_DIAL)]


class CurveSettings(Settings):
    """Measure each adapter at several values of its dial, from its base (0) over itself as trained (1) to beyond.

    Attributes:
        kinds: which dials, `q-weight` or `scale` or both; each has a curve of its own, and both ends are the same.
        points: how many the curve chooses itself between 0 and 1, both ends among them; they can differ by seed.
        values: further values that are measured in any case, above 1 too; with several seeds these are what methods
            are compared at.
        steps: the chosen values are multiples of 1/steps; likelihoods at all weights on Q come from one pass.
        resolution: two neighbours whose adaptation and retention differ by no more than this are not divided further.
    """

    kinds: Annotated[tuple[DialKind, ...], Field(min_length=1)] = ("q-weight",)
    points: Annotated[int, Field(ge=2, le=33)] = 5
    values: tuple[Value, ...] = ()
    steps: Annotated[int, Field(ge=2, le=32)] = 16
    resolution: NonNegative = 0.0

    @model_validator(mode="after")
    def _check(self) -> CurveSettings:
        refuse_repeats("kinds", self.kinds)
        refuse_repeats("values", self.values)
        return self

    @property
    def grid(self) -> tuple[float, ...]:
        """The values from 0 to 1 that can be chosen."""
        return tuple(step / self.steps for step in range(self.steps + 1))

    @property
    def all_values(self) -> tuple[float, ...]:
        """The grid and the further values, in order."""
        return tuple(sorted({*self.grid, *self.values}))
