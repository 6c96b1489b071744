"""How sure a score is: bootstrap intervals over items and seeds, and the closed forms where there are some.

Scores come as an array of items [n], or of seeds and items [S, n] when the same items were scored under several seeds.
The bootstrap of [S, n] draws seeds and items independently with replacement (Owen's pigeonhole bootstrap, 2007): its
variance holds the noise of training and the noise of the choice of items, and errs on the large side by the
interaction of both. With few seeds the seeds' part is too small (where the noise was the seeds', 112 of 150 intervals
of three seeds held the truth): `with_seeds` makes such an interval as wide as Student's.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

Floats = NDArray[np.float64]

RESAMPLES = 10_000
LEVEL = 0.95
_BLOCK = 2**22
"""Random counts that are held at a time (32 MiB)."""


@dataclass(frozen=True)
class Interval:
    """An estimate and its confidence interval.

    Attributes:
        estimate: the value itself.
        low, high: ends of the interval.
        stderr: standard error.
        items: items that it rests on.
        seeds: seeds that it rests on.
    """

    estimate: float
    low: float
    high: float
    stderr: float
    items: int
    seeds: int = 1

    @property
    def excludes_zero(self) -> bool:
        """Whether the value is larger than its noise, in either direction."""
        return self.low > 0 or self.high < 0

    def at_least(self, half: float) -> Interval:
        """The same, reaching at least so far to each side of the estimate."""
        return replace(self, low=min(self.low, self.estimate - half), high=max(self.high, self.estimate + half))

    def wider(self, other: Interval) -> Interval:
        """The same estimate, with the lower and the higher end of both."""
        return replace(self, low=min(self.low, other.low), high=max(self.high, other.high))

    def within(self, least: float, most: float) -> Interval:
        """The same, cut at the ends of what its quantity can be."""
        return replace(self, low=max(self.low, least), high=min(self.high, most))

    def as_difference(self, mark: str = "", digits: int = 3) -> str:
        """`+0.050 [+0.020, +0.080]`, with a mark behind the estimate."""
        low, high = signed(self.low, digits), signed(self.high, digits)
        return f"{signed(self.estimate, digits)}{mark} [{low}, {high}]"


def signed(value: float, digits: int = 3) -> str:
    """With its sign, and never -0.000."""
    return f"{round(value, digits) + 0.0:+.{digits}f}"


def mean_interval(
    values: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Bootstrap percentile interval of a mean score.

    Args:
        values: [n] items or [S, n] seeds and items.
        weights: [n], for a mean that is weighted by item, such as bits per byte (weights: bytes).
        level: coverage of the interval.
        resamples: bootstrap draws.
        seed: of the draws.
    """
    return mean_of_tasks_interval([values], weights=[weights], level=level, resamples=resamples, seed=seed)


def paired_difference(
    values: ArrayLike,
    reference: ArrayLike,
    *,
    weights: ArrayLike | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of mean(values) - mean(reference), both over the same items (and seeds).

    Pairing removes what the items have in common: the interval is of the mean difference, not of two means. Every
    draw gives each item, and each seed, the same weight on both sides.

    Args:
        values: [n] or [S, n].
        reference: [n] or [S, n]; [n] is one reference for every seed.
    """
    difference = _table(values) - _table(reference)
    return mean_interval(difference, weights=weights, level=level, resamples=resamples, seed=seed)


def mean_of_tasks_interval(
    tasks: Sequence[ArrayLike],
    *,
    weights: Sequence[ArrayLike | None] | None = None,
    level: float = LEVEL,
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Bootstrap interval of the unweighted mean over tasks of each task's mean (give differences for a paired one).

    Items are drawn within each task, seeds once for all tasks: what a seed does to one task it does to the others.

    Args:
        tasks: [n_k] or [S, n_k] for each task k, with the same seeds.
        weights: [n_k] or None for each task.
    """
    tables = [_table(task) for task in tasks]
    seeds = {len(table) for table in tables}
    if len(seeds) != 1:
        raise ValueError(f"The tasks must have the same seeds; they have {sorted(seeds)}.")
    per_item = [_weights(w, table.shape[1]) for w, table in zip(weights or [None] * len(tables), tables, strict=True)]
    (n_seeds,) = seeds
    rng = np.random.default_rng(seed)
    # Counts of how often each seed is drawn: [resamples, S], rows sum to 1.
    seed_share = rng.multinomial(n_seeds, [1 / n_seeds] * n_seeds, size=resamples) / n_seeds
    draws = np.zeros(resamples)
    estimates = []
    for table, weight in zip(tables, per_item, strict=True):
        estimates.append(float((table @ weight).mean() / weight.sum()))
        draws += _draws(table, weight, seed_share, rng)
    draws /= len(tables)
    tail = (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(
        estimate=float(np.mean(estimates)),
        low=float(low),
        high=float(high),
        stderr=float(draws.std()),
        items=sum(table.shape[1] for table in tables),
        seeds=n_seeds,
    )


def across_seeds(
    values: ArrayLike, *, items: int = 0, level: float = LEVEL, bounds: tuple[float, float] = (-math.inf, math.inf)
) -> Interval:
    """Student's interval of the mean of one score per seed: mean ± t_{S-1} · s/√S, cut at the score's own bounds.

    Student's distribution has no ends: the seeds' shares 0.88 and 0.92 give 0.9 ± 12.7 · 0.02, which reaches 1.15. No
    true mean lies beyond the bounds, so the cut does not lower the coverage.

    Args:
        values: [S]. A single seed has no spread: the interval is the value itself, its standard error not a number.
        items: items behind each score, only to be reported.
        bounds: what a score can be at least and at most: (0, 1) for a share, (-1, 1) for a difference of two.
    """
    scores = np.asarray(values, dtype=np.float64)
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"Expected one score per seed, an array of one dimension; got shape {scores.shape}.")
    mean, n = float(scores.mean()), len(scores)
    if n == 1:
        return Interval(mean, mean, mean, float("nan"), items, 1)
    stderr = float(scores.std(ddof=1) / np.sqrt(n))
    half = float(stats.t.ppf((1 + level) / 2, n - 1)) * stderr
    return Interval(mean, mean - half, mean + half, stderr, items, n).within(*bounds)


def with_seeds(found: Interval, tasks: Sequence[Floats], weights: Sequence[Floats | None] | None = None) -> Interval:
    """An interval of `mean_of_tasks_interval`, as wide at least as Student's of the seeds' means.

    Args:
        found: the interval.
        tasks, weights: that it is of, [S, n_k] and [n_k] for each task k. Of one seed it stays as it is.
    """
    if len(tasks[0]) < 2:
        return found
    parts = list(zip(tasks, weights or [None] * len(tasks), strict=True))
    scores = [np.mean([np.average(task[seed], weights=w) for task, w in parts]) for seed in range(len(tasks[0]))]
    return found.wider(across_seeds(scores))


def proportion_interval(successes: float, n: int, *, level: float = LEVEL) -> Interval:
    """Wilson's interval of a share (Wilson, 1927). Unlike the bootstrap's it is not of width 0 at 0 of n or n of n.

    Args:
        successes: how many of n; ties may count one half.
        n: at least 1.
    """
    if not (n >= 1 and 0 <= successes <= n):
        raise ValueError(f"{successes} successes of {n} are no proportion.")
    p, z = successes / n, float(stats.norm.ppf((1 + level) / 2))
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * np.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    # At 0 of n and n of n the interval ends there; rounding must not push the estimate outside.
    return Interval(p, min(float(centre - half), p), max(float(centre + half), p), float(np.sqrt(p * (1 - p) / n)), n)


def _draws(table: Floats, weight: Floats, seed_share: Floats, rng: np.random.Generator) -> Floats:
    """[resamples] weighted means of a task, each under its own draw of items and the given draw of seeds."""
    resamples, n = len(seed_share), table.shape[1]
    means = np.empty(resamples)
    block = max(1, _BLOCK // n)
    alike = bool((weight == 1).all())
    for start in range(0, resamples, block):
        shares = seed_share[start : start + block]
        drawn = rng.integers(n, size=(len(shares), n))
        # counts[b, i]: how often item i is drawn in draw b
        offset = np.arange(len(shares))[:, None] * n
        counts = np.bincount((drawn + offset).ravel(), minlength=len(shares) * n).reshape(len(shares), n)
        weighted = counts if alike else counts * weight
        drawn_weight = n if alike else weighted.sum(axis=1)
        means[start : start + block] = (weighted * (shares @ table)).sum(axis=1) / drawn_weight
    return means


def _table(values: ArrayLike) -> Floats:
    """[S, n] of finite numbers."""
    array = np.atleast_2d(np.asarray(values, dtype=np.float64))
    if array.ndim != 2 or array.shape[1] == 0:
        raise ValueError(f"Expected scores of shape [items] or [seeds, items], at least one item; got {array.shape}.")
    if not np.isfinite(array).all():
        raise ValueError("A score is not a finite number.")
    return array


def _weights(weights: ArrayLike | None, n: int) -> Floats:
    if weights is None:
        return np.ones(n)
    array = np.asarray(weights, dtype=np.float64)
    if array.shape != (n,) or not (array > 0).all():
        raise ValueError(f"Expected a positive weight for each of {n} items; got shape {array.shape}.")
    return array
