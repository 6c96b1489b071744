"""The figure of a sweep: every setting, the Pareto front, and the corner where the front is, closer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from qadapter.methods.table import METHODS, SUBJECT
from qadapter.report.front import stairs
from qadapter.report.rows import Spread, ordered
from qadapter.report.sweep.points import Point

STYLES = {family: (look.colour, look.marker) for method in METHODS for family, look in method.looks().items()}
_OTHER = ("#000000", "h")
_LONGEST_LIST = 14  # names beside the closer view


@rc_context({"text.parse_math": False})  # a label with two dollar signs is no formula
def draw_sweep(
    points: Sequence[Point], front: Sequence[Point], base: tuple[Spread, Spread], file: Path, title: str
) -> Figure:
    """Draw adaptation against retention: on the left everything, on the right where the front is, with names.

    Hollow markers are adapters with α0 changed at inference, joined to the setting that they were trained as. Error
    bars are one deviation over seeds. Drawn without pyplot, so that it works in any thread.

    Args:
        points: every setting that was measured.
        front: those on the Pareto front, most adaptation first.
        base: adaptation and retention of the base.
        file: the PNG to write.
        title: of the figure.

    Returns:
        The figure as drawn.
    """
    figure = Figure(figsize=(15, 7.2), layout="constrained")
    FigureCanvasAgg(figure)
    whole, close = figure.subplots(1, 2, width_ratios=[1, 1.25])
    for panel in (whole, close):
        _draw_points(panel, points, base)
        panel.set_xlabel("adaptation (share of held-out items)")
        panel.grid(alpha=0.25)
    whole.set_ylabel("retention (mean over tasks)")
    whole.set_title("all settings", fontsize=11)
    close.set_title("around the front", fontsize=11)
    if front:
        left, right, low, high = _corner(front, base)
        close.set(xlim=(left, right + 0.75 * (right - left)), ylim=(low, high))
        close.set_xticks([tick for tick in close.get_xticks() if left <= tick <= right])  # names stand further right
        whole.add_patch(Rectangle((left, low), right - left, high - low, fill=False, linestyle=":", linewidth=1))
        _name_points(close, front, right + 0.08 * (right - left), low, high)
    places = [(point.adaptation.mean, point.retention.mean) for point in front]
    for panel in (whole, close) if front else ():
        xs, ys = stairs(places, panel.get_xlim()[0], panel.get_ylim()[0])
        panel.plot(xs, ys, color="#000000", linewidth=1.6, zorder=2.5, scalex=False, scaley=False)
    families = ordered((point.setting.family for point in points), list(STYLES))
    handles = [_handle(family, filled=True, label=family) for family in families]
    if any(point.setting.dialled for point in points):
        example = next(iter(SUBJECT.looks()))
        handles.append(_handle(example, filled=False, label="α0 changed at inference"))
    handles.append(Line2D([], [], marker="*", color="#000000", linestyle="", markersize=13, label="base"))
    if front:
        handles.append(Line2D([], [], color="#000000", linewidth=1.6, label="Pareto front"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(6, len(handles)), frameon=False)
    figure.suptitle(title)
    figure.savefig(file, dpi=120)
    return figure


def _draw_points(panel: Any, points: Sequence[Point], base: tuple[Spread, Spread]) -> None:
    trained = {point.setting.name: point for point in points}
    for point in points:
        colour, marker = STYLES.get(point.setting.family, _OTHER)
        x, y = point.adaptation, point.retention
        if point.setting.dialled and (origin := trained.get(point.setting.trained_as)):
            ends = [origin.adaptation.mean, x.mean], [origin.retention.mean, y.mean]
            panel.plot(*ends, color=colour, linewidth=0.7, linestyle="--", alpha=0.5, zorder=1)
        _, _, bars = panel.errorbar(
            x.mean,
            y.mean,
            xerr=None if math.isnan(x.deviation) else x.deviation,
            yerr=None if math.isnan(y.deviation) else y.deviation,
            marker=marker,
            linestyle="",
            color=colour,
            elinewidth=1.0,
            markersize=7,
            markerfacecolor="white" if point.setting.dialled else colour,
            zorder=3,
        )
        for bar in bars:  # the spread behind, the means in front
            bar.set(alpha=0.35, zorder=2)
    panel.plot(base[0].mean, base[1].mean, marker="*", color="#000000", markersize=14, linestyle="", zorder=4)


def _corner(front: Sequence[Point], base: tuple[Spread, Spread]) -> tuple[float, float, float, float]:
    """Left, right, bottom and top of the closer view: the front's half with more adaptation, and some air."""
    best = front[0].adaptation.mean
    shown = [point for point in front if point.adaptation.mean >= best / 2]
    xs = [point.adaptation.mean for point in shown]
    ys = [point.retention.mean for point in shown] + [base[1].mean]
    width, height = max(xs) - min(xs), max(ys) - min(ys)
    air_x, air_y = max(0.15 * width, 0.02), max(0.15 * height, 0.01)
    return min(xs) - air_x, max(xs) + air_x, min(ys) - air_y, max(ys) + air_y


def _name_points(panel: Any, front: Sequence[Point], x: float, low: float, high: float) -> None:
    """Write the names of the front's points in a column, evenly spaced and in the points' order, a line to each."""
    left = panel.get_xlim()[0]
    named = [point for point in front if point.adaptation.mean >= left][:_LONGEST_LIST]
    named.sort(key=lambda point: point.retention.mean)
    for place, point in enumerate(named, start=1):
        panel.annotate(
            point.setting.name,
            (point.adaptation.mean, point.retention.mean),
            xytext=(x, low + (high - low) * place / (len(named) + 1)),
            fontsize=9,
            va="center",
            arrowprops={"arrowstyle": "-", "color": "#999999", "linewidth": 0.7, "shrinkB": 4, "relpos": (0, 0.5)},
        )


def _handle(family: str, *, filled: bool, label: str) -> Line2D:
    colour, marker = STYLES.get(family, _OTHER)
    return Line2D(
        [],
        [],
        marker=marker,
        color=colour,
        linestyle="",
        markersize=8,
        markerfacecolor=colour if filled else "white",
        label=label,
    )
