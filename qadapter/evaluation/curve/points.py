"""A measured curve as data, and which point to measure next."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from qadapter.config.curve import CurveSettings
from qadapter.errors import QAdapterError
from qadapter.files.artifacts import read_json, write_json
from qadapter.policy.dial import DialKind

CURVE = "curve.json"
Floats = NDArray[np.float64]


def content_digest(*content: Any) -> str:
    """sha256 of an item's content: what the split of items into two parts depends on."""
    return hashlib.sha256(json.dumps(content, ensure_ascii=True, default=str).encode()).hexdigest()


@dataclass(frozen=True)
class Measure:
    """One measure at one point, item by item.

    Attributes:
        ids: digests of the items' content; of held-out pairs, the name of each one's prompt
            (`qadapter.evaluation.prompts`).
        values: one for each item.
        weights: what each counts; None: 1.
        higher: whether higher is better.
    """

    ids: tuple[str, ...]
    values: tuple[float, ...]
    weights: tuple[float, ...] | None = None
    higher: bool = True

    @property
    def mean(self) -> float:
        """Weighted mean."""
        return float(np.average(self.values, weights=self.weights)) if self.values else math.nan


@dataclass(frozen=True)
class Point:
    """A policy at one value of its dial.

    Attributes:
        value: of the dial.
        learnt: `adaptation/score`, item by item.
        kept: `retention/<task>/<metric>` → its items.
        refused: whether each harmless request was refused; None where that is not measured.
        unchanged: whether each of the base's own answers to old prompts stays the same; None where nothing was asked.
        kl: KL(base ‖ policy) per token on old text, nats; None where there is none.
    """

    value: float
    learnt: Measure
    kept: Mapping[str, Measure]
    refused: Measure | None = None
    unchanged: Measure | None = None
    kl: float | None = None

    @property
    def retention(self) -> float:
        """Mean over the tasks whose score is better when higher, as `retention/mean`."""
        means = [task.mean for task in self.kept.values() if task.higher]
        return float(np.mean(means)) if means else math.nan

    def further(self) -> dict[str, float]:
        """What else was measured: `over_refusals`, `answers_identical`, `kl_per_token`."""
        found = {}
        if self.refused is not None:
            found["over_refusals"] = self.refused.mean
        if self.unchanged is not None:
            found["answers_identical"] = self.unchanged.mean
        if self.kl is not None:
            found["kl_per_token"] = self.kl
        return found


@dataclass(frozen=True)
class Curve:
    """The points of one adapter along one kind of dial, the base (0) first.

    Attributes:
        kind: of the dial.
        points: by value.
    """

    kind: DialKind
    points: tuple[Point, ...]

    def below(self, value: float) -> Curve:
        """Its points at smaller values only."""
        return Curve(self.kind, tuple(point for point in self.points if point.value < value))

    @property
    def as_trained(self) -> Point:
        """The policy as trained."""
        return next(point for point in self.points if point.value == 1.0)

    def metrics(self) -> dict[str, float]:
        """`curve/<value>/adaptation` and so on, for each point; `curve/scale/<value>/…` for the scale."""
        name = "curve" if self.kind == "q-weight" else f"curve/{self.kind}"
        found: dict[str, float] = {}
        for point in self.points:
            found[f"{name}/{point.value:g}/adaptation"] = point.learnt.mean
            found[f"{name}/{point.value:g}/retention"] = point.retention
            found |= {f"{name}/{point.value:g}/{key}": number for key, number in point.further().items()}
        return found

    def to_json(self) -> dict[str, Any]:
        """Plain values; the items' digests are written once."""
        first = self.points[0]
        return {
            "kind": self.kind,
            "ids": {"learnt": first.learnt.ids, "kept": {name: task.ids for name, task in first.kept.items()}},
            "points": [
                {
                    "value": point.value,
                    "learnt": _without_ids(point.learnt),
                    "kept": {name: _without_ids(task) for name, task in point.kept.items()},
                    "refused": None if point.refused is None else _without_ids(point.refused),
                    "unchanged": None if point.unchanged is None else _without_ids(point.unchanged),
                    "kl": point.kl,
                }
                for point in self.points
            ],
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Curve:
        """What `to_json` gave."""
        ids = content["ids"]
        points = tuple(
            Point(
                row["value"],
                _with_ids(ids["learnt"], row["learnt"]),
                {name: _with_ids(ids["kept"][name], task) for name, task in row["kept"].items()},
                None if row["refused"] is None else _with_ids((), row["refused"]),
                None if row["unchanged"] is None else _with_ids((), row["unchanged"]),
                row["kl"],
            )
            for row in content["points"]
        )
        return cls(content["kind"], points)


def write_curves(folder: Path, curves: Sequence[Curve]) -> None:
    """Write the curves of one adapter, one for each kind of dial."""
    write_json(folder / CURVE, [curve.to_json() for curve in curves])


def read_curves(folder: Path) -> tuple[Curve, ...]:
    """What `write_curves` wrote.

    Raises:
        QAdapterError: it is something else.
    """
    try:
        return tuple(Curve.from_json(content) for content in read_json(folder / CURVE))
    except (KeyError, TypeError, ValueError) as error:
        raise QAdapterError(f"{folder / CURVE} is no curve ({error!r}). Measure it again.") from error


def _without_ids(measure: Measure) -> dict[str, Any]:
    return {name: value for name, value in vars(measure).items() if name != "ids"}


def _with_ids(ids: Sequence[str], row: Mapping[str, Any]) -> Measure:
    weights = row["weights"]
    return Measure(tuple(ids), tuple(row["values"]), None if weights is None else tuple(weights), row["higher"])


def next_value(points: Sequence[Point], settings: CurveSettings) -> float | None:
    """The value to measure next; None where the curve is resolved or has its points.

    After both ends the values that the settings name, then the middle of the two neighbours between 0 and 1 that lie
    farthest apart: the change of adaptation and of retention, each as a share of its change from 0 to 1.

    Args:
        points: measured so far.
        settings: how many there may be, and the grid that they lie on.
    """
    measured = {point.value for point in points}
    named = [value for value in settings.values if value not in (0.0, 1.0)]
    for value in (0.0, 1.0, *named):
        if value not in measured:
            return value
    if len(points) - len(named) >= settings.points:
        return None
    done = sorted((point for point in points if point.value <= 1.0), key=lambda point: point.value)
    ranges = [
        max(values) - min(values) or 1.0 for values in ([p.learnt.mean for p in done], [p.retention for p in done])
    ]
    best, chosen = 0.0, None
    for left, right in pairwise(done):
        inside = [value for value in settings.grid if left.value < value < right.value]
        changes = abs(right.learnt.mean - left.learnt.mean), abs(right.retention - left.retention)
        if not inside or max(changes) <= settings.resolution:
            continue
        apart = math.hypot(changes[0] / ranges[0], changes[1] / ranges[1])
        if apart > best:
            best, chosen = apart, inside[len(inside) // 2]
    return chosen
