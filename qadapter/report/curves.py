"""Training curves: the loss of every method, and how the pairwise ones come to prefer the chosen replies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from qadapter.report.items import read_lines
from qadapter.report.rows import Row, kind, methods_of, ordered

CURVES = {
    "train/loss": "loss",
    "train/rewards/accuracies": "right on training pairs",
}
_WIDEST = 8  # methods beside each other
# Okabe and Ito's palette and five dashes: the domains differ in both.
_LINES = (
    ("#D55E00", "-"),
    ("#0072B2", "--"),
    ("#009E73", "-."),
    ("#CC79A7", ":"),
    ("#E69F00", (0, (5, 1, 1, 1, 1, 1))),
    ("#56B4E9", (0, (8, 3))),
)


@rc_context({"text.parse_math": False})  # a label with two dollar signs is no formula
def training_curves(rows: Sequence[Row], file: Path, title: str) -> bool:
    """Draw a column a method and a row a measure, a line a domain and seed; False (no file) where nothing was logged.

    Many methods are drawn in several such bands, one below the other. Losses of different methods are different
    quantities, so each panel of the first row has its own axis.
    """
    curves = {id(row): read_lines(row.training, "history.jsonl") for row in rows if kind(row.method) != "base"}
    logged = [row for row in rows if curves.get(id(row))]
    measures = [name for name in CURVES if any(name in step for row in logged for step in curves[id(row)])]
    if not measures:
        return False
    methods, domains = methods_of(logged), ordered(row.domain for row in logged)
    wide = min(len(methods), _WIDEST)
    bands = math.ceil(len(methods) / wide)
    figure = Figure(figsize=(3.3 * wide + 0.8, 2.2 * len(measures) * bands + 1.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(measures) * bands, wide, squeeze=False, sharex=True)
    for panel in axes.flat:
        panel.set_visible(False)
    handles: dict[str, Any] = {}
    for line, name in enumerate(measures):
        for place, method in enumerate(methods):
            panel = axes[place // wide * len(measures) + line, place % wide]
            drawn = False
            for row in (row for row in logged if row.method == method):
                points = [(step["step"], step[name]) for step in curves[id(row)] if name in step]
                if points:
                    colour, dashes = _LINES[domains.index(row.domain) % len(_LINES)]
                    (handle,) = panel.plot(*zip(*points, strict=True), color=colour, linestyle=dashes, linewidth=1.4)
                    handles.setdefault(row.domain, handle)
                    drawn = True
            if not drawn:  # not a quantity of this method
                continue
            panel.set_visible(True)
            panel.grid(alpha=0.25)
            panel.set_ylabel(CURVES[name], fontsize=9)
            panel.set_xlabel("step", fontsize=9)
            panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
            panel.tick_params(labelsize=8, labelbottom=True)
            if name == "train/rewards/accuracies":
                panel.set_ylim(-0.03, 1.03)
    for place, method in enumerate(methods):
        axes[place // wide * len(measures), place % wide].set_title(method, fontweight="bold")
    figure.suptitle(title)
    figure.legend(list(handles.values()), list(handles), loc="outside lower center", ncols=6, frameon=False)
    figure.savefig(file, dpi=120)
    return True
