"""Whether the labels of a delivery look reversed: two views of its pairs, beside the same views of earlier ones.

A view is the share of pairs whose chosen reply a policy prefers: the champion by its log-ratio to the base, the base by
its own log-probability per token. What a view says of one half of the pairs it knows (the base of a preference against
it prefers the rejected replies, for example) turns around where labels are reversed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from qadapter.evaluation.prompts import by_prompt, effective_number

Floats = NDArray[np.float64]
Reading = Literal["usual", "reversed", "unknown"]

LEAST = 20
"""Prompts, of new pairs and of earlier ones, below which nothing is said."""
_LEVEL = 0.95


@dataclass(frozen=True)
class View:
    """What one policy prefers.

    Attributes:
        known: [m], 1 for each earlier pair whose chosen reply it prefers, one half for a tie, else 0.
        new: [n], the same of the delivery.
        known_prompts, new_prompts: the prompt of each; without them each pair counts as one of its own.
    """

    known: Floats
    new: Floats
    known_prompts: tuple[str, ...] = ()
    new_prompts: tuple[str, ...] = ()

    @property
    def direction(self) -> int:
        """1 if it prefers the chosen replies of earlier pairs, -1 if the rejected ones, 0 where that may be chance."""
        return _side(self.known, self.known_prompts)

    @property
    def reading(self) -> Reading:
        """Whether it sees the delivery as it saw earlier pairs, or the other way round."""
        before, now = self.direction, _side(self.new, self.new_prompts)
        if not before or not now:
            return "unknown"
        return "usual" if before == now else "reversed"


def _side(wins: Floats, prompts: Sequence[str]) -> int:
    """On which side of one half a share lies beyond noise (Clopper-Pearson): 1, -1, or 0 where that is not known.

    Pairs of one prompt tell together no more than one.
    """
    n = round(effective_number(by_prompt(prompts, range(len(wins))).pairs)) if len(wins) else 0
    if n < LEAST:
        return 0
    interval = stats.binomtest(round(float(wins.mean()) * n), n).proportion_ci(_LEVEL)
    return int(interval.low > 0.5) - int(interval.high < 0.5)


def look_reversed(base: View, champion: View) -> bool:
    """Whether a delivery looks reversed.

    The base has to see it the other way round. The champion has to as well, unless it has learnt too little to have a
    view; a champion that sees nothing in pairs of another kind, or sees them as usual, speaks against it.
    """
    if base.reading != "reversed":
        return False
    return champion.reading == "reversed" if champion.direction else True
