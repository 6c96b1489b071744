"""The rows of a comparison: one a domain, method and seed, and what they say together."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev

METHOD_ORDER = ("base", "q-adapter", "sft", "dpo", "replay")
SETTING = " · "
"""Between a method and one of its settings, in the labels of a sweep's rows."""


@dataclass(frozen=True)
class Row:
    """The measurements of one policy.

    Attributes:
        domain, method: which cell of the comparison.
        seed: of the training; None for the base.
        metrics: `adaptation/…`, `retention/…`, `forgetting/…`, `cost/…`, `train/…`.
        training, adaptation, retention: folders with what is behind the metrics (curves; pairs and answers; items).
            Where one is None or a file in it is missing, the report goes without.
    """

    domain: str
    method: str
    seed: int | None
    metrics: dict[str, float]
    training: Path | None = None
    adaptation: Path | None = None
    retention: Path | None = None


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
        return f"{round(self.mean, digits) + 0.0:.{digits}f}{deviation}"  # + 0.0: nobody wants to read -0.000


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
    """What a label says of its run, ` (first run)`; nothing where it says nothing."""
    found = method.rfind(" (")
    return method[found:] if found >= 0 and method.endswith(")") else ""


def methods_of(rows: Iterable[Row]) -> list[str]:
    """The methods of some rows, in the order of `METHOD_ORDER`, those it does not know last."""
    found = dict.fromkeys(row.method for row in rows)
    known = {name: place for place, name in enumerate(METHOD_ORDER)}
    return sorted(found, key=lambda method: known.get(kind(method), len(known)))


def spread(rows: Sequence[Row], metric: str, domain: str | None, method: str) -> Spread:
    """A metric of one method over seeds, in one domain or (None) averaged over the domains seed by seed."""
    chosen = [row for row in rows if row.method == method and domain in (None, row.domain)]
    if domain is not None:
        return Spread.of(row.metrics.get(metric, math.nan) for row in chosen)
    seeds = dict.fromkeys(row.seed for row in chosen)
    return Spread.of(fmean(row.metrics.get(metric, math.nan) for row in chosen if row.seed == seed) for seed in seeds)


def known_domains(rows: Sequence[Row], metric: str) -> list[str]:
    """The domains in which every method that has a metric at all has it; if there is none, those in which any has it.

    A mean over these compares like with like: every method's is over the same domains.
    """
    having = {row.method for row in rows if metric in row.metrics}
    asked = [row for row in rows if row.method in having]
    some = ordered(row.domain for row in asked if metric in row.metrics)
    return [d for d in some if all(metric in row.metrics for row in asked if row.domain == d)] or some


def partial_spread(rows: Sequence[Row], metric: str, method: str) -> Spread:
    """A metric of one method over seeds, averaged over the `known_domains` only."""
    domains = known_domains(rows, metric)
    return spread([row for row in rows if row.domain in domains and metric in row.metrics], metric, None, method)
