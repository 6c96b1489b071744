"""What one policy has of several preferences and what it kept of its base, item by item."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from qadapter.evaluation.curve.parts import selects
from qadapter.evaluation.curve.points import Measure
from qadapter.files.artifacts import read_json, write_json

OUTCOME = "outcome.json"


@dataclass(frozen=True)
class Outcome:
    """A policy's measurement.

    Attributes:
        learnt: domain → `adaptation/score` of each held-out item.
        kept: `retention/<task>/<metric>` → score of each item.
    """

    learnt: Mapping[str, Measure]
    kept: Mapping[str, Measure]

    def part(self, *, selection: bool) -> Outcome:
        """Only the items that weights are chosen on, or only the others (`qadapter.evaluation.curve.budget`)."""
        return Outcome(
            {name: _part(measure, selection) for name, measure in self.learnt.items()},
            {name: _part(measure, selection) for name, measure in self.kept.items()},
        )

    @property
    def adaptation(self) -> float:
        """Mean over the domains."""
        return float(np.mean([measure.mean for measure in self.learnt.values()]))

    @property
    def averaged(self) -> list[str]:
        """The tasks of `retention`: those whose score is better when higher."""
        return [name for name, measure in self.kept.items() if measure.higher]

    @property
    def retention(self) -> float:
        """Mean over the tasks, as `retention/mean`."""
        return float(np.mean([self.kept[name].mean for name in self.averaged]))

    def write(self, folder: Path) -> None:
        """Write `outcome.json`."""
        content = {part: {n: vars(m) for n, m in getattr(self, part).items()} for part in ("learnt", "kept")}
        write_json(folder / OUTCOME, content)

    @classmethod
    def read(cls, folder: Path) -> Outcome:
        """What `write` wrote."""
        content: dict[str, dict[str, dict[str, Any]]] = read_json(folder / OUTCOME)
        return cls(*({name: _measure(row) for name, row in content[part].items()} for part in ("learnt", "kept")))


def _measure(row: Mapping[str, Any]) -> Measure:
    weights = row["weights"]
    return Measure(
        tuple(row["ids"]), tuple(row["values"]), None if weights is None else tuple(weights), bool(row["higher"])
    )


def _part(measure: Measure, selection: bool) -> Measure:
    places = [place for place, item in enumerate(measure.ids) if selects(item) == selection]

    def taken(values: Sequence[Any]) -> tuple[Any, ...]:
        return tuple(values[place] for place in places)

    weights = None if measure.weights is None else taken(measure.weights)
    return Measure(taken(measure.ids), taken(measure.values), weights, measure.higher)
