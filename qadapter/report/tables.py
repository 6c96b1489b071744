"""The report's tables, as rows of cells that Markdown, HTML and LaTeX write each in its own way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import pandas as pd

from qadapter.evaluation.drift import MOVED, TRAITS
from qadapter.evaluation.items import owner
from qadapter.evaluation.statistics import Interval, signed
from qadapter.report.intervals import Measured
from qadapter.report.items import SCORE, WIN_RATE
from qadapter.report.rows import (
    Row,
    Spread,
    comparable_domains,
    groups_of,
    kind,
    methods_of,
    ordered,
    spread,
    spread_over,
)
from qadapter.report.speaking import silent_methods

# Column of the long table → metric. Forgetting is base minus policy: positive is forgotten.
COLUMNS = {
    "adaptation": SCORE,
    "pref. acc.": "adaptation/implied_reward_accuracy",
    "log-prob acc.": "adaptation/preference_accuracy_length_normalised",
    "retention": "retention/mean",
    "forgetting": "forgetting/mean",
    "KL/token": "forgetting/kl_per_token",
    "train s": "cost/train_seconds",
    "tokens/s": "cost/train_tokens_per_second",
}
_DIGITS = {"train s": 1, "tokens/s": 0}

COSTS = {
    "cost/train_seconds": ("training, s", 1),
    "cost/needs_seconds": ("what is made before the training and shared, s", 1),
    "cost/train_seconds_with_needs": ("training with what is made before it, s", 1),
    "cost/train_tokens": ("training, tokens", 0),
    "cost/generated_tokens": ("replies generated in training, tokens", 0),
    "cost/needs_generated_tokens": ("replies generated before the training and shared, tokens", 0),
    "cost/train_tokens_per_second": ("training, tokens/s", 0),
    "cost/train_peak_memory_mb": ("training, peak memory beyond the start, MB", 0),
    "cost/trainable_parameters": ("trainable parameters", 0),
    "cost/adapter_bytes": ("adapter, bytes", 0),
    "cost/decoding_tokens_per_second": ("decoding, tokens/s", 0),
    "cost/train_stage_seconds": ("whole training stage, s", 1),
    "cost/adaptation_stage_seconds": ("measuring what was learnt, s", 1),
    "cost/retention_stage_seconds": ("measuring what was kept, s", 1),
}

FURTHER = {
    "adaptation/implied_reward_accuracy": "preference accuracy, implied reward ↑",
    "adaptation/preference_accuracy": "preference accuracy, log-probability ↑",
    "adaptation/preference_accuracy_length_normalised": "preference accuracy, log-probability per token ↑",
    "adaptation/margin": "margin of the implied reward, nats",
    "adaptation/calibration": "calibration error of the implied reward ↓",
    "adaptation/exact_rule": "answers that follow the exact rule ↑",
    "adaptation/speaks": "answers in language (1) or not (0) ↑",
    "adaptation/broken_replies": "replies that are broken ↓",
    "adaptation/repetition": "replies' share that repeats itself ↓",
    "adaptation/replies_ended": "replies that ended by themselves ↑",
    "adaptation/reply_nll": "replies' surprise for the base, nats per token",
    "adaptation/kl_per_token": "KL(base ‖ policy) per token on the base's answers to new prompts, nats ↓",
    "adaptation/well_formed": "answers with the right attributes, in any style ↑",
    "adaptation/win_rate": "win rate of answers against the base ↑",
    "adaptation/ties": "ties, answers",
    "adaptation/undecided": "undecided, answers",
    "adaptation/judge_accuracy": "the judge's accuracy on held-out pairs ↑",
    "adaptation/judge_accuracy_low": "the judge's accuracy, low end of its 95 % interval ↑",
    "adaptation/judge_accuracy_high": "the judge's accuracy, high end of its 95 % interval ↑",
    "adaptation/judge_accuracy_n": "held-out pairs the judge was tried on",
    "adaptation/judge_order_agreement": "answers the judge decides alike in both orders ↑",
    "adaptation/n": "held-out pairs scored",
    "adaptation/left_out": "held-out pairs that cannot be scored",
    "retention/answers_identical": "the base's own answers that stay identical ↑",
    "retention/over_refusals": "harmless requests that are refused ↓",
    "forgetting/kl_per_token": "KL(base ‖ policy) per token on old text, nats ↓",
}
_COUNTS = {
    "adaptation/ties",
    "adaptation/undecided",
    "adaptation/judge_accuracy_n",
    "adaptation/n",
    "adaptation/left_out",
}


@dataclass(frozen=True)
class Cell:
    """One number as text.

    Attributes:
        text: the number, or `–`.
        interval: `[low, high]`, or nothing.
        best: whether no method is better.
        sure: whether the interval excludes no difference; only in tables of differences.
    """

    text: str
    interval: str = ""
    best: bool = False
    sure: bool = False

    @property
    def whole(self) -> str:
        """Number and interval on one line."""
        return f"{self.text} {self.interval}".strip()


@dataclass(frozen=True)
class Table:
    """Rows of cells under grouped headings.

    Attributes:
        corner: heading of the first column.
        groups: (heading, number of columns), left to right.
        columns: a heading each.
        rows: (label, cells).
        sections: (heading, number of rows), top to bottom; none: the rows are one list.
    """

    corner: str
    groups: tuple[tuple[str, int], ...]
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    sections: tuple[tuple[str, int], ...] = ()

    @property
    def parts(self) -> list[tuple[str, tuple[tuple[str, tuple[Cell, ...]], ...]]]:
        """Heading and rows of each section; one part without a heading where there are none."""
        found, start = [], 0
        for heading, count in self.sections or (("", len(self.rows)),):
            found.append((heading, self.rows[start : start + count]))
            start += count
        return found


def _by_group(
    corner: str,
    groups: tuple[tuple[str, int], ...],
    columns: Sequence[str],
    rows: tuple[tuple[str, tuple[Cell, ...]], ...],
) -> Table:
    """A table with a row per method."""
    return Table(corner, groups, tuple(columns), rows, groups_of([label for label, _ in rows]))


def number(value: float, digits: int = 3) -> str:
    """Fixed digits, thousands apart, `–` for what was not measured, and never -0.000."""
    return "–" if math.isnan(value) else f"{round(value, digits) + 0.0:,.{digits}f}"


def bracket(interval: Interval | None, digits: int = 3) -> str:
    """`[low, high]`, or nothing."""
    return f"[{number(interval.low, digits)}, {number(interval.high, digits)}]" if interval else ""


def comparison(rows: Sequence[Row]) -> pd.DataFrame:
    """Domain × method, a column a measurement, `mean ± deviation` where several seeds ran; the domains' mean last.

    A method that lacks a domain has no mean.
    """
    domains: list[str | None] = [*ordered(row.domain for row in rows)]
    if len(domains) > 1:
        domains.append(None)
    table = []
    for domain in domains:
        for method in methods_of(rows):
            if not any(row.method == method and domain in (None, row.domain) for row in rows):
                continue
            cells = {
                column: spread(rows, metric, domain, method).text(_DIGITS.get(column, 3))
                for column, metric in COLUMNS.items()
            }
            table.append({"domain": domain or "MEAN", "method": method, **cells})
    return pd.DataFrame(table)


def task_details(rows: Sequence[Row]) -> pd.DataFrame:
    """Every measure of what was learnt, kept and spent, of every row, as numbers."""
    kinds = ("adaptation/", "retention/", "forgetting/", "cost/")
    names = ordered(name for row in rows for name in row.metrics if name.startswith(kinds))
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


def main_table(measured: Measured) -> Table:
    """The paper's table: one row per method, with its adaptation per domain, then its retention per task.

    Tasks that are averaged only; those in other units (bits per byte) are in the tables below it. A method that lacks a
    domain has no mean over domains; if no method has all domains, the win rate is shown per domain.
    """
    learnt: list[str | None] = [*measured.domains, *([None] if len(measured.domains) > 1 else [])]
    kept: list[str | None] = [*measured.accuracies, None]
    rows = []
    for method in measured.methods:
        scores = [
            (spread(measured.rows, SCORE, domain, method), measured.score(method, domain), True) for domain in learnt
        ]
        scores += [
            (
                spread(measured.rows, name or "retention/mean", None, method),
                measured.retention(method, None, name),
                measured.higher.get(name or "", True),
            )
            for name in kept
        ]
        rows.append((method, scores))
    won = comparable_domains(measured.rows, WIN_RATE)
    for method, scores in rows:
        scores += [(*measured.win_rate(method, domains), True) for domains in won]
    columns = [domain or "mean" for domain in learnt] + [_task(measured, name) if name else "mean" for name in kept]
    columns += ["win rate" if domains == measured.domains else f"win rate ({', '.join(domains)})" for domains in won]
    groups: tuple[tuple[str, int], ...] = (
        ("Learnt: adaptation score", len(learnt)),
        ("Kept: retention, mean over domains", len(kept)),
        *([("Won", len(won))] if won else []),
    )
    return _by_group("method", groups, columns, _marked(rows, silent_methods(measured.rows)))


def domain_table(measured: Measured, domain: str) -> Table:
    """The table of one domain: one row per method."""
    rows = []
    for method in methods_of(row for row in measured.rows if row.domain == domain):
        scores = [(spread(measured.rows, SCORE, domain, method), measured.score(method, domain), True)]
        for name in [*measured.measures, None]:
            found = spread(measured.rows, name or "retention/mean", domain, method)
            scores.append((found, measured.retention(method, domain, name), measured.higher.get(name or "", True)))
        for name in ("forgetting/kl_per_token", "adaptation/kl_per_token"):
            scores.append((spread(measured.rows, name, domain, method), None, False))
        rows.append((method, scores))
    columns = ["score", *(_task(measured, name) for name in measured.measures), "mean", "old text ↓", "new prompts ↓"]
    groups = (("Learnt", 1), ("Kept", len(measured.measures) + 1), ("KL(base ‖ policy) per token", 2))
    return _by_group("method", groups, columns, _marked(rows, silent_methods(measured.rows)))


def _task(measured: Measured, name: str) -> str:
    """`toy_facts` of `retention/toy_facts/exact_match`, an arrow where lower is better."""
    _, task, metric = name.split("/")
    label = task if sum(other.split("/")[1] == task for other in measured.measures) == 1 else f"{task} {metric}"
    return label if measured.higher.get(name, True) else f"{label} ↓"


def _marked(
    rows: Sequence[tuple[str, list[tuple[Spread, Interval | None, bool]]]], silent: Sequence[str]
) -> tuple[tuple[str, tuple[Cell, ...]], ...]:
    """Cells with the best method of each column marked, ties all of them.

    Neither the base nor a method that does not speak is compared.
    """
    ranked = [method for method, _ in rows if kind(method) != "base" and method not in silent]
    marked = []
    for method, scores in rows:
        cells = []
        for column, (found, interval, higher) in enumerate(scores):
            rivals = [round(row[column][0].mean, 3) for m, row in rows if m in ranked and row[column][0].n]
            best = bool(rivals) and found.n > 0 and method in ranked and len(rivals) > 1
            best = best and round(found.mean, 3) == (max(rivals) if higher else min(rivals))
            text = number(found.mean)
            if interval is None and not math.isnan(found.deviation):
                text = found.text()
            cells.append(Cell(text, bracket(interval), best))
        marked.append((method, tuple(cells)))
    return tuple(marked)


def forgetting_table(measured: Measured) -> Table:
    """Base minus policy (reversed where lower is better), mean over domains, with paired intervals."""
    names: list[str | None] = [*measured.measures, None]
    rows = []
    for method in (m for m in measured.methods if kind(m) != "base"):
        cells = []
        for name in names:
            metric = name.replace("retention/", "forgetting/", 1) if name else "forgetting/mean"
            sample = measured.forgetting(method, measured.domains, name)
            value = spread(measured.rows, metric, None, method).mean
            cells.append(difference_cell(value, sample.interval if sample else None))
        rows.append((method, tuple(cells)))
    columns = [_task(measured, name).removesuffix(" ↓") if name else "mean" for name in names]
    return _by_group("method", (("Forgotten: base minus policy", len(columns)),), columns, tuple(rows))


def difference_cell(value: float, interval: Interval | None) -> Cell:
    """A difference, marked as sure where its interval excludes 0."""
    return Cell(number(value), bracket(interval), sure=interval is not None and interval.excludes_zero)


def further_table(measured: Measured) -> Table:
    """All other measures of learning and forgetting: one row per measure, means over domains and seeds.

    Those of a group's sub-tasks, of which one group can have dozens, are left out.
    """
    shown = {SCORE, "retention/mean", "forgetting/mean", *measured.measures}
    names = ordered(
        (name for row in measured.rows for name in row.metrics if name.startswith(("adaptation/", "retention/"))),
        list(FURTHER),
    )
    names += [n for n in FURTHER if n.startswith("forgetting/") and any(n in row.metrics for row in measured.rows)]
    shown |= set(subtask_measures(measured))
    names = [name for name in dict.fromkeys(names) if name not in shown]
    return _by_measure(measured, {name: (FURTHER.get(name, name), 1 if name in _COUNTS else 3) for name in names})


def subtask_measures(measured: Measured) -> list[str]:
    """The measures of tasks that are measured as part of a group: `retention/mmlu_anatomy/acc` of `mmlu`."""
    groups = {name.split("/")[1] for name in measured.measures}
    names = dict.fromkeys(name for row in measured.rows for name in row.metrics if name.startswith("retention/"))
    tasks = {name: name.split("/")[1] for name in names if name.count("/") == 2}
    return [name for name, task in tasks.items() if owner(task, groups) not in ("", task)]


def drift_table(measured: Measured) -> Table | None:
    """How far each method's answers to old prompts moved from its base's; None where nothing was measured.

    One row per trait, and per group of domains over which the methods can be compared.
    """
    methods = [m for m in measured.methods if kind(m) != "base" and any(MOVED in r.metrics for r in _of(measured, m))]
    if not methods:
        return None
    rows = []
    for domains in comparable_domains(measured.rows, MOVED):
        label = f"traits that moved beyond noise{_only(measured, domains)}"
        rows.append((label, tuple(_moved(measured, domains, method) for method in methods)))
    for trait, label in TRAITS.items():
        for domains in comparable_domains(measured.rows, f"drift/{trait}"):
            cells = tuple(_drifted(measured, f"drift/{trait}", domains, method) for method in methods)
            rows.append((f"{label}{_only(measured, domains)}", cells))
    return Table("trait", (("Policy minus base", len(methods)),), tuple(methods), tuple(rows))


def _of(measured: Measured, method: str) -> list[Row]:
    return [row for row in measured.rows if row.method == method]


def _behind_mean(measured: Measured, name: str, domains: Sequence[str], method: str) -> list[dict[str, float]]:
    """The measurements that `spread_over` averages: of the seeds that have a metric in each of some domains."""
    found = {(r.domain, r.seed): r.metrics for r in _of(measured, method) if r.domain in domains and name in r.metrics}
    return [one for (_, seed), one in found.items() if all((domain, seed) in found for domain in domains)]


def _drifted(measured: Measured, name: str, domains: Sequence[str], method: str) -> Cell:
    found = _behind_mean(measured, name, domains, method)
    if not found:
        return Cell("–")
    sure = sum(one[f"{name}/low"] > 0 or one[f"{name}/high"] < 0 for one in found)
    value = spread_over(measured.rows, name, domains, method).mean
    return Cell(signed(value), f"[{sure} of {len(found)}]", sure=2 * sure > len(found))


def _moved(measured: Measured, domains: Sequence[str], method: str) -> Cell:
    found = _behind_mean(measured, MOVED, domains, method)
    if not found:
        return Cell("–")
    count = max(sum(f"drift/{trait}" in one for trait in TRAITS) for one in found)
    return Cell(f"{spread_over(measured.rows, MOVED, domains, method).mean:.1f} of {count}")


def _only(measured: Measured, domains: Sequence[str]) -> str:
    """Behind the label of a row: the domains that it is a mean over, unless these are all."""
    return "" if len(domains) == len(measured.domains) else f" ({', '.join(domains)} only)"


def cost_table(measured: Measured) -> Table:
    """What each method costs, mean over domains and seeds; costs that no method has are left out."""
    others = {name: (name.removeprefix("cost/").replace("_", " "), 1) for row in measured.rows for name in row.metrics}
    names = {n: COSTS.get(n, label) for n, label in {**COSTS, **others}.items() if n.startswith("cost/")}
    absent = {name for name in COSTS if all(not row.metrics.get(name) for row in measured.rows)}
    if "cost/needs_seconds" in absent:
        absent.add("cost/train_seconds_with_needs")
    return _by_measure(measured, {name: shown for name, shown in names.items() if name not in absent})


def _amount(name: str, value: float, digits: int) -> str:
    """A number; a speed of a short decoding is not known to more than two digits."""
    if name == "cost/decoding_tokens_per_second" and value > 0:
        return number(float(f"{value:.2g}"), digits)
    return number(value, digits)


def _by_measure(measured: Measured, names: dict[str, tuple[str, int]]) -> Table:
    """A row a measure and group of domains over which the methods can be compared."""
    rows = []
    for name, (label, digits) in names.items():
        for domains in comparable_domains(measured.rows, name):
            found = {method: spread_over(measured.rows, name, domains, method) for method in measured.methods}
            known = [one for one in found.values() if one.n]
            if not known:
                continue
            whole = digits == 1 and all(one.mean == int(one.mean) and not one.deviation > 0 for one in known)
            cells = [
                _measure(name, one, measured.further(name, method, domains), 0 if whole else digits)
                for method, one in found.items()
            ]
            rows.append((f"{label}{_only(measured, domains)}", tuple(cells)))
    groups = groups_of(measured.methods) or (("", len(measured.methods)),)
    return Table("measure", groups, tuple(measured.methods), tuple(rows))


def _measure(name: str, found: Spread, interval: Interval | None, digits: int) -> Cell:
    """A mean with its interval, or with its deviation over seeds where there is none and the seeds differ at all."""
    text = _amount(name, found.mean, digits)
    if interval is None and found.deviation > 0:
        text = f"{text} ± {_amount(name, found.deviation, digits)}"
    return Cell(text, bracket(interval, digits))
