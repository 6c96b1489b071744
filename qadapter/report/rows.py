"""The rows of a comparison, one per domain, method and seed, and their summaries."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev
from typing import get_args

from qadapter.methods.method import Group
from qadapter.methods.table import METHODS, NAMES

METHOD_ORDER = ("base", *NAMES)
GROUPED = 10
"""With more methods than this, reports list them by group."""

_GROUPS: dict[str, str] = {method.name: method.group for method in METHODS}
_PLACES = {group: place for place, group in enumerate(get_args(Group))}

SETTING = " · "
"""Between a method and one of its settings, in the labels of a sweep's rows."""


@dataclass(frozen=True)
class Row:
    """The measurements of one policy.

    Attributes:
        domain, method: which cell of the comparison.
        seed: of the training; None for the base.
        metrics: `adaptation/…`, `retention/…`, `forgetting/…`, `cost/…`, `train/…`.
        training, adaptation, retention, curve: folders with what is behind the metrics (training curves; pairs and
            answers; items; the policy along its dial).
            Where one is None or a file in it is missing, the report goes without.
    """

    domain: str
    method: str
    seed: int | None
    metrics: dict[str, float]
    training: Path | None = None
    adaptation: Path | None = None
    retention: Path | None = None
    curve: Path | None = None


@dataclass(frozen=True)
class Spread:
    """A measurement over seeds: mean, standard deviation (NaN for fewer than two) and how many."""

    mean: float
    deviation: float
    n: int

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        """The spread of the values that are numbers."""
        numbers = [value for value in values if not math.isnan(value)]
        if not numbers:
            return cls(math.nan, math.nan, 0)
        return cls(fmean(numbers), stdev(numbers) if len(numbers) > 1 else math.nan, len(numbers))

    def text(self, digits: int = 3) -> str:
        """`0.912`, `0.912 ± 0.010`, or `–` where nothing was measured."""
        if not self.n:
            return "–"
        deviation = "" if math.isnan(self.deviation) else f" ± {self.deviation:.{digits}f}"
        return f"{round(self.mean, digits) + 0.0:.{digits}f}{deviation}"  # + 0.0: avoids -0.000


def ordered(values: Iterable[str], order: Sequence[str] = ()) -> list[str]:
    """Distinct values: those of `order` first, the others as they come."""
    distinct = list(dict.fromkeys(values))
    return [v for v in order if v in distinct] + [v for v in distinct if v not in order]


def listed(names: Sequence[str]) -> str:
    """`a, b and c`."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}" if names else ""


def kind(method: str) -> str:
    """The method of a label: where runs are compared, `dpo (first run)` is a `dpo`, and so is a sweep's `dpo · β=1`."""
    return method.partition(" (")[0].partition(SETTING)[0]


def run_of(method: str) -> str:
    """The part of a label about its run, ` (first run)`; empty if there is none."""
    found = method.rfind(" (")
    return method[found:] if found >= 0 and method.endswith(")") else ""


def methods_of(rows: Iterable[Row]) -> list[str]:
    """The methods of some rows, in the order of `METHOD_ORDER`, those it does not know last; many of them by group."""
    found = dict.fromkeys(row.method for row in rows)
    known = {name: place for place, name in enumerate(METHOD_ORDER)}
    grouped = _are_many(found)

    def place(method: str) -> tuple[int, int]:
        own = known.get(kind(method), len(known))
        group = _GROUPS.get(kind(method))
        outside = -1 if kind(method) == "base" else len(_PLACES)
        return (_PLACES[group] if group else outside) if grouped else 0, own

    return sorted(found, key=place)


def _are_many(methods: Iterable[str]) -> bool:
    return len({kind(method) for method in methods} - {"base"}) > GROUPED


def groups_of(methods: Sequence[str]) -> tuple[tuple[str, int], ...]:
    """Group and number of the methods that follow each other in it; "" for the base. Nothing for a few methods."""
    if not _are_many(methods):
        return ()
    names = ["" if kind(method) == "base" else _GROUPS.get(kind(method), "others") for method in methods]
    return tuple((name, len(list(some))) for name, some in groupby(names))


def spread(rows: Sequence[Row], metric: str, domain: str | None, method: str) -> Spread:
    """A metric of one method over seeds, in one domain or (None) averaged over all domains of the rows."""
    return spread_over(rows, metric, [domain] if domain else ordered(row.domain for row in rows), method)


def spread_over(rows: Sequence[Row], metric: str, domains: Sequence[str], method: str) -> Spread:
    """A metric of one method over seeds, averaged over some domains seed by seed.

    A seed that has no row, or not this metric, in one of the domains does not count: a mean over fewer domains is no
    mean of the same thing.
    """
    found = {(row.seed, row.domain): row.metrics.get(metric, math.nan) for row in rows if row.method == method}
    seeds = dict.fromkeys(seed for seed, _ in found) if domains else ()
    return Spread.of(fmean(found.get((seed, domain), math.nan) for domain in domains) for seed in seeds)


def comparable_domains(rows: Sequence[Row], metric: str) -> list[list[str]]:
    """Groups of domains over which a metric can be averaged so that like is compared with like.

    Returns:
        One group, the domains in which every method that has the metric at all has it; if there is no such domain,
        every domain in which any has it, separately. Empty if no method has it.
    """
    having = {row.method for row in rows if metric in row.metrics}
    measured: dict[tuple[str, str], bool] = {}
    for row in rows:
        cell = row.method, row.domain
        measured[cell] = measured.get(cell, True) and metric in row.metrics
    some = ordered(row.domain for row in rows if metric in row.metrics)
    common = [domain for domain in some if all(measured.get((method, domain), False) for method in having)]
    return [common] if common else [[domain] for domain in some]
