"""Retention against adaptation: the means over domains large, the domains small beside them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from qadapter.report.front import pareto_front
from qadapter.report.intervals import Measured
from qadapter.report.rows import kind
from qadapter.report.summary import points

# Okabe and Ito's palette: colour-blind readers can tell its colours apart; the markers differ too.
STYLES = {
    "base": ("#000000", "*"),
    "q-adapter": ("#D55E00", "o"),
    "sft": ("#0072B2", "s"),
    "dpo": ("#009E73", "^"),
    "replay": ("#CC79A7", "D"),
}
_OTHERS = (("#56B4E9", "v"), ("#E69F00", "P"), ("#7F7F7F", "X"), ("#B8A800", "<"), ("#5D3A9B", ">"))


def styles_of(methods: list[str]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each method; a second variant of one (`dpo (other run)`) gets its own."""
    styles: dict[str, tuple[str, str]] = {}
    others = 0
    for method in methods:
        known = STYLES.get(kind(method))
        if known is None or known in styles.values():
            known = _OTHERS[others % len(_OTHERS)]
            others += 1
        styles[method] = known
    return styles


def retention_against_adaptation(measured: Measured, file: Path, title: str) -> Figure:
    """Draw every policy: to the right is more learnt, up is more kept; error bars are 95 % intervals.

    Drawn without pyplot, so that it works in any thread. Returns the figure as drawn.
    """
    domains = measured.domains
    styles = styles_of(measured.methods)
    small = domains if len(domains) > 1 else []
    columns = (len(small) + 1) // 2
    figure = Figure(figsize=(6.4 + 2.9 * columns, 6.6), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(2, 2 + columns)
    main = figure.add_subplot(grid[:, :2])
    _panel(main, measured, None if small else domains[0], styles, size=13)
    main.set_title("mean over domains" if small else domains[0], fontweight="bold")
    main.set_xlabel("learnt: adaptation score")
    main.set_ylabel("kept: retention, mean over tasks")
    shared: Axes | None = None
    for place, domain in enumerate(small):
        panel = figure.add_subplot(grid[place // columns, 2 + place % columns], sharex=shared, sharey=shared)
        shared = shared or panel
        _panel(panel, measured, domain, styles, size=9)
        panel.set_title(domain, fontsize=10)
        panel.tick_params(labelsize=8)
    handles: list[Any] = [
        Line2D(
            [], [], color=colour, marker=marker, linestyle="", markersize=10, **_hollow(method, colour), label=method
        )
        for method, (colour, marker) in styles.items()
    ]
    handles.append(Line2D([], [], color="#666666", linestyle="--", linewidth=1, label="Pareto front"))
    handles.append(Line2D([], [], color="#000000", linestyle=":", linewidth=0.8, label="what the base keeps"))
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 7), frameon=False)
    figure.suptitle(title)
    figure.savefig(file, dpi=130)
    return figure


def _hollow(method: str, colour: str) -> dict[str, Any]:
    """Hollow markers but for the base's, so that two policies at one place can both be seen."""
    return {
        "markerfacecolor": colour if kind(method) == "base" else "none",
        "markeredgewidth": 1.0 if kind(method) == "base" else 2.2,
    }


def _panel(
    axes: Axes, measured: Measured, domain: str | None, styles: dict[str, tuple[str, str]], *, size: float
) -> None:
    found = points(measured.rows, domain)
    for method, (x, y) in found.items():
        colour, marker = styles[method]
        learnt, kept = measured.score(method, domain), measured.retention(method, domain)
        axes.errorbar(
            x,
            y,
            xerr=[[max(x - learnt.low, 0)], [max(learnt.high - x, 0)]] if learnt else None,
            yerr=[[max(y - kept.low, 0)], [max(kept.high - y, 0)]] if kept else None,
            fmt=marker,
            color=colour,
            elinewidth=1,
            markersize=size * (1.2 if kind(method) == "base" else 1),
            capsize=2.5,
            **_hollow(method, colour),
        )
        if kind(method) == "base":
            axes.axhline(y, color=colour, linewidth=0.8, linestyle=":", zorder=0)
    front = sorted(found[method] for method in pareto_front(found))
    if len(front) > 1:  # stairs: what lies below and to the left of a corner is beaten by it
        axes.step(*zip(*front, strict=True), where="pre", color="#666666", linestyle="--", linewidth=1, zorder=0)
    axes.grid(alpha=0.25)
    axes.margins(0.1)
