"""The report's section on the quality of the data: one row per source, and what to look at."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd

LEGEND = (
    "Over the prepared pairs of each source. *longer*: the chosen reply is the longer one. *near-duplicate*: prompts "
    "that nearly repeat another one of the source (MinHash, similarity 0.8). *held out ≈ trained*: held-out prompts "
    "that nearly repeat a training prompt; equal ones are on one side only, by the split. *benchmark items*: items of "
    "the retention benchmarks in training prompts. docs/data.md defines each."
)


def quality_table(reports: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame | None:
    """A row per source; None where nothing was measured.

    Args:
        reports: source to what `qadapter.preferences.quality.measure` found.
    """
    if not reports:
        return None
    return pd.DataFrame([{"source": name, **_row(report)} for name, report in reports.items()])


def _row(report: Mapping[str, Any]) -> dict[str, str]:
    length, near, contamination = report["length"], report["near"], report["contamination"]
    scripts = [f"{name} {share:.0%}" for name, share in list(report["script"].items())[:3]]
    languages = [f"{name} {share:.0%}" for name, share in list(report["language"].items())[:3]]
    shared = sum(counts["shared"] for counts in (contamination or {}).values())
    return {
        "pairs": f"{report['pairs']:,}",
        "prompts": f"{report['prompts']:,}",
        "median characters (prompt, chosen, rejected)": " / ".join(
            f"{length[part]['median']:,}" for part in ("prompt", "chosen", "rejected")
        ),
        "longer": f"{report['longer_chosen']:.0%}",
        "near-duplicate": f"{near['near_duplicates']:,} of {near['compared']:,}",
        "held out ≈ trained": f"{near['across']:,}",
        "benchmark items": "–" if contamination is None else f"{shared:,}",
        "refused (chosen, rejected)": f"{report['refused']['chosen']:.0%} / {report['refused']['rejected']:.0%}",
        "empty, ties": f"{report['empty_replies']:,} / {report['ties']:,}",
        "languages": ", ".join(languages),
        "scripts": ", ".join(scripts),
    }


def quality_warnings(reports: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What to look at, as sentences that name the source."""
    return [f"{name}: {line}" for name, report in reports.items() for line in report["warnings"]]
