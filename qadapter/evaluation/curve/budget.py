"""Choose a point of a curve under a forgetting budget, and report it on items that it was not chosen on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from qadapter.config.budget import Budget
from qadapter.evaluation.curve.parts import SPLIT, Part, mean_adaptation, mean_forgetting, mean_gain, split_curves
from qadapter.evaluation.curve.points import Curve
from qadapter.evaluation.statistics import Interval
from qadapter.policy.dial import Dial, DialKind


@dataclass(frozen=True)
class Choice:
    """The operating point under a budget.

    Attributes:
        budget: that was asked for.
        kind: of the dial.
        value: of the dial; 0 (the base) where no point above it satisfies the budget.
        place: of the point.
        adaptation, forgetting: on the part that it was not chosen on.
        gain: adaptation minus the base's, there.
        expected: adaptation and forgetting on the part that it was chosen on.
        beyond: how far an interval of the forgetting reaches beyond its limit, there: the mean's or, with a limit for
            single tasks, the task's that reaches farthest; 0 or less where none does.
        nearest: where no point above 0 satisfies the budget, the value that comes nearest and by how much it exceeds
            the budget; None elsewhere.
        items: of the reported part: held-out items, retention items.
    """

    budget: Budget
    kind: DialKind
    value: float
    place: int
    adaptation: Interval
    forgetting: Interval
    gain: Interval
    expected: tuple[float, float]
    beyond: float
    nearest: tuple[float, float] | None
    items: tuple[int, int]

    @property
    def sure(self) -> bool:
        """Whether the whole intervals of the forgetting lie within the budget."""
        return self.beyond <= 0

    @property
    def dial(self) -> Dial:
        """The dial of the point."""
        return Dial(self.kind, self.value)

    def sentence(self) -> str:
        """What was chosen and how sure it is, for people."""
        per_task = "" if self.budget.per_task is None else f", {self.budget.per_task:g} per task"
        limit, found = f"{self.budget.max_forgetting:g}{per_task}", self.forgetting
        shown = f"forgetting {found.as_difference(digits=4)}"
        learnt = f"adaptation {self.adaptation.estimate:.3f} [{self.adaptation.low:.3f}, {self.adaptation.high:.3f}]"
        where = f"on the {self.items[0]} held-out and {self.items[1]} retention items it was not chosen on ({SPLIT})"
        if self.nearest is not None:
            value, by = self.nearest
            return (
                f"no point above 0 stays within the budget of {limit}: the nearest, {Dial(self.kind, value)}, "
                f"exceeds it by {by:.4f}. The dial stays at 0, the base"
            )
        if self.sure:
            return f"dial {self.dial}: {learnt}, {shown}, within the budget of {limit} with confidence, {where}"
        return (
            f"dial {self.dial}: {learnt}, {shown}, {where}. Not surely within the budget of {limit}: the interval "
            f"reaches {self.beyond:.4f} beyond it"
        )


def excess(part: Part, place: int, budget: Budget) -> float:
    """By how much a point exceeds a budget, the largest of its limits; 0 or less where it satisfies it."""
    over = [part.forgetting(place) - budget.max_forgetting] if part.averaged else []
    if budget.per_task is not None:
        over += [part.forgetting(place, name) - budget.per_task for name in part.averaged]
    if budget.max_over_refusals is not None and not math.isnan(part.refused[place]):
        over.append(float(part.refused[place]) - budget.max_over_refusals)
    return max(over, default=0.0)


def choose(curves: Sequence[Curve], budget: Budget) -> Choice:
    """Choose the point that learnt most within a budget on the selection part, and measure it on the other part.

    Among equals the one that forgot less is taken, then the smaller dial. The base satisfies every budget of
    forgetting.

    Args:
        curves: as in `split_curves`.
        budget: how much may be forgotten.

    Raises:
        QAdapterError: as `split_curves`.
    """
    selection, reported = split_curves(curves)
    return choose_on(selection, reported, budget)


def choose_among(curves: Sequence[Curve], budget: Budget) -> Choice:
    """`choose` for one adapter's curves along several kinds of dial: that of the kind that learnt most.

    Among equals the one that forgot less on the selection part is taken, then the kind that comes first.

    Args:
        curves: one for each kind.
        budget: how much may be forgotten.

    Raises:
        QAdapterError: as `split_curves`.
    """
    found = [choose([curve], budget) for curve in curves]
    return max(found, key=lambda choice: (round(choice.expected[0], 12), -round(choice.expected[1], 12)))


def choose_on(selection: Part, reported: Part, budget: Budget) -> Choice:
    """`choose`, for parts that are there already."""
    places = range(len(selection.values))
    over = [excess(selection, place, budget) for place in places]
    within = [place for place in places if over[place] <= 1e-12]
    best = max(
        within or [0],
        key=lambda place: (
            round(selection.adaptation(place), 12),
            -round(selection.forgetting(place), 12),
            -selection.values[place],
        ),
    )
    nearest = None
    above = [place for place in places if selection.values[place] > 0]
    if above and not set(above) & set(within):
        place = min(above, key=over.__getitem__)
        nearest = (selection.values[place], over[place])
    forgetting = mean_forgetting([reported], [best])
    return Choice(
        budget=budget,
        kind=selection.kind,
        value=selection.values[best],
        place=best,
        adaptation=mean_adaptation([reported], [best]),
        forgetting=forgetting,
        gain=mean_gain([reported], [best]),
        expected=(selection.adaptation(best), selection.forgetting(best)),
        beyond=_beyond(reported, best, forgetting, budget),
        nearest=nearest,
        items=(reported.gained.shape[2], sum(table.shape[2] for table in reported.lost.values())),
    )


def _beyond(reported: Part, place: int, forgetting: Interval, budget: Budget) -> float:
    over = [forgetting.high - budget.max_forgetting]
    if budget.per_task is not None:
        over += [mean_forgetting([reported], [place], name).high - budget.per_task for name in reported.averaged]
    return max(over)


def facts_of(choice: Choice) -> dict[str, Any]:
    """A choice as plain values."""
    return {
        "kind": choice.kind,
        "dial": choice.value,
        "budget": choice.budget.model_dump(),
        "adaptation": [choice.adaptation.estimate, choice.adaptation.low, choice.adaptation.high],
        "forgetting": [choice.forgetting.estimate, choice.forgetting.low, choice.forgetting.high],
        "gain": [choice.gain.estimate, choice.gain.low, choice.gain.high],
        "chosen_on": {"adaptation": choice.expected[0], "forgetting": choice.expected[1]},
        "sure": choice.sure,
        "nearest": choice.nearest,
        "split": SPLIT,
        "items": list(choice.items),
        "sentence": choice.sentence(),
    }
