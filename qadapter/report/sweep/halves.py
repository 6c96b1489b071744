"""Chosen on one half of the held-out items, reported on the other: no setting profits from the items that chose it.

A pair belongs to the half of its prompt, so that the pairs of one prompt are never on both sides; an item of a
retention task to the half of its place. Both halves are the same for every policy. The divergence from the base is
measured on texts of the old distribution, which choose nothing, and is not divided.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from statistics import fmean

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from qadapter.evaluation.statistics import Interval
from qadapter.methods.table import SUBJECT
from qadapter.report.intervals import Sample, are_shares
from qadapter.report.items import RULE, SCORE, adaptation_gain, directions_of, read_lines, retention_items
from qadapter.report.items import retention_measures as measures_of
from qadapter.report.rows import Row, listed, ordered
from qadapter.report.sweep.points import BASE, Point, Setting, best_by_trade, points_of
from qadapter.report.sweep.sentences import starred

MEAN = "retention/mean"
Values = dict[str, NDArray[np.float64]]
"""Task or domain → the scores of its items, in a fixed order."""


def selects(key: object) -> bool:
    """Whether an item belongs to the half that chooses."""
    return hashlib.sha256(repr(key).encode()).digest()[0] % 2 == 0


@dataclass(frozen=True)
class HalfRow:
    """A policy on one half of the items.

    Attributes:
        row: with the half's `adaptation/score` and `retention/mean`.
        gains: [n], for each prompt the mean over its pairs of what the implied reward gains on the base's ½.
        pairs: [n], how many these are.
        kept: retention task → [n], its items' scores.
    """

    row: Row
    gains: NDArray[np.float64]
    pairs: NDArray[np.float64]
    kept: Values


Cells = Mapping[tuple[str, str, int | None], HalfRow]
"""(domain, setting, seed) → its row."""


def half_rows(rows: Sequence[Row], chosen: bool) -> list[HalfRow]:
    """The rows on one half; none if a row lacks its items, or is scored by a toy world's rule."""
    directions = directions_of(rows)
    measures = [name for name in measures_of(rows) if directions.get(name, True)]
    found = []
    for row in rows:
        of_base = row.method == BASE
        prompts = [line.get("prompt") for line in read_lines(row.adaptation, "pairs.jsonl")]
        gain = None if RULE in row.metrics else adaptation_gain(row, None)
        items = retention_items(row, measures)
        if gain is None or None in prompts or set(items) != set(measures) or not measures:
            return []
        here = np.array([selects(prompt) == chosen for prompt in gain.ids])
        gains, pairs = (np.zeros(here.sum()) if of_base else gain.values[here]), gain.weights[here]
        kept = {
            name: np.array([v for key, v in zip(of.ids, of.values, strict=True) if selects(key) == chosen])
            for name, of in items.items()
        }
        if not len(gains) or not all(len(values) for values in kept.values()):
            return []
        score = 0.5 + float(np.average(gains, weights=pairs))
        halved = {SCORE: score, MEAN: fmean(float(values.mean()) for values in kept.values())}
        found.append(HalfRow(replace(row, metrics={**row.metrics, **halved}), gains, pairs, kept))
    return found


def chosen_on_a_half(rows: Sequence[Row], settings: Sequence[Setting], expected: int) -> dict[str, Point]:
    """For each method the complete tuned setting with the best trade on the half that chooses, as measured there.

    Args:
        rows: one per domain, setting and seed, and those of the base, with their folders.
        settings: all settings of the sweep.
        expected: rows that a complete setting has.
    """
    tuned = [
        point
        for point in points_of([half.row for half in half_rows(rows, chosen=True)], settings, expected)
        if point.complete and point.speaks and point.setting.tuning
    ]
    return {
        method: best_by_trade([point for point in tuned if point.setting.method == method])
        for method in dict.fromkeys(point.setting.method for point in tuned)
    }


def halves_section(
    rows: Sequence[Row], settings: Sequence[Setting], expected: int, confirming: Sequence[Row] = ()
) -> tuple[str, dict[str, float]]:
    """The section of the report, and its metrics; empty where the items are not there.

    Args:
        rows: one per domain, setting and seed, and those of the base, with their folders.
        settings: all settings of the sweep.
        expected: rows that a complete setting has.
        confirming: rows of the chosen settings with further seeds, which are reported and choose nothing.
    """
    chosen = chosen_on_a_half(rows, settings, expected)
    names = [point.setting.name for point in chosen.values()]
    further = _of_all(confirming, names, ordered(row.domain for row in rows))
    reported = half_rows([*rows, *further], chosen=False)
    on_other = {point.setting.name: point for point in points_of([half.row for half in reported], settings, expected)}
    if not chosen or any(
        point.setting.name not in on_other or not on_other[point.setting.name].speaks for point in chosen.values()
    ):
        return "", {}
    table, metrics = [], {}
    for method, point in chosen.items():
        other = on_other[point.setting.name]
        metrics[f"sweep/half_trade/{method}"] = other.trade
        table.append(
            {
                "method": method,
                "chosen": point.setting.name,
                "adaptation": other.adaptation.text(),
                "retention": other.retention.text(),
                "kept": f"{other.kept:.3f}",
                "trade": f"{other.trade:.3f}",
                "KL/token": other.kl.text(4),
                "trade where it was chosen": f"{point.trade:.3f}",
            }
        )
    sentences, others = [], {}
    for method in chosen:
        if method == SUBJECT.name or SUBJECT.name not in chosen:
            continue
        others[method] = chosen[method].setting.name
        gain, keep = _differences(reported, chosen[SUBJECT.name].setting.name, others[method])
        sentences.append(f"- {SUBJECT.name} − {method}: adaptation {_shown(gain)}; retention {_shown(keep)}.")
        metrics[f"sweep/half_adaptation_difference/{method}"] = gain.estimate
        metrics[f"sweep/half_retention_difference/{method}"] = keep.estimate
    prompts = sum(len(half.gains) for half in reported if half.row.method == BASE)
    items = next(sum(map(len, half.kept.values())) for half in reported)
    parts = [
        "## Chosen on one half of the held-out items, reported on the other",
        "Each method's setting has the best trade on the half that chooses; every number but the last column is of "
        f"the other half: {prompts} prompts with all their pairs, and {items} items of the retention tasks."
        + _seeds_sentence(rows, further),
        pd.DataFrame(table).to_markdown(index=False, disable_numparse=True),
    ]
    if sentences:
        parts += [
            "Differences there, with 95 % intervals over prompts (items) and seeds, as in the report of a comparison:",
            "\n".join(sentences),
        ]
        parts += _by_domain(reported, chosen[SUBJECT.name].setting.name, others)
    return "\n\n".join(parts), metrics


def _by_domain(halves: Sequence[HalfRow], subject: str, others: Mapping[str, str]) -> list[str]:
    """The differences in adaptation of each domain and seed; nothing where one domain and seed are all there is.

    A mean over domains hides it where a method is ahead in one and behind in another.

    Args:
        halves: all rows on the half that reports.
        subject: the Q-Adapter's chosen setting.
        others: method to its chosen setting.
    """
    of = {(half.row.domain, half.row.method, half.row.seed): half for half in halves}
    domains = ordered(domain for domain, method, _ in of if method == subject)
    seeds = _paired(of, domains, subject, *others.values())
    if len(domains) * len(seeds) < 2:
        return []
    table = [
        {
            "domain": domain,
            "seed": "–" if seed is None else seed,
            **{
                f"− {method}": starred(_gain_over(of, [domain], [seed], subject, name).interval)
                for method, name in others.items()
            },
        }
        for domain in domains
        for seed in seeds
    ]
    return [
        f"The same by domain and seed: adaptation of {SUBJECT.name} minus the other's, with 95 % intervals over "
        "prompts; a star: larger than the noise.",
        pd.DataFrame(table).to_markdown(index=False, disable_numparse=True),
    ]


def _of_all(confirming: Sequence[Row], names: Sequence[str], domains: Sequence[str]) -> list[Row]:
    """The further rows of the chosen settings, of the seeds with which each was trained in every domain.

    A seed that lacks one has no mean over domains, and one that a setting lacks does not pair.
    """
    there = {(row.domain, row.method, row.seed) for row in confirming}
    return [
        row
        for row in confirming
        if row.method in names and all((d, name, row.seed) in there for d, name in product(domains, names))
    ]


def _seeds_sentence(rows: Sequence[Row], further: Sequence[Row]) -> str:
    if not further:
        return ""
    chose, confirmed = (
        listed([str(seed) for seed in sorted({row.seed for row in part if row.seed is not None})])
        for part in (rows, further)
    )
    return f" Settings were chosen with seed {chose}; the chosen ones were trained again with seed {confirmed}."


def _differences(halves: Sequence[HalfRow], one: str, two: str) -> tuple[Interval, Interval]:
    """What the first setting is ahead in adaptation and in retention, items and seeds paired.

    As in the comparison (`qadapter.report.intervals`): domains have prompts of their own, and are parts of the mean;
    their retention items are the same, so an item's difference is first averaged over the domains.
    """
    of = {(half.row.domain, half.row.method, half.row.seed): half for half in halves}
    domains = ordered(domain for domain, method, _ in of if method == one)
    seeds = _paired(of, domains, one, two)
    cells = [[(of[d, one, seed], of[d, two, seed]) for d in domains] for seed in seeds]
    kept = tuple(
        np.array([np.mean([a.kept[task] - b.kept[task] for a, b in cell], axis=0) for cell in cells])
        for task in cells[0][0][0].kept
    )
    shares = all(are_shares(half.kept[task]) for cell in cells for pair in cell for half in pair for task in half.kept)
    alike = tuple(np.ones(part.shape[1]) for part in kept)
    keep = Sample(tuple(seeds), (), kept, alike, 1 / len(domains) if shares else 0.0)
    return _gain_over(of, domains, seeds, one, two).interval, keep.interval


def _gain_over(of: Cells, domains: Sequence[str], seeds: Sequence[int | None], one: str, two: str) -> Sample:
    """What the first setting learnt more than the second; the domains are the parts."""
    gains = tuple(np.array([of[d, one, seed].gains - of[d, two, seed].gains for seed in seeds]) for d in domains)
    return Sample(tuple(seeds), (), gains, tuple(of[d, one, seeds[0]].pairs for d in domains))


def _paired(of: Cells, domains: Sequence[str], *names: str) -> list[int | None]:
    """The seeds with which all these settings were trained in every domain."""
    seeds = dict.fromkeys(seed for _, method, seed in of if method == names[0])
    return [seed for seed in seeds if all((domain, name, seed) in of for domain in domains for name in names)]


def _shown(interval: Interval) -> str:
    verdict = "larger" if interval.excludes_zero else "not larger"
    return f"{interval.as_difference()}, {verdict} than the noise"
