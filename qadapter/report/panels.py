"""Figures of equal panels, one per name, in lines of so many."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def panels(
    names: Sequence[str],
    *,
    beside: int,
    size: tuple[float, float],
    margin: tuple[float, float] = (0.0, 0.0),
    narrowest: float = 0.0,
) -> tuple[Figure, dict[str, Axes]]:
    """Lay out one panel per name, with the name as its title; drawn without pyplot, so that any thread can.

    Args:
        names: of the panels, in reading order.
        beside: most panels in a line.
        size: width and height of a panel, in inches.
        margin: what the figure is wider and higher than its panels, for legends and the title, in inches.
        narrowest: least width of the figure, in inches.

    Returns:
        The figure, and each name's axes. The places that the last line leaves free are not drawn.
    """
    columns = min(beside, len(names))
    lines = math.ceil(len(names) / columns)
    width = max(narrowest, size[0] * columns + margin[0])
    figure = Figure(figsize=(width, size[1] * lines + margin[1]), layout="constrained")
    FigureCanvasAgg(figure)
    places = list(figure.subplots(lines, columns, squeeze=False).flat)
    for free in places[len(names) :]:
        free.set_visible(False)
    found = dict(zip(names, places, strict=False))
    for name, axes in found.items():
        axes.set_title(name, fontweight="bold")
    return figure, found
