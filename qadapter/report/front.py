"""The Pareto front: what no other point beats in both coordinates."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TypeVar

Name = TypeVar("Name", bound=Hashable)


def pareto_front(points: Mapping[Name, tuple[float, float]]) -> list[Name]:
    """The names that no other beats: none is at least as good in both coordinates and better in one.

    Args:
        points: of each name, (adaptation, retention); more is better. Equal points are on the front together.
    """
    return [
        name
        for name, (x, y) in points.items()
        if not any(a >= x and b >= y and (a > x or b > y) for a, b in points.values())
    ]
