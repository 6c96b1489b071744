"""The report's figure: retention against adaptation, the base marked, one panel a domain and one for their mean."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qadapter.report.rows import METHOD_ORDER, Row, ordered, spread

# Okabe and Ito's palette: colour-blind readers can tell its colours apart; the markers differ too.
STYLES = {
    "base": ("#000000", "*"),
    "q-adapter": ("#D55E00", "o"),
    "sft": ("#0072B2", "s"),
    "dpo": ("#009E73", "^"),
    "replay": ("#CC79A7", "D"),
}


def retention_against_adaptation(rows: Sequence[Row], file: Path, title: str) -> None:
    """Draw every policy: to the right is more learnt, up is more kept; error bars are one deviation over seeds.

    Drawn without pyplot, so that it works in any thread.
    """
    domains: list[str | None] = [*ordered(row.domain for row in rows)]
    if len(domains) > 1:
        domains.append(None)
    methods = ordered((row.method for row in rows), METHOD_ORDER)
    columns = min(3, len(domains))
    lines = math.ceil(len(domains) / columns)
    figure = Figure(figsize=(4.2 * columns, 3.6 * lines + 0.9), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for panel, domain in zip(axes.flat, domains, strict=False):
        panel.set_title(domain or "mean over domains", fontsize=11, fontweight="bold" if domain is None else None)
        for method in methods:
            adaptation = spread(rows, "adaptation/score", domain, method)
            retention = spread(rows, "retention/mean", domain, method)
            if not (adaptation.n and retention.n):
                continue
            colour, marker = STYLES.get(method, ("#56B4E9", "v"))
            panel.errorbar(
                adaptation.mean,
                retention.mean,
                xerr=None if math.isnan(adaptation.deviation) else adaptation.deviation,
                yerr=None if math.isnan(retention.deviation) else retention.deviation,
                fmt=marker,
                color=colour,
                markersize=11,
                # hollow, so that two policies at one place can both be seen
                markerfacecolor=colour if method == "base" else "none",
                markeredgewidth=1.0 if method == "base" else 2.2,
                capsize=3,
                label=method,
            )
            if method == "base":
                panel.axhline(retention.mean, color=colour, linewidth=0.8, linestyle=":", zorder=0)
        panel.grid(alpha=0.25)
    for panel in axes.flat[len(domains) :]:
        panel.set_visible(False)
    for panel in axes[-1, :]:
        panel.set_xlabel("adaptation (share of held-out items)")
    for panel in axes[:, 0]:
        panel.set_ylabel("retention (mean over tasks)")
    axes[0, 0].margins(0.12)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.suptitle(title)
    figure.savefig(file, dpi=130)
