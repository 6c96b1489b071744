"""The curves of all methods along their dial: retention against adaptation, a panel per domain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from qadapter.evaluation.curve.points import Curve
from qadapter.methods.method import Marker
from qadapter.policy.dial import DialKind
from qadapter.report.budget import MethodCurve, kinds_of
from qadapter.report.figures import styles_of
from qadapter.report.panels import panels
from qadapter.report.rows import ordered

DIAL_FIGURE = "curves_of_the_dial.png"
_DRAWS = 400
_DASHES: dict[DialKind, Literal["-", "--"]] = {"q-weight": "-", "scale": "--"}
Floats = NDArray[np.float64]
_MANY = 10  # methods: more need larger panels


@rc_context({"text.parse_math": False})
def dial_figure(curves: Sequence[MethodCurve], file: Path, title: str) -> Figure:
    """Draw the curve of each method with its band, the base, and the policies as trained.

    The band is the 95 % bootstrap interval of retention at each point, over items and seeds; the bands of many methods
    would cover each other and are left out. Large marks: as trained. With both kinds of dial the scale's curves are
    dashed.
    """
    domains = ordered(one.domain for one in curves)
    styles = styles_of(ordered(one.method for one in curves))
    many = len(styles) > _MANY
    figure, axes = panels(
        domains,
        beside=3,
        size=(7.0, 6.2) if many else (4.4, 4.2),
        margin=(0.0, 1.4 if many else 0.6),
        narrowest=6.0,
    )
    for domain, panel in axes.items():
        _panel(panel, [one for one in curves if one.domain == domain], styles, bands=not many)
        panel.set_xlabel("learnt: adaptation")
        panel.set_ylabel("kept: retention, mean over tasks")
    handles = [
        Line2D([], [], color=colour, marker=marker, markerfacecolor="none", label=method)
        for method, (colour, marker) in styles.items()
    ]
    if len(kinds := kinds_of(curves)) > 1:
        handles += [Line2D([], [], color="#555555", linestyle=_DASHES[kind], label=f"dial {kind}") for kind in kinds]
    handles.append(Line2D([], [], color="#000000", marker="*", linestyle="", markersize=11, label="base (dial 0)"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8 if many else 6), frameon=False)
    figure.suptitle(f"{title}: from the base over the policy as trained (large marks)")
    figure.savefig(file, dpi=130)
    return figure


def _panel(axes: Axes, curves: Sequence[MethodCurve], styles: dict[str, tuple[str, Marker]], *, bands: bool) -> None:
    for one in curves:
        colour, marker = styles[one.method]
        values, learnt, kept, low, high = _line(one.curves)
        axes.plot(learnt, kept, color=colour, marker=marker, markersize=4, linewidth=1.6, markerfacecolor="none",
                  linestyle=_DASHES[one.kind])  # fmt: skip
        if bands:
            axes.fill_between(learnt, low, high, color=colour, alpha=0.12, linewidth=0)
        trained = values.index(1.0)
        axes.plot(learnt[trained], kept[trained], color=colour, marker=marker, markersize=11, markerfacecolor="none",
                  markeredgewidth=2.2)  # fmt: skip
        axes.plot(learnt[:1], kept[:1], color="#000000", marker="*", markersize=11, zorder=5)
    axes.grid(alpha=0.25)
    axes.margins(0.06)


def _line(curves: Sequence[Curve]) -> tuple[list[float], Floats, Floats, Floats, Floats]:
    """Values, adaptation, retention and the ends of its band, at the values that every seed has."""
    common = sorted(set.intersection(*({point.value for point in curve.points} for curve in curves)))
    points = [[next(p for p in curve.points if p.value == value) for curve in curves] for value in common]
    learnt = np.array([np.mean([point.learnt.mean for point in row]) for row in points])
    kept = np.array([np.mean([point.retention for point in row]) for row in points])
    rng = np.random.default_rng(0)
    of_seeds = rng.multinomial(len(curves), [1 / len(curves)] * len(curves), size=_DRAWS) / len(curves)
    tasks = [name for name, task in points[0][0].kept.items() if task.higher]
    draws = np.zeros((_DRAWS, len(common)))
    for name in tasks:
        table = np.array([[point.kept[name].values for point in row] for row in points])  # [P, S, n]
        count = table.shape[2]
        of_items = rng.multinomial(count, [1 / count] * count, size=_DRAWS) / count
        draws += np.einsum("psn,rn,rs->rp", table, of_items, of_seeds, optimize=True) / len(tasks)
    low, high = np.quantile(draws, [0.025, 0.975], axis=0)
    return common, learnt, kept, low, high
