"""The report of a sweep: every setting with its spread, the Pareto front, and which setting each rule would choose."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean

import pandas as pd

from qadapter.evaluation.statistics import across_seeds
from qadapter.files.artifacts import write_json
from qadapter.files.shown import to_csv
from qadapter.methods.table import NAMES, SUBJECT, knobs
from qadapter.report import markdown
from qadapter.report.budget import LEGEND as BUDGET_LEGEND
from qadapter.report.budget import MethodCurve, budget_metrics, budget_sentences, budget_table, curves_of
from qadapter.report.judges import judged_by_chance, left_out_sentence, without_win_rates_by_chance
from qadapter.report.rows import Row, Spread, listed, ordered, spread
from qadapter.report.sweep.equal import equal_budgets_section
from qadapter.report.sweep.figure import draw_sweep
from qadapter.report.sweep.halves import halves_section
from qadapter.report.sweep.points import (
    BASE,
    KEPT,
    MEASURED,
    Point,
    Setting,
    best_by_trade,
    best_that_keeps,
    chosen_on_other_seeds,
    front_area,
    front_of,
    learnt,
    points_of,
    rank,
)
from qadapter.report.sweep.sentences import difference_table, edge_sentences, largest_front

_KNOBS = {knob.label: knob.name for knob in knobs().values() if knob.label and knob.swept}


def build_sweep_report(
    rows: Sequence[Row],
    settings: Sequence[Setting],
    *,
    expected: int,
    title: str,
    out: Path,
    confirm_seeds: Sequence[int] = (),
) -> None:
    """Write `sweep.md`, `sweep.csv` (every measurement), `settings.json`, `sweep.png` and `metrics.json`.

    Args:
        rows: one per domain, setting (as `method`) and seed, and those of the base.
        settings: all settings of the sweep, including those without a row.
        expected: rows that a complete setting has.
        title: of page and figure.
        out: an empty folder.
        confirm_seeds: those of the rows with which only chosen settings were trained. They are reported where settings
            are chosen on one half of the items, and nowhere else.
    """
    to_csv(_all_rows(rows, settings), out / "sweep.csv")
    rows = without_win_rates_by_chance(rows)
    confirming = [row for row in rows if row.seed in confirm_seeds]
    rows = [row for row in rows if row.seed not in confirm_seeds]
    points = points_of(rows, settings, expected)
    compared = [point for point in points if point.complete and point.speaks]
    base_rows = [row for row in rows if row.method == BASE]
    write_json(out / "settings.json", [asdict(setting) for setting in settings])
    front = front_of(compared)
    base = {name: spread(base_rows, name, None, BASE) for name in MEASURED}
    ends = (base["adaptation/score"], base["retention/mean"])
    draw_sweep(compared, front, ends, out / "sweep.png", title)
    silent = [point.setting.name for point in points if not point.speaks]
    missing = [s.name for s in settings if s.name not in {*silent, *(point.setting.name for point in compared)}]
    sections = [
        f"# {title}",
        *([f"Not complete, so listed but not compared: {', '.join(missing)}."] if missing else []),
        *([f"Do not answer in language, so listed but not compared: {', '.join(silent)}."] if silent else []),
        f"{len(compared)} settings, each with {expected} training{'' if expected == 1 else 's'} (domains × seeds). "
        f"The base: adaptation {ends[0].text()}, retention {ends[1].text()}.",
        *([left_out] if (left_out := left_out_sentence(judged_by_chance(rows))) else []),
        "![retention against adaptation](sweep.png)",
    ]
    metrics: dict[str, float] = {"sweep/settings": float(len(compared))}
    if compared:
        tuned = {m: [p for p in compared if p.setting.tuning and p.setting.method == m] for m in _methods(compared)}
        tuned = {method: own for method, own in tuned.items() if own}
        section, of_halves = halves_section(rows, settings, expected, confirming)
        metrics |= of_halves
        sections += _comparison(tuned, metrics) + ([section] if section else []) + _choices(compared, tuned, metrics)
        sections += ["## Every setting", _markdown(_table(points, front, base, base_rows)), _LEGEND]
    curves = curves_of(rows)
    if (budgets := budget_table(curves)) is not None:
        ranked = _whole(curves, rows, [point.setting.name for point in compared])
        of_budgets, of_methods = equal_budgets_section(ranked, settings)
        sections += [*of_budgets, "## Every setting at equal budgets"]
        sections += [
            "\n".join(f"- {line}" for line in budget_sentences(ranked)),
            markdown.table(budgets),
            BUDGET_LEGEND,
        ]
        metrics |= {**budget_metrics(curves), **of_methods}
    (out / "sweep.md").write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    write_json(out / "metrics.json", metrics)


_LEGEND = (
    "Mean ± standard deviation over seeds, of means over domains. *learnt*: adaptation as a share of what can be "
    "learnt: an exact rule's share as it is, an implied-reward accuracy, of which a policy that does nothing has "
    "0.5, as 2 · accuracy − 1. *kept*: retention as a share of the base's. *trade*: harmonic mean of learnt "
    "(at least 0) and kept (at most 1). *win rate*: against the base's answers, by the judge. *KL/token*: "
    "KL(base ‖ policy) on held-out helpful replies. *front*: no other setting has more of one of adaptation and "
    "retention without less of the other. A setting called `…, then α0=…` is the adapter of the setting before the "
    "comma, measured with another α0."
)


def _whole(curves: Sequence[MethodCurve], rows: Sequence[Row], compared: Sequence[str]) -> list[MethodCurve]:
    """The curves of the settings that are compared, where every seed has one; the others are listed only."""
    trained = Counter((row.domain, row.method) for row in rows)
    return [one for one in curves if one.method in compared and len(one.curves) == trained[one.domain, one.method]]


def _comparison(tuned: dict[str, list[Point]], metrics: dict[str, float]) -> list[str]:
    """The methods, each with its own tuning, and how sure the difference to the Q-Adapter is."""
    if not tuned:
        return []
    table, elsewhere = [], {method: chosen_on_other_seeds(own) for method, own in tuned.items()}
    for method, own in tuned.items():
        by_trade, keeping = best_by_trade(own), best_that_keeps(own)
        metrics[f"sweep/trade/{method}"] = by_trade.trade
        metrics[f"sweep/front_area/{method}"] = front_area(own)
        table.append(
            {
                "method": method,
                "settings": str(len(own)),
                "best trade": by_trade.setting.name,
                "adaptation": by_trade.adaptation.text(),
                "win rate": by_trade.win_rate.text(),
                "retention": by_trade.retention.text(),
                "trade": f"{by_trade.trade:.3f}",
                "chosen on other seeds": Spread.of(elsewhere[method].values()).text(),
                f"most adaptation, {KEPT:.0%} kept": f"{keeping.adaptation.mean:.3f} ({keeping.setting.name})"
                if keeping
                else "none keeps that much",
                "front area": f"{front_area(own):.3f}",
            }
        )
    sentences = []
    ours = elsewhere.get(SUBJECT.name, {})
    for method, theirs in elsewhere.items():
        if method == SUBJECT.name or not ours or ours.keys() != theirs.keys():
            continue
        interval = across_seeds([ours[seed] - theirs[seed] for seed in ours], bounds=(-1, 1))
        verdict = "larger than the noise" if interval.excludes_zero else "not larger than the noise"
        sentences.append(
            f"- {SUBJECT.name} − {method}: {interval.as_difference()} "
            f"(95 %, Student, {interval.seeds} seeds): {verdict}."
        )
        metrics[f"sweep/trade_difference/{method}"] = interval.estimate
    trades = {method: f"{best_by_trade(own).trade:.3f}" for method, own in tuned.items()}
    winners = [method for method, value in trades.items() if value == max(trades.values())]
    return [
        "## The methods, each tuned with the same number of settings",
        f"The best trade, {max(trades.values())}, is reached by {listed(winners)}. "
        + largest_front({method: front_area(own) for method, own in tuned.items()}),
        _markdown(pd.DataFrame(table)),
        "*chosen on other seeds*: the trade where, seed by seed, the setting was chosen on the others, so that no "
        "method profits from chance. *front area*: of all pairs (learnt, kept) that the method's settings reach or "
        "beat.",
        *([on_edges] if (on_edges := edge_sentences(tuned)) else []),
        *(["Difference of *chosen on other seeds*, paired by seed:\n\n" + "\n".join(sentences)] if sentences else []),
    ]


def _choices(compared: Sequence[Point], tuned: Mapping[str, list[Point]], metrics: dict[str, float]) -> list[str]:
    """What each rule chooses of everything, ablations included, its lead over each method, the families' fronts."""
    trained = [point for point in compared if not point.setting.dialled]
    best, keeping = best_by_trade(compared), best_that_keeps(compared)
    metrics["sweep/best_trade"] = best.trade
    lines = [
        f"- Highest trade: **{best.setting.name}**: adaptation {best.adaptation.text()}, retention "
        f"{best.retention.text()}, trade {best.trade:.3f}.",
        f"- Most adaptation of those that keep {KEPT:.0%} of the base's retention: "
        + (
            f"**{keeping.setting.name}**: adaptation {keeping.adaptation.text()}, retention {keeping.retention.text()}."
            if keeping
            else "none keeps that much."
        ),
    ]
    table, areas = [], {}
    for family in ordered(point.setting.family for point in trained):
        own = [point for point in trained if point.setting.family == family]
        area = areas[family] = front_area(own)
        table.append(
            {
                "family": family,
                "settings": str(len(own)),
                "front area": f"{area:.3f}",
                "best trade": f"{best_by_trade(own).trade:.3f} ({best_by_trade(own).setting.name})",
            }
        )
    fronts = largest_front(areas) if table else ""
    if len({row["settings"] for row in table}) > 1:
        fronts += " Families have different numbers of settings here"
        fronts += "; compare methods by the first table." if tuned else "."
    return [
        "## The best setting of all, ablations included",
        "\n".join(lines),
        *difference_table(best, {method: best_by_trade(own) for method, own in tuned.items()}, len(compared)),
        *([_markdown(pd.DataFrame(table)), fronts] if table else []),
    ]


def _table(
    points: Sequence[Point], front: Sequence[Point], base: Mapping[str, Spread], base_rows: Sequence[Row]
) -> pd.DataFrame:
    """One line per setting, the best trade first, and the base's below them."""
    on_front = {point.setting.name for point in front}
    knobs = {label: knob for label, knob in _KNOBS.items() if any(knob in p.setting.settings for p in points)}
    adaptation, win_rate, retention, forgetting, kl = (base[name].text() for name in MEASURED)
    of_base = {
        "setting": BASE,
        "adaptation": adaptation,
        "win rate": win_rate,
        "learnt": f"{fmean(learnt(row.metrics) for row in base_rows):.3f}",
        "retention": retention,
        "forgetting": forgetting,
        "KL/token": kl,
        "kept": "1.000",
        "cells": str(len(base_rows)),
    }
    table = pd.DataFrame(
        [
            {
                "setting": point.setting.name,
                "groups": ", ".join(point.setting.groups),
                **{
                    label: f"{point.setting.settings[knob]:g}" if knob in point.setting.settings else ""
                    for label, knob in knobs.items()
                },
                "adaptation": point.adaptation.text(),
                "win rate": point.win_rate.text(),
                "learnt": f"{point.learnt:.3f}",
                "retention": point.retention.text(),
                "forgetting": point.forgetting.text(),
                "KL/token": point.kl.text(),
                "kept": f"{point.kept:.3f}",
                "trade": f"{point.trade:.3f}",
                "front": "●" if point.setting.name in on_front else "",
                "cells": str(point.cells),
            }
            for point in sorted(
                points, key=lambda p: (not (p.complete and p.speaks), *(-n for n in rank(p.trade, p.kl.mean)))
            )
        ]
    )
    return pd.concat([table, pd.DataFrame([of_base])], ignore_index=True).fillna("")


def _all_rows(rows: Sequence[Row], settings: Sequence[Setting]) -> pd.DataFrame:
    """One line per domain, setting and seed with every measurement, for further plots."""
    by_name = {setting.name: setting for setting in settings}
    names = ordered(name for row in rows for name in row.metrics)
    table = []
    for row in rows:
        setting = by_name.get(row.method)
        described = {
            "variant": row.method,
            "method": setting.method if setting else row.method,
            "family": setting.family if setting else row.method,
            "groups": " ".join(setting.groups) if setting else "",
            "tuning": bool(setting and setting.tuning),
            "trained_as": setting.trained_as if setting else "",
            **{knob: setting.settings.get(knob, math.nan) if setting else math.nan for knob in _KNOBS.values()},
        }
        measured = {name: row.metrics.get(name, math.nan) for name in names}
        table.append({**described, "domain": row.domain, "seed": row.seed, **measured})
    return pd.DataFrame(table)


def _methods(points: Sequence[Point]) -> list[str]:
    return ordered((point.setting.method for point in points), NAMES)


def _markdown(table: pd.DataFrame) -> str:
    """A table with its cells as they are."""
    return str(table.to_markdown(index=False, disable_numparse=True))
