"""Heat maps of a sequence: the accuracy on each preference after each step, a panel per way."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from qadapter.evaluation.sequence.matrix import Passage
from qadapter.report.panels import panels

KEPT = "kept"
"""Heading of the column that shows the retention."""
_MAP = "cividis"  # which colour-blind readers see as others do
_DARK = 0.55  # below it numbers are white


@rc_context({"text.parse_math": False})
def heat_maps(passages: Mapping[str, Passage], file: Path, title: str) -> Figure:
    """Draw the matrix of each way with its retention as a last column apart.

    Args:
        passages: way → its passage.
        file: the PNG to write.
        title: of the figure.
    """
    count = len(next(iter(passages.values())).domains)
    size = 1.1 * (count + 2) + 1.2, 0.62 * count + 1.5
    figure, axes = panels(list(passages), beside=2, size=size, margin=(0.8, 0.7))
    for way, panel in axes.items():
        _panel(panel, passages[way])
    colours = figure.colorbar(ScalarMappable(Normalize(0, 1), _MAP), ax=figure.axes, shrink=0.8)
    colours.set_label("accuracy; retention")
    figure.suptitle(title)
    figure.savefig(file, dpi=130)
    return figure


def _panel(axes: Axes, passage: Passage) -> None:
    count = len(passage.domains)
    values = np.full((count, count + 2), np.nan)
    values[:, :count] = passage.matrix
    values[:, count + 1] = passage.retention
    axes.imshow(np.ma.masked_invalid(values), cmap=colormaps[_MAP], vmin=0, vmax=1, aspect="auto")
    for row, column in np.argwhere(~np.isnan(values)):
        colour = "white" if values[row, column] < _DARK else "black"
        axes.text(column, row, f"{values[row, column]:.2f}", ha="center", va="center", color=colour, fontsize=9)
    axes.set_xticks([*range(count), count + 1], [*passage.domains, KEPT], fontsize=8, rotation=20, ha="right")
    axes.set_yticks(range(count), [f"after {name}" for name in passage.domains], fontsize=8)
    axes.set_frame_on(False)
    axes.tick_params(length=0)
