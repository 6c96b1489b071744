"""Bootstrap and closed forms against what theory says."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest

from qadapter.evaluation.statistics import (
    Interval,
    across_seeds,
    mean_interval,
    mean_of_tasks_interval,
    paired_difference,
    proportion_interval,
    signed,
)

RNG = np.random.default_rng(0)


def test_standard_error_and_interval_of_a_mean() -> None:
    """Bootstrap standard error is σ_n/√n (σ_n: divisor n) and the ends are the normal's, for a large sample."""
    values = RNG.normal(3, 2, size=400)
    interval = mean_interval(values, resamples=40_000)
    stderr = values.std() / math.sqrt(400)
    assert interval.estimate == pytest.approx(values.mean())
    assert interval.stderr == pytest.approx(stderr, rel=0.02)
    assert interval.low == pytest.approx(values.mean() - 1.96 * stderr, abs=0.05 * stderr)
    assert interval.high == pytest.approx(values.mean() + 1.96 * stderr, abs=0.05 * stderr)
    assert (interval.items, interval.seeds) == (400, 1)


def test_binary_scores_have_the_binomials_standard_error() -> None:
    interval = mean_interval([1.0] * 30 + [0.0] * 70, resamples=40_000)
    assert interval.stderr == pytest.approx(math.sqrt(0.3 * 0.7 / 100), rel=0.02)


def test_the_level_sets_the_width() -> None:
    values = RNG.normal(size=300)
    narrow, wide = (mean_interval(values, level=level, resamples=40_000) for level in (0.5, 0.99))
    assert (wide.high - wide.low) / (narrow.high - narrow.low) == pytest.approx(2.576 / 0.674, rel=0.05)


def test_pairing_removes_what_items_share() -> None:
    """a and a + c differ by c in every item, so the interval has no width though both means are uncertain."""
    base = RNG.normal(size=50)
    interval = paired_difference(base + 0.25, base)
    assert (interval.low, interval.high) == pytest.approx((0.25, 0.25))
    assert interval.excludes_zero
    assert not paired_difference(base, base).excludes_zero
    assert not paired_difference(RNG.normal(size=50), base).excludes_zero


def test_coverage_of_the_nominal_level() -> None:
    """Of 300 samples of 60, about 95 % of the intervals hold the true mean; 4 standard errors are 5 %."""
    hits = 0
    for trial in range(300):
        interval = mean_interval(np.random.default_rng(trial).normal(1, 1, 60), resamples=1000, seed=trial)
        hits += interval.low <= 1 <= interval.high
    assert 0.89 <= hits / 300 <= 0.99


def test_variance_over_seeds_and_items_adds_up() -> None:
    """For scores s_i + t_j without interaction the bootstrap's variance is var(s)/S + var(t)/n exactly."""
    seeds, items = RNG.normal(0, 1, 6), RNG.normal(0, 3, 80)
    interval = mean_interval(seeds[:, None] + items, resamples=40_000)
    assert interval.stderr == pytest.approx(math.sqrt(seeds.var() / 6 + items.var() / 80), rel=0.02)
    assert interval.estimate == pytest.approx(seeds.mean() + items.mean())
    assert (interval.items, interval.seeds) == (80, 6)


def test_one_reference_serves_every_seed() -> None:
    values, reference = RNG.normal(size=(3, 20)), RNG.normal(size=20)
    expected = paired_difference(values, np.stack([reference] * 3))
    assert paired_difference(values, reference) == expected


def test_weighted_mean_is_a_ratio_of_sums() -> None:
    """Bits per byte: Σ bits/Σ bytes. Its standard error by the delta method: √Σ(bits - R · bytes)² / Σ bytes."""
    size = RNG.integers(20, 60, 300)
    bits = size * 2.0 + RNG.normal(0, 15, 300)
    interval = mean_interval(bits / size, weights=size, resamples=20_000)
    ratio = bits.sum() / size.sum()
    assert interval.estimate == pytest.approx(ratio)
    assert interval.stderr == pytest.approx(math.sqrt(((bits - ratio * size) ** 2).sum()) / size.sum(), rel=0.03)


def test_a_mean_over_tasks_gives_each_task_the_same_weight() -> None:
    """Variance of the mean of K independent means: Σ var_k/n_k / K²."""
    tasks = [RNG.normal(0, 1, 40), RNG.normal(5, 2, 400)]
    interval = mean_of_tasks_interval(tasks, resamples=40_000)
    assert interval.estimate == pytest.approx((tasks[0].mean() + tasks[1].mean()) / 2)
    assert interval.stderr == pytest.approx(math.sqrt(tasks[0].var() / 40 + tasks[1].var() / 400) / 2, rel=0.02)
    assert interval.items == 440


def test_seeds_move_all_tasks_together() -> None:
    """Two tasks that follow the seed alike: the mean's variance is that of one task, not half of it."""
    task = np.array([[0.0] * 5, [1.0] * 5, [2.0] * 5, [5.0] * 5])
    one, two = mean_of_tasks_interval([task], seed=3), mean_of_tasks_interval([task, task], seed=3)
    assert two.stderr == pytest.approx(one.stderr, rel=1e-9)
    with pytest.raises(ValueError, match="same seeds"):
        mean_of_tasks_interval([task, task[:2]])


def test_students_interval_over_seeds() -> None:
    """1, 2, 3: mean 2, s = 1, t₂(.975) = 4.3027, half width 4.3027/√3."""
    interval = across_seeds([1.0, 2.0, 3.0])
    assert (interval.low, interval.high) == pytest.approx((2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)))
    assert interval.stderr == pytest.approx(1 / math.sqrt(3))
    # 0.88 and 0.92: a standard error of 0.02 times t = 12.706 of one degree of freedom
    share = across_seeds([0.88, 0.92], bounds=(0, 1))
    assert (share.low, share.high) == (pytest.approx(0.9 - 0.25412, abs=1e-4), 1.0)
    alone = across_seeds([0.4])
    assert (alone.low, alone.estimate, alone.high) == (0.4, 0.4, 0.4)
    assert math.isnan(alone.stderr)
    with pytest.raises(ValueError, match="one score per seed"):
        across_seeds([])


def test_wilsons_interval() -> None:
    """5 of 10 at 95 %: .2366 to .7634 (Newcombe, 1998, table's formula); at 24 of 24 the lower end is n/(n + z²)."""
    interval = proportion_interval(5, 10)
    assert (interval.low, interval.high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    full = proportion_interval(24, 24)
    assert (full.low, full.high) == pytest.approx((24 / (24 + 1.959964**2), 1))
    assert full.high >= full.estimate == 1.0
    with pytest.raises(ValueError, match="no proportion"):
        proportion_interval(3, 2)


def test_the_seed_decides_the_draws() -> None:
    values = RNG.normal(size=30)
    assert mean_interval(values, seed=1) == mean_interval(values, seed=1)
    assert mean_interval(values, seed=1).low != mean_interval(values, seed=2).low


@pytest.mark.parametrize("values", [[], [[[1.0]]], [1.0, float("nan")], [float("inf")]])
def test_what_is_no_table_of_scores_is_refused(values) -> None:
    with pytest.raises(ValueError, match=r"Expected scores|finite"):
        mean_interval(values)


def test_weights_must_fit() -> None:
    with pytest.raises(ValueError, match="positive weight for each of 2"):
        mean_interval([1.0, 2.0], weights=[1.0, 0.0])


def test_large_samples_need_little_time() -> None:
    """MMLU has 14,000 items: 1,000 draws of them within 3 s, in blocks."""
    start = time.perf_counter()
    mean_interval(RNG.normal(size=14_000), resamples=1000)
    assert time.perf_counter() - start < 3


def test_a_difference_is_told_with_signs_and_never_as_minus_zero() -> None:
    assert [signed(value) for value in (-0.0004, 0.0, -0.0006, 0.1)] == ["+0.000", "+0.000", "-0.001", "+0.100"]
    told = Interval(-0.0001, -0.0204, 0.0304, 0.01, 10)
    assert told.as_difference() == "+0.000 [-0.020, +0.030]"
    assert told.as_difference("*", digits=4) == "-0.0001* [-0.0204, +0.0304]"
