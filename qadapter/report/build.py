"""The report of a comparison, made from measurements, never from models."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from qadapter.files.artifacts import write_json
from qadapter.files.shown import to_csv
from qadapter.report import markdown
from qadapter.report.answers import answers_table, side_by_side
from qadapter.report.budget import LEGEND as BUDGET_LEGEND
from qadapter.report.budget import (
    VALUES_LEGEND,
    budget_metrics,
    budget_sentences,
    budget_table,
    curves_of,
    values_table,
)
from qadapter.report.cards import write_cards
from qadapter.report.curves import training_curves
from qadapter.report.decision import Decision, decide_for_reader
from qadapter.report.dial_figure import DIAL_FIGURE, dial_figure
from qadapter.report.figures import retention_against_adaptation
from qadapter.report.intervals import Measured
from qadapter.report.items import refuse_other_items
from qadapter.report.judges import left_out_sentence
from qadapter.report.latex import latex
from qadapter.report.own_budget import LEGEND as OWN_BUDGET_LEGEND
from qadapter.report.own_budget import budget_of, own_budget_table
from qadapter.report.page import data_uri, page
from qadapter.report.quality import LEGEND as QUALITY_LEGEND
from qadapter.report.quality import quality_table, quality_warnings
from qadapter.report.rows import Row
from qadapter.report.speaking import silent_methods
from qadapter.report.summary import duels, first_sentences, summary_metrics
from qadapter.report.tables import (
    comparison,
    cost_table,
    domain_table,
    drift_table,
    forgetting_table,
    further_table,
    main_table,
    subtask_measures,
    task_details,
)

FIGURE = "retention_adaptation.png"
CURVES = "training_curves.png"
COUNTS = ("read", "used", "duplicates", "cross_split_prompts", "train_pairs", "heldout_pairs")
LEGEND = (
    "*adaptation*: the toy world's exact rule, or where there is none the *pref. acc.*: share of held-out pairs "
    "whose implied reward (log-ratio to the base) prefers the chosen reply, ties one half. *log-prob acc.*: the "
    "same by length-normalised log-probability, no base involved. *retention*: mean accuracy over the retention "
    "tasks. *forgetting*: the base's retention minus the policy's, positive is forgotten. *KL/token*: KL(base ‖ "
    "policy) on held-out helpful replies. ±: standard deviation over seeds."
)
MAIN_LEGEND = (
    "In brackets: 95 % interval of the paired difference to the base, over held-out items and seeds, around the base's "
    "own score. An arrow down: lower is better."
)
FORGETTING_LEGEND = (
    "Base minus policy (reversed where lower is better), mean over domains: positive is forgotten. In brackets the "
    "95 % interval, paired by item; a star: it excludes 0."
)
FURTHER_LEGEND = (
    "Mean over domains and seeds. In brackets, where the item scores are known: 95 % interval of the paired difference "
    "to the base, around the base's own value; elsewhere ±: standard deviation over seeds, where they differ."
)
DRIFT_LEGEND = (
    "Answers to held-out prompts of the old distribution and to benchmark questions in other words; policy minus base, "
    "mean over domains and seeds. In brackets: "
    "in how many trainings the 95 % interval, paired by prompt, excludes 0; a star: in most of them. Neither more nor "
    "less is better by itself."
)
COST_LEGEND = (
    "Mean over domains and seeds, ±: standard deviation over seeds, on the machine of the run. Peak memory: CUDA's "
    "where one was used, otherwise how far the process grew, which in a process that has trained before says little. "
    "Decoding: two digits, for the answers are few."
)


def build_report(
    rows: Sequence[Row],
    *,
    title: str,
    data: Mapping[str, Mapping[str, Any]],
    quality: Mapping[str, Mapping[str, Any]] | None = None,
    config: Mapping[str, Any],
    out: Path,
) -> None:
    """Write `report.md`, `report.html` (one file, complete in itself), `report.tex`, tables, figures and metrics.

    Args:
        rows: one per policy.
        title: title of the report.
        data: source → its `summary.json`: counts, reasons of the quarantine, digests.
        quality: source → its quality report (`qadapter.preferences.quality`).
        config: the experiment's settings.
        out: an empty folder; also receives `comparison.csv`, `details.csv`, `answers.csv` (if there are answers),
            `retention_adaptation.png`,
            `training_curves.png` (if curves were logged), `curves_of_the_dial.png` (if rows have a curve) and
            `metrics.json`, and a model card for each domain and method in `cards/`.
    """
    refuse_other_items(rows)
    measured = Measured(rows)
    long = comparison(rows)
    to_csv(long, out / "comparison.csv")
    to_csv(task_details(rows), out / "details.csv")
    answers = answers_table(rows)
    if len(answers):
        to_csv(answers, out / "answers.csv")
    retention_against_adaptation(measured, out / FIGURE, title)
    has_curves = training_curves(rows, out / CURVES, title)
    curves = curves_of(rows)
    if curves:
        dial_figure(curves, out / DIAL_FIGURE, title)
    main, fought = main_table(measured), duels(measured)
    legend = _main_legend(measured)
    (out / "report.tex").write_text(latex(main, f"{title}. {legend}"), encoding="utf-8")
    first, further = first_sentences(measured, config, fought)
    silent = silent_methods(measured.rows)
    content = {
        "title": title,
        "decision": decide_for_reader(measured),
        "sentences": [*first, *budget_sentences([one for one in curves if one.method not in silent])],
        "budgets": budget_table(curves),
        "values": values_table(curves),
        "own_budget": own_budget_table(curves, budget_of(config)),
        "notes": further,
        "main": main,
        "legend": legend,
        "forgetting": forgetting_table(measured),
        "further": further_table(measured),
        "further_legend": _further_legend(measured),
        "drift": drift_table(measured),
        "costs": cost_table(measured),
        "answers": side_by_side(rows),
        "counts": _counts(data),
        "quarantined": _quarantined(data),
        "quality": quality_table(quality or {}),
        "quality_warnings": quality_warnings(quality or {}),
        "config": yaml.safe_dump(dict(config), sort_keys=False, allow_unicode=True, width=110),
        "config_digest": hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest(),
    }
    (out / "report.md").write_text(_markdown(content, long, has_curves), encoding="utf-8")
    for_page = {
        "forgetting_legend": FORGETTING_LEGEND,
        "drift_legend": DRIFT_LEGEND,
        "cost_legend": COST_LEGEND,
        "quality_legend": QUALITY_LEGEND,
        "domains": [(domain, domain_table(measured, domain)) for domain in measured.domains],
        "figure": data_uri(out / FIGURE),
        "curves": data_uri(out / CURVES) if has_curves else "",
        "budget_legend": BUDGET_LEGEND,
        "values_legend": VALUES_LEGEND,
        "own_budget_legend": OWN_BUDGET_LEGEND,
        "dial_figure": data_uri(out / DIAL_FIGURE) if curves else "",
    }
    write_cards(measured, data, config, out)
    html = page({**content, **for_page, "sections": _sections(content, has_curves)})
    (out / "report.html").write_text(html, encoding="utf-8")
    write_json(out / "metrics.json", {**summary_metrics(measured, fought), **budget_metrics(curves)})


def _main_legend(measured: Measured) -> str:
    """The main table's, with a warning of methods that do not speak and of judges that may decide by chance."""
    legend, silent = MAIN_LEGEND, silent_methods(measured.rows)
    if silent:
        legend += f" Without a place in the comparison, because they do not speak: {', '.join(silent)}."
    return f"{legend} {left_out_sentence(measured.judged_by_chance)}".strip()


def _further_legend(measured: Measured) -> str:
    """The further table's, with the number of measures that only `details.csv` has."""
    left_out = len(subtask_measures(measured))
    return f"{FURTHER_LEGEND} {left_out} measures of groups' sub-tasks: in details.csv." if left_out else FURTHER_LEGEND


def _sections(content: Mapping[str, Any], has_curves: bool) -> list[tuple[str, str]]:
    """Anchor and name of each section of the page."""
    return [
        ("comparison", "Comparison"),
        *([("notes", "In sentences")] if content["notes"] else []),
        ("forgotten", "Forgotten"),
        ("trade", "Learnt against kept"),
        *([("budget", "At equal budgets")] if content["budgets"] else []),
        *([("curves", "Training curves")] if has_curves else []),
        ("domains", "Domain by domain"),
        ("further", "Further measures"),
        *([("drift", "Drift")] if content["drift"] else []),
        ("cost", "Cost"),
        *([("answers", "Answers")] if content["answers"] else []),
        ("data", "Data"),
        ("config", "Config"),
    ]


def _markdown(content: Mapping[str, Any], long: pd.DataFrame, has_curves: bool) -> str:
    quarantined = content["quarantined"]
    sections = [
        f"# {content['title']}",
        _decision(content["decision"]),
        "\n".join(f"- {sentence}" for sentence in content["sentences"]),
        "## Main table",
        markdown.table(content["main"]),
        f"{content['legend']} Bold: the best method of the column.",
        "## Comparison",
        markdown.frame(long),
        LEGEND,
        *(["## In sentences", "\n".join(f"- {sentence}" for sentence in content["notes"])] if content["notes"] else []),
        "## Forgotten",
        markdown.table(content["forgetting"]),
        FORGETTING_LEGEND,
        "## Learnt against kept",
        f"![retention against adaptation]({FIGURE})",
        *_budgets(content),
        *(["## Training curves", f"![training curves]({CURVES})"] if has_curves else []),
        "## Further measures",
        markdown.table(content["further"]),
        content["further_legend"],
        *(["## Drift", markdown.table(content["drift"]), DRIFT_LEGEND] if content["drift"] else []),
        "## Cost",
        markdown.table(content["costs"]),
        COST_LEGEND,
        *(["## Answers side by side", markdown.answers(content["answers"])] if content["answers"] else []),
        "## Data",
        markdown.frame(content["counts"]),
        *(["Quarantined records:", markdown.frame(quarantined)] if quarantined is not None else []),
        *_quality(content),
        "## Config",
        f"sha256 `{content['config_digest']}`",
        f"```yaml\n{content['config']}```",
    ]
    return "\n\n".join(sections) + "\n"


def _budgets(content: Mapping[str, Any]) -> list[str]:
    """The methods along their dial, where it was measured."""
    if content["budgets"] is None:
        return []
    return [
        "## At equal budgets",
        f"![curves of the dial]({DIAL_FIGURE})",
        markdown.table(content["budgets"]),
        BUDGET_LEGEND,
        *_own_budget(content),
        "### At each value of the dial",
        markdown.table(content["values"]),
        VALUES_LEGEND,
    ]


def _own_budget(content: Mapping[str, Any]) -> list[str]:
    table = content["own_budget"]
    return [] if table is None else ["### Under the profile's budget", markdown.table(table), OWN_BUDGET_LEGEND]


def _decision(found: Decision) -> str:
    """The box as a quotation."""
    return "\n>\n".join(
        [f"> **Recommendation.** {found.recommendation}", *(f"> **{about}.** {text}" for about, text in found.lines)]
    )


def _quality(content: Mapping[str, Any]) -> list[str]:
    if content["quality"] is None:
        return []
    warnings = "\n".join(f"- {line}" for line in content["quality_warnings"])
    return ["### Quality", *([warnings] if warnings else []), markdown.frame(content["quality"]), QUALITY_LEGEND]


def _counts(data: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame:
    """One row per source: the numbers of read and used records, and the first digits of the digests of the result."""
    return pd.DataFrame(
        [
            {
                "source": name,
                **{key: summary.get(key, "–") for key in COUNTS},
                "quarantined": sum(summary.get("quarantined", {}).values()),
                "train sha256": summary.get("train_sha256", "–")[:16],
                "held-out sha256": summary.get("heldout_sha256", "–")[:16],
            }
            for name, summary in data.items()
        ]
    )


def _quarantined(data: Mapping[str, Mapping[str, Any]]) -> pd.DataFrame | None:
    """A row a source and reason; None where nothing was quarantined."""
    found = [
        {"source": name, "reason": reason, "records": count}
        for name, summary in data.items()
        for reason, count in summary.get("quarantined", {}).items()
    ]
    return pd.DataFrame(found) if found else None
