"""The gate's rules: a section of a recurring customization's config."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from qadapter.config.base import NonNegative, Settings
from qadapter.evaluation.drift import Trait
from qadapter.evaluation.statistics import LEVEL, RESAMPLES

MIN_ITEMS = 30
SAME_ANSWERS = 10


class _Rules(Settings):
    """Strict types: a string that looks like a number is refused."""

    model_config = ConfigDict(strict=True)


class AdaptationRule(_Rules):
    """The candidate must have learnt something.

    Attributes:
        metric: which accuracy on held-out pairs: by the log-ratio to the base (the base has one half), by the policy's
            own log-probability, or by that per token.
        min_gain: smallest accepted difference to the champion.
        beyond_noise: the interval of the difference must also lie above 0.
        min_items: minimum number of prompts with scored held-out pairs.
        allow_same_answers: whether a candidate may pass whose generated replies are all the base's, word for word
            (`SAME_ANSWERS` of them or more): it wins pairs, and its users would notice nothing.

    Where the champion is at the ceiling (a candidate that won every pair would not pass), the rule is instead that the
    candidate is not worse beyond noise.
    """

    metric: Literal["implied_reward_accuracy", "preference_accuracy", "preference_accuracy_length_normalised"] = (
        "implied_reward_accuracy"
    )
    min_gain: float = 0.0
    beyond_noise: bool = True
    min_items: Annotated[int, Field(ge=1)] = MIN_ITEMS
    allow_same_answers: Annotated[bool, Field(exclude_if=lambda allowed: not allowed)] = False


class RetentionRule(_Rules):
    """No retention task may drop; each task is tested separately.

    Attributes:
        max_drop: largest accepted drop below the champion. A task fails if the whole interval of its drop is above
            this: a drop that noise could explain does not count.
        max_drop_from_base: the same against the base, so that many small steps do not add up unseen; None: no rule.
        min_items: minimum number of items per task.
    """

    max_drop: NonNegative = 0.02
    max_drop_from_base: NonNegative | None = None
    min_items: Annotated[int, Field(ge=1)] = MIN_ITEMS


class Gate(_Rules):
    """All rules; a candidate must pass each.

    Attributes:
        adaptation, retention: see there.
        max_over_refusals: largest accepted share of refused harmless requests (`retention/over_refusals`); None: no
            rule.
        max_moved: largest accepted number of traits of the answers that moved from the base beyond noise
            (`drift/moved`); None: no rule.
        max_drift: trait → largest accepted drift from the base, in either direction and in the trait's own unit. A
            trait fails if the whole interval of its drift is beyond this.
        flipped_labels: what a delivery leads to whose labels look reversed to base and champion: the candidate is
            rejected, or the verdict only reports it.
        level: coverage of the intervals.
        resamples: bootstrap draws.
    """

    adaptation: AdaptationRule = AdaptationRule()
    retention: RetentionRule = RetentionRule()
    max_over_refusals: Annotated[float, Field(ge=0, le=1)] | None = None
    max_moved: Annotated[int, Field(ge=0)] | None = None
    max_drift: dict[Trait, NonNegative] = Field(default_factory=dict)
    flipped_labels: Annotated[Literal["reject", "report"], Field(exclude_if=lambda what: what == "reject")] = "reject"
    level: Annotated[float, Field(gt=0, lt=1)] = LEVEL
    resamples: Annotated[int, Field(ge=100)] = RESAMPLES
