"""The report of a run: one table, one figure, made from measurements, never from models."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from qadapter.artifacts import write_json
from qadapter.report.figures import retention_against_adaptation
from qadapter.report.rows import METHOD_ORDER, Row, ordered, spread

# Column of the table → metric. Forgetting is base minus policy: positive is forgotten.
COLUMNS = {
    "adaptation": "adaptation/score",
    "pref. acc.": "adaptation/implied_reward_accuracy",
    "log-prob acc.": "adaptation/preference_accuracy_length_normalised",
    "retention": "retention/mean",
    "forgetting": "forgetting/mean",
    "KL/token": "forgetting/kl_per_token",
    "train s": "cost/train_seconds",
    "tokens/s": "cost/train_tokens_per_second",
    "memory MB": "cost/train_peak_memory_mb",
}
_DIGITS = {"train s": 1, "tokens/s": 0, "memory MB": 0}


def comparison(rows: Sequence[Row]) -> pd.DataFrame:
    """Domain × method, a column a measurement, `mean ± deviation` where several seeds ran; the domains' mean last."""
    domains: list[str | None] = [*ordered(row.domain for row in rows)]
    if len(domains) > 1:
        domains.append(None)
    methods = ordered((row.method for row in rows), METHOD_ORDER)
    table = []
    for domain in domains:
        for method in methods:
            if not any(row.method == method and domain in (None, row.domain) for row in rows):
                continue
            cells = {
                column: spread(rows, metric, domain, method).text(_DIGITS.get(column, 3))
                for column, metric in COLUMNS.items()
            }
            table.append({"domain": domain or "MEAN", "method": method, **cells})
    return pd.DataFrame(table)


def task_details(rows: Sequence[Row]) -> pd.DataFrame:
    """Every retention measure of every row, as numbers."""
    names = ordered(
        name for row in rows for name in row.metrics if name.startswith(("adaptation/", "retention/", "forgetting/"))
    )
    return pd.DataFrame(
        [
            {
                "domain": row.domain,
                "method": row.method,
                "seed": row.seed,
                **{n: row.metrics.get(n, math.nan) for n in names},
            }
            for row in rows
        ]
    )


def summary_metrics(rows: Sequence[Row]) -> dict[str, float]:
    """Each method's means over domains, for the run that stands for the whole comparison."""
    result = {}
    for method in ordered((row.method for row in rows), METHOD_ORDER):
        for name in ("adaptation/score", "retention/mean", "forgetting/mean", "forgetting/kl_per_token"):
            value = spread(rows, name, None, method)
            if value.n and not math.isnan(value.mean):
                result[f"mean/{name}/{method}"] = value.mean
    return result


def best_and_worst(rows: Sequence[Row]) -> list[str]:
    """Sentences computed from the means over domains: who adapts most and who keeps most, of those measured."""
    base = spread(rows, "retention/mean", None, "base")
    sentences = {
        "Adaptation": "adaptation/score",
        f"Retention (the base has {base.text()})" if base.n else "Retention": "retention/mean",
    }
    result = []
    for subject, metric in sentences.items():
        found = {m: spread(rows, metric, None, m) for m in ordered((row.method for row in rows), METHOD_ORDER)}
        ranked = sorted((m for m in found if m != "base" and found[m].n), key=lambda m: -found[m].mean)
        if ranked:
            result.append(f"{subject}, best first: " + ", ".join(f"{m} {found[m].mean:.3f}" for m in ranked) + ".")
    return result


def build_report(rows: Sequence[Row], *, title: str, data: dict[str, dict[str, float]], out: Path) -> None:
    """Write `report.md`, `comparison.csv`, `details.csv`, `retention_adaptation.png` and `metrics.json`.

    Args:
        rows: one a policy.
        title: the experiment's name.
        data: source → counts of `summary.json` (read, used, quarantined, train and held-out pairs).
        out: an empty folder.
    """
    table = comparison(rows)
    table.to_csv(out / "comparison.csv", index=False)
    task_details(rows).to_csv(out / "details.csv", index=False)
    retention_against_adaptation(rows, out / "retention_adaptation.png", title)
    counts = pd.DataFrame([{"source": name, **values} for name, values in data.items()])
    measures = ordered(
        name for row in rows for name in row.metrics if name.startswith("retention/") and name != "retention/mean"
    )
    methods = ordered((row.method for row in rows), METHOD_ORDER)
    details = pd.DataFrame(
        [
            {"measure": name.removeprefix("retention/"), **{m: spread(rows, name, None, m).text() for m in methods}}
            for name in measures
        ]
    )
    sections = [
        f"# {title}",
        *best_and_worst(rows),
        "## Comparison",
        _markdown(table),
        "*adaptation*: the toy world's exact rule, or where there is none the *pref. acc.*: share of held-out pairs "
        "whose implied reward (log-ratio to the base) prefers the chosen reply, ties one half. *log-prob acc.*: the "
        "same by length-normalised log-probability, no base involved. *retention*: mean accuracy over the retention "
        "tasks. *forgetting*: the base's retention minus the policy's, positive is forgotten. *KL/token*: KL(base ‖ "
        "policy) on held-out helpful replies.",
        "![retention against adaptation](retention_adaptation.png)",
        "## Retention by task, mean over domains",
        _markdown(details),
        "## Data",
        _markdown(counts),
    ]
    (out / "report.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    write_json(out / "metrics.json", summary_metrics(rows))


def _markdown(table: pd.DataFrame) -> str:
    """A table with its cells as they are: tabulate would read `0.900` as a number and write `0.9`."""
    return str(table.to_markdown(index=False, disable_numparse=True))
