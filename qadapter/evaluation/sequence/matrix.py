"""The accuracy matrix of a sequence and its figures: average accuracy, backward transfer, forgetting of the base.

R[k, i] is the score on preference i after step k, i ≤ k. With K steps (Lopez-Paz and Ranzato, "Gradient Episodic Memory
for Continual Learning", arXiv 1706.08840):

    ACC = 1/K · Σ_i R[K, i]                          BWT = 1/(K−1) · Σ_{i<K} ( R[K, i] − R[i, i] )

The forgetting of the base is its retention minus the policy's after step K, mean over the tasks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from qadapter.evaluation.curve.parts import wide_enough
from qadapter.evaluation.curve.points import Measure
from qadapter.evaluation.prompts import by_prompt
from qadapter.evaluation.sequence.outcome import Outcome
from qadapter.evaluation.statistics import Interval

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Passage:
    """One way through a sequence.

    Attributes:
        domains: in the order in which they arrived.
        outcomes: for each seed the outcome after each step; that of step k has domains 1 … k.
        base: the base's own.
    """

    domains: tuple[str, ...]
    outcomes: tuple[tuple[Outcome, ...], ...]
    base: Outcome

    @property
    def matrix(self) -> Floats:
        """[K, K], mean over seeds; NaN above the diagonal."""
        return np.mean([accuracies(self.domains, steps) for steps in self.outcomes], axis=0)

    @property
    def retention(self) -> Floats:
        """[K], retention after each step, mean over seeds."""
        return np.mean([[outcome.retention for outcome in steps] for steps in self.outcomes], axis=0)

    @property
    def accuracy(self) -> Interval:
        """ACC with its 95 % interval over prompts and seeds, which ends where a share does."""
        found = self._learnt({name: self._items(len(self.domains) - 1, name) for name in self.domains})
        return found.within(0.0, 1.0)

    @property
    def backward_transfer(self) -> Interval:
        """BWT with its 95 % interval: paired by item and seed."""
        last = len(self.domains) - 1
        return self._learnt(
            {name: self._items(last, name) - self._items(step, name) for step, name in enumerate(self.domains[:-1])}
        )

    @property
    def learnt(self) -> float:
        """Mean of the diagonal: how well each preference was learnt when it arrived."""
        return float(np.diag(self.matrix).mean())

    @property
    def forgetting(self) -> Interval:
        """The base's retention minus that after the last step, with its 95 % interval: paired by item."""
        lost = []
        for task in self.base.averaged:
            start = np.array(self.base.kept[task].values)
            lost.append(np.array([start - np.array(steps[-1].kept[task].values) for steps in self.outcomes]))
        return wide_enough(lost, [np.ones(table.shape[1]) for table in lost])

    def difference(self, other: Passage) -> Interval:
        """ACC minus another way's, paired by pair and seed."""
        last = len(self.domains) - 1
        return self._learnt({name: self._items(last, name) - other._items(last, name) for name in self.domains})

    def _items(self, step: int, domain: str) -> Floats:
        """[S, n], the scores of a domain's held-out items, which are pairs or prompts, after a step."""
        return np.array([steps[step].learnt[domain].values for steps in self.outcomes], dtype=np.float64)

    def _learnt(self, tables: Mapping[str, Floats]) -> Interval:
        """Interval of a mean over domains of held-out items [S, n]: prompts with all their pairs are drawn."""
        ids = {name: self.outcomes[0][-1].learnt[name].ids for name in tables}
        prompts = {name: by_prompt(ids[name], range(table.shape[1])) for name, table in tables.items()}
        means = [prompts[name].means(table) for name, table in tables.items()]
        return wide_enough(means, [prompts[name].pairs for name in tables])


def accuracies(domains: Sequence[str], steps: Sequence[Outcome]) -> Floats:
    """[K, K], R of one seed; NaN where a preference had not arrived yet."""
    return np.array([[_mean(outcome.learnt.get(name)) for name in domains] for outcome in steps])


def _mean(measure: Measure | None) -> float:
    return float("nan") if measure is None else measure.mean
