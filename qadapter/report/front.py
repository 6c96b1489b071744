"""The Pareto front: what no other point beats in both coordinates."""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)


def pareto_front(points: Mapping[Name, tuple[float, float]]) -> list[Name]:
    """The names that no other beats: none is at least as good in both coordinates and better in one.

    Args:
        points: of each name, (adaptation, retention); more is better. Equal points are on the front together. A point
            with a coordinate that is not a number is not on it.
    """
    return [
        name
        for name, (x, y) in points.items()
        if not (math.isnan(x) or math.isnan(y))
        and not any(a >= x and b >= y and (a > x or b > y) for a, b in points.values())
    ]


def stairs(front: Iterable[tuple[float, float]], left: float, bottom: float) -> tuple[list[float], list[float]]:
    """x and y of the line below and to the left of which everything is reached or beaten.

    Args:
        front: points on a front.
        left, bottom: where the line begins (as high as the highest point) and ends (as far right as the rightmost).
    """
    xs, ys = [], []
    before = left
    for x, y in sorted(set(front), key=lambda point: (-point[1], point[0])):
        xs += [before, x]
        ys += [y, y]
        before = x
    return ([*xs, before], [*ys, bottom]) if xs else ([], [])
