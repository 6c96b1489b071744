"""Retention against adaptation: the means over domains large, the domains small beside them."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from qadapter.methods.method import Marker
from qadapter.methods.table import METHODS
from qadapter.report.front import pareto_front, stairs
from qadapter.report.intervals import Measured
from qadapter.report.rows import kind
from qadapter.report.speaking import silent_methods
from qadapter.report.summary import points

STYLES: dict[str, tuple[str, Marker]] = {"base": ("#000000", "*")}
STYLES |= {method.name: (method.look.colour, method.look.marker) for method in METHODS}
# For further variants of a method: six colours of Okabe and Ito's palette and a grey, which colour-blind readers can
# tell apart, with markers.
_COLOURS = ("#56B4E9", "#E69F00", "#444444", "#D55E00", "#0072B2", "#009E73", "#CC79A7")
_MARKERS = ("v", "P", "X", "<", ">", "p", "d", "h")
# 7 and 8 have no common factor, so these are 56 looks, whose neighbours differ in both; none is a method's own.
_OTHERS = [
    look
    for look in (
        (_COLOURS[place % len(_COLOURS)], _MARKERS[place % len(_MARKERS)])
        for place in range(len(_COLOURS) * len(_MARKERS))
    )
    if look not in STYLES.values()
]
_FRONT, _BASE_KEEPS = "Pareto front", "what the base keeps"
_LEGEND_COLUMNS = 7
_LINE = 0.22  # inches that a line of the legend is high
_MANY = 12  # methods: more need a wider legend


def styles_of(methods: list[str]) -> dict[str, tuple[str, Marker]]:
    """Colour and marker of each method; a second variant of one (`dpo (other run)`) gets its own.

    All are distinct up to some 50 that are not the first of a known method. Neighbours differ in colour and in marker.
    """
    styles: dict[str, tuple[str, Marker]] = {}
    others = 0
    for method in methods:
        known = STYLES.get(kind(method))
        if known is None or known in styles.values():
            known = _OTHERS[others % len(_OTHERS)]
            others += 1
        styles[method] = known
    return styles


@rc_context({"text.parse_math": False})  # a label with two dollar signs is no formula
def retention_against_adaptation(measured: Measured, file: Path, title: str) -> Figure:
    """Draw every policy: to the right is more learnt, up is more kept; error bars are 95 % intervals.

    Drawn without pyplot, so that it works in any thread. Returns the figure as drawn.
    """
    domains = measured.domains
    styles = styles_of(measured.methods)
    small = domains if len(domains) > 1 else []
    columns = (len(small) + 1) // 2
    width = max(6.4 + 2.9 * columns, 10.0 if len(styles) > _MANY else 0.0)
    labels = [*styles, _FRONT, _BASE_KEEPS]
    beside = _legend_columns(labels, width)
    lines = math.ceil(len(labels) / beside)
    figure = Figure(figsize=(width, 6.6 + _LINE * max(0, lines - 2)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2 + columns)
    main = figure.add_subplot(grid[:, :2])
    panels = {main: _panel(main, measured, None if small else domains[0], styles, size=13)}
    main.set_title("mean over domains" if small else domains[0], fontweight="bold")
    main.set_xlabel("learnt: adaptation score")
    main.set_ylabel("kept: retention, mean over tasks")
    shared: Axes | None = None
    for place, domain in enumerate(small):
        panel = figure.add_subplot(grid[place // columns, 2 + place % columns], sharex=shared, sharey=shared)
        shared = shared or panel
        panels[panel] = _panel(panel, measured, domain, styles, size=9)
        panel.set_title(domain, fontsize=10)
        panel.tick_params(labelsize=8)
    handles: list[Any] = [
        Line2D(
            [], [], color=colour, marker=marker, linestyle="", markersize=10, **_hollow(method, colour), label=method
        )
        for method, (colour, marker) in styles.items()
    ]
    silent = silent_methods(measured.rows)
    fronts = [_front(panel, {m: at for m, at in found.items() if m not in silent}) for panel, found in panels.items()]
    if any(fronts):
        handles.append(Line2D([], [], color="#666666", linestyle="--", linewidth=1, label=_FRONT))
    if any(kind(method) == "base" for found in panels.values() for method in found):
        handles.append(Line2D([], [], color="#000000", linestyle=":", linewidth=0.8, label=_BASE_KEEPS))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(beside, len(handles)), frameon=False)
    figure.suptitle(title)
    figure.savefig(file, dpi=130)
    return figure


def _legend_columns(labels: list[str], inches: float) -> int:
    """As many as fit beside each other: a letter is about 0.085 inches wide, a marker with its gaps 0.6."""
    for columns in range(min(len(labels), _LEGEND_COLUMNS), 1, -1):
        parts = np.array_split([len(label) for label in labels], columns)  # as the legend does
        if sum(0.6 + 0.085 * part.max() for part in parts) <= inches:
            return columns
    return 1


def _hollow(method: str, colour: str) -> dict[str, Any]:
    """Hollow markers but for the base's, so that two policies at one place can both be seen."""
    return {
        "markerfacecolor": colour if kind(method) == "base" else "none",
        "markeredgewidth": 1.0 if kind(method) == "base" else 2.2,
    }


def _panel(
    axes: Axes, measured: Measured, domain: str | None, styles: dict[str, tuple[str, Marker]], *, size: float
) -> dict[str, tuple[float, float]]:
    """Draw the policies of a domain, or (None) the means of those that have every domain; returns where they are."""
    found = points(measured.rows, domain)
    for method, (x, y) in found.items():
        colour, marker = styles[method]
        learnt, kept = measured.score(method, domain), measured.retention(method, domain)
        axes.errorbar(
            x,
            y,
            xerr=[[max(x - learnt.low, 0)], [max(learnt.high - x, 0)]] if learnt else None,
            yerr=[[max(y - kept.low, 0)], [max(kept.high - y, 0)]] if kept else None,
            marker=marker,
            linestyle="",
            color=colour,
            elinewidth=1,
            markersize=size * (1.2 if kind(method) == "base" else 1),
            capsize=2.5,
            **_hollow(method, colour),
        )
        if kind(method) == "base":
            axes.axhline(y, color=colour, linewidth=0.8, linestyle=":", zorder=0)
    if not found and domain is None:
        axes.text(0.5, 0.5, "no method has every domain", transform=axes.transAxes, ha="center", va="center")
    axes.grid(alpha=0.25)
    axes.margins(0.1)
    return found


def _front(axes: Axes, found: dict[str, tuple[float, float]]) -> bool:
    """Draw the front as stairs from edge to edge: what lies below and to the left of them is beaten. False: none."""
    front = [found[method] for method in pareto_front(found)]
    if front:
        (left, _), (bottom, _) = axes.get_xlim(), axes.get_ylim()
        xs, ys = stairs(front, left, bottom)
        axes.plot(xs, ys, color="#666666", linestyle="--", linewidth=1, zorder=0, scalex=False, scaley=False)
    return bool(front)
