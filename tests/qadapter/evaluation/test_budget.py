"""The forgetting budget: which point is chosen, on which items, and that other items are reported."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from qadapter.config.budget import Budget
from qadapter.errors import QAdapterError
from qadapter.evaluation.curve.area import area_interval, front_area
from qadapter.evaluation.curve.budget import choose
from qadapter.evaluation.curve.parts import (
    SPLIT,
    Part,
    mean_adaptation,
    mean_difference,
    mean_forgetting,
    mean_gain,
    selects,
    split_curves,
)
from qadapter.evaluation.curve.points import Curve, Measure, Point

VALUES = (0.0, 0.25, 0.5, 0.75, 1.0)


def items(prefix: str, count: int) -> tuple[str, ...]:
    return tuple(f"{prefix}{i}" for i in range(count))


def curve(learnt: np.ndarray, kept: np.ndarray, refused: list[float] | None = None) -> Curve:
    """A curve from [P, n] adaptation hits and [P, m] retention hits of one task."""
    points = []
    for place, value in enumerate(VALUES[: len(learnt)]):
        task = Measure(items("r", kept.shape[1]), tuple(kept[place].astype(float)))
        share = None if refused is None else Measure((), (refused[place],))
        hits = Measure(items("a", learnt.shape[1]), tuple(learnt[place].astype(float)))
        points.append(Point(value, hits, {"retention/facts/exact_match": task}, share))
    return Curve("q-weight", tuple(points))


def steps(shares: list[float], count: int) -> np.ndarray:
    """[P, count] hits, the given share of them 1 in each half of the split."""
    rng = np.random.default_rng(0)
    order = rng.permutation(count)
    return np.array([(order < round(share * count)).astype(float) for share in shares])


def test_items_are_split_once_by_content() -> None:
    names = items("item ", 2000)
    chosen = [selects(name) for name in names]
    assert chosen == [selects(name) for name in names]
    assert 900 < sum(chosen) < 1100
    assert SPLIT == "dial-1"  # another name is another split: reported numbers would be of other items
    assert [selects(name) for name in ("a0", "a1", "a2", "a3", "r0", "r1")] == [
        __import__("hashlib").sha256(f"dial-1\n{name}".encode()).digest()[0] % 2 == 0
        for name in ("a0", "a1", "a2", "a3", "r0", "r1")
    ]


@pytest.mark.slow
def test_the_point_that_learnt_most_within_the_budget() -> None:
    """Adaptation 0, .2, .6, .9, 1 and retention 1, 1, 1, .98, .8: the budget decides between .5, .75 and 1."""
    one = curve(steps([0, 0.2, 0.6, 0.9, 1], 400), steps([1, 1, 1, 0.98, 0.8], 4000))
    assert choose([one], Budget(max_forgetting=0.0)).value == 0.5
    assert choose([one], Budget(max_forgetting=0.03)).value == 0.75
    assert choose([one], Budget(max_forgetting=0.5)).value == 1.0
    found = choose([one], Budget(max_forgetting=0.03))
    assert found.adaptation.estimate == pytest.approx(0.9, abs=0.05)
    assert found.forgetting.estimate == pytest.approx(0.02, abs=0.01)
    assert found.items == (sum(not selects(i) for i in items("a", 400)), sum(not selects(i) for i in items("r", 4000)))
    assert found.sure
    assert "within the budget of 0.03 with confidence" in found.sentence()
    # Equal adaptation: the point that forgot less, then the smaller dial
    flat = curve(steps([0, 1, 1, 1, 1], 40), steps([1, 0.9, 1, 1, 1], 400))
    assert choose([flat], Budget(max_forgetting=1.0)).value == 0.5


def test_limits_of_tasks_and_refusals() -> None:
    one = curve(steps([0, 0.2, 0.6, 0.9, 1], 400), steps([1, 1, 0.99, 0.9, 0.8], 4000), [0, 0, 0, 0.2, 0.4])
    assert choose([one], Budget(max_forgetting=1.0)).value == 1.0
    assert choose([one], Budget(max_forgetting=1.0, per_task=0.05)).value == 0.5
    assert choose([one], Budget(max_forgetting=1.0, max_over_refusals=0.3)).value == 0.75


def test_where_no_point_satisfies_the_budget_it_says_by_how_much() -> None:
    one = curve(steps([0, 0.5, 1, 1, 1], 400), steps([1, 0.9, 0.8, 0.7, 0.6], 4000))
    found = choose([one], Budget(max_forgetting=0.01))
    assert found.value == 0.0
    assert found.nearest is not None
    assert found.nearest[0] == 0.25
    assert found.nearest[1] == pytest.approx(0.09, abs=0.02)
    assert (
        "no point above 0 stays within the budget of 0.01: the nearest, q-weight=0.25, exceeds it by 0.0"
        in found.sentence()
    )


def test_few_items_give_no_confidence() -> None:
    """None of some 20 retention items lost: up to a tenth or so may be, so a budget of 1 % is not sure."""
    found = choose([curve(steps([0, 1], 40), steps([1, 1], 40))], Budget(max_forgetting=0.01))
    assert found.forgetting.estimate == 0.0
    assert found.forgetting.high > 0.05
    assert not found.sure
    assert "Not surely within the budget of 0.01: the interval reaches 0." in found.sentence()
    with pytest.raises(QAdapterError, match="too few to choose a dial on"):
        choose([curve(steps([0, 1], 6), steps([1, 1], 40))], Budget())


@pytest.mark.slow
def test_on_pure_noise_the_reported_gain_is_centred_at_zero() -> None:
    """Policies that differ from their base by noise alone: what is promised is biased, what is reported is not."""
    rng = np.random.default_rng(1)
    promised, reported = [], []
    for _ in range(300):
        one = curve(rng.random((5, 60)) < 0.5, rng.random((5, 60)) < 0.5)
        found = choose_quickly(one)
        promised.append(found[0])
        reported.append(found[1])
    error = np.std(reported) / np.sqrt(len(reported))
    assert abs(np.mean(reported)) < 3 * error
    assert np.mean(promised) > 5 * error  # chosen and reported on the same items it would look like a gain


def choose_quickly(one: Curve) -> tuple[float, float]:
    """Gain on the part that the point was chosen on, and on the other part."""
    found = choose([one], Budget(max_forgetting=1.0))
    selection, _ = split_curves([one])
    return found.expected[0] - selection.before, found.gain.estimate


def test_several_seeds_are_one_method() -> None:
    ones = [curve(steps([0, share, 1], 40), steps([1, 1, 1], 40)) for share in (0.4, 0.6)]
    selection, reported = split_curves(ones)
    assert selection.gained.shape[:2] == (2, 3)
    every = (selection.adaptation(1) * 1 + reported.adaptation(1) * 1) / 2
    assert every == pytest.approx(0.5, abs=0.1)
    shorter = Curve("q-weight", ones[1].points[::2])
    assert split_curves([ones[0], shorter])[0].values == (0.0, 0.5)
    other = curve(steps([0, 1], 20), steps([1, 1], 40))
    with pytest.raises(QAdapterError, match="different held-out items"):
        split_curves([ones[0], other])


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds: int) -> None:
    """200 experiments whose noise is mostly the seeds': the gain, 0.1, and as much forgetting; within counting 95 %."""
    rng = np.random.default_rng(seeds)
    held = [0, 0]
    for _ in range(200):
        part = noisy(0.1 + 0.05 * rng.normal(size=(seeds, 1, 1)) + 0.05 * rng.normal(size=(seeds, 1, 200)))
        for place, found in enumerate((mean_gain([part], [0]), mean_forgetting([part], [0]))):
            held[place] += found.low <= 0.1 <= found.high
    assert min(held) / 200 >= 0.9


def noisy(values: np.ndarray) -> Part:
    """These differences [S, P, n] as what was gained and as what was lost."""
    ones = {"t": np.ones(values.shape[2])}
    return Part(
        "q-weight", (0.0, 1.0)[: values.shape[1]], values, {"t": values}, ones, ("t",), np.zeros(2), 0.0, ones["t"]
    )


def test_an_area_is_as_unsure_as_its_seeds() -> None:
    """Seeds that learn .2 and .4 with nothing lost: Student's ± 12.706 · .1 of two seeds is cut at 0 and 1."""
    gained = np.stack([np.full((2, 400), share) * [[0], [1]] for share in (0.2, 0.4)])
    part = replace(noisy(gained), lost={"t": np.zeros((2, 2, 400))})
    found = area_interval(part, part)
    assert (found.low, found.estimate, found.high) == (0.0, pytest.approx(0.3), 1.0)


def test_area_under_the_front() -> None:
    """By hand: base 0; .5 reached at forgetting 0, 1 at .02: (.5 · .02 + 1 · .03)/.05 = .8 up to a budget of 5 %."""
    one = curve(steps([0, 0.5, 1], 400), steps([1, 1, 0.98], 4000))
    selection, reported = split_curves([one])
    assert front_area(reported) == pytest.approx(0.8, abs=0.1)
    exact = 1 - (1 - reported.adaptation(1)) * min(reported.forgetting(2), 0.05) / 0.05
    assert front_area(reported) == pytest.approx(exact)
    found = area_interval(selection, reported)
    assert found.low < found.estimate < found.high
    assert found.estimate == pytest.approx(exact)
    assert front_area(reported, [0]) == 0.0


def test_the_interval_of_an_area_stays_within_shares() -> None:
    """A base that already answers a tenth as asked, and a policy that answers all: no draw reaches more than 1."""
    selection, reported = split_curves([curve(steps([0.1, 0.6, 1], 60), steps([1, 1, 1], 60))])
    found = area_interval(selection, reported)
    assert found.estimate == pytest.approx(1.0)
    assert 0.8 < found.low <= found.high <= 1.0


def test_no_more_than_everything_is_forgotten() -> None:
    """All 4 items lost: the least width, z²/(4 + z²) = 0.49 to each side, is cut at 1; scores to 100 are not cut."""
    lost, unseen = np.array([[[0.0] * 4, [1.0] * 4]]), 1.959963984540054**2 / (4 + 1.959963984540054**2)
    part = Part(
        "q-weight", (0.0, 1.0), lost, {"t": lost}, {"t": np.ones(4)}, ("t",), np.full(2, np.nan), 0.0, np.ones(4)
    )
    found = mean_forgetting([part], [1])
    assert (found.estimate, found.low, found.high) == (1.0, pytest.approx(1 - unseen), 1.0)
    bleu = mean_forgetting([replace(part, lost={"t": 20 * lost})], [1])
    assert (bleu.estimate, bleu.high) == (20.0, pytest.approx(20 + unseen))


def test_shares_that_all_agree_are_not_certain() -> None:
    """All of n answers as asked, in every draw: Wilson's interval for n of n begins at n/(n + z²)."""
    one = curve(steps([0, 1], 60), steps([1, 1], 400))
    selection, reported = split_curves([one])
    n = reported.gained.shape[2]
    least = 1 - 1.959964**2 / (n + 1.959964**2)
    found = choose([one], Budget(max_forgetting=0.01))
    assert found.adaptation.low == pytest.approx(least, abs=1e-6)
    assert found.adaptation.high == 1.0
    assert (found.gain.low, found.gain.high) == (found.adaptation.low, 1.0)
    assert area_interval(selection, reported).low == pytest.approx(least, abs=1e-6)
    # Two domains: the half-widths add up as those of independent means.
    both = mean_gain([reported, reported], [1, 1])
    assert both.low == pytest.approx(1 - (1 - least) / math.sqrt(2), abs=1e-6)
    even = mean_difference([reported], [1], [reported], [1])
    assert (even.low, even.high) == (pytest.approx(least - 1, abs=1e-6), pytest.approx(1 - least, abs=1e-6))


# ---- several pairs of one prompt


def repeated(one: Curve, times: int) -> Curve:
    """The same with each held-out item as so many pairs of one prompt, which all agree."""

    def more(learnt: Measure) -> Measure:
        return Measure(learnt.ids * times, learnt.values * times)

    return Curve(one.kind, tuple(replace(point, learnt=more(point.learnt)) for point in one.points))


def test_pairs_of_a_prompt_that_agree_make_nothing_surer() -> None:
    """n prompts of which a share p is won more than by the base: ± 1.96 · √(p(1 − p)/n), with one pair each or four."""
    once = curve(steps([0, 0.3, 0.7], 400), steps([1, 1, 1], 400))
    (_, one), (selection, four) = split_curves([once]), split_curves([repeated(once, 4)])
    p, n = one.adaptation(2), one.gained.shape[2]
    assert (four.gained.shape[2], four.pairs.tolist()) == (n, [4.0] * n)
    expected = 2 * 1.96 * math.sqrt(p * (1 - p) / n)
    intervals = [mean_gain([four], [2]), mean_adaptation([four], [2]), area_interval(selection, four)]
    intervals.append(mean_difference([four], [2], [four], [0]))
    for found, of_one in zip(
        intervals,
        [mean_gain([one], [2]), mean_adaptation([one], [2]), area_interval(split_curves([once])[0], one), None],
        strict=True,
    ):
        assert found.high - found.low == pytest.approx(expected, rel=0.1)
        assert of_one is None or (found.low, found.high) == (pytest.approx(of_one.low), pytest.approx(of_one.high))
    found = choose([repeated(once, 4)], Budget(max_forgetting=1.0))
    assert (found.items[0], found.adaptation.high - found.adaptation.low) == (n, pytest.approx(expected, rel=0.1))


def test_the_least_width_counts_prompts() -> None:
    """All won: the interval begins at n/(n + z²) for n prompts, however many pairs they have."""
    _, reported = split_curves([repeated(curve(steps([0, 1], 60), steps([1, 1], 60)), 4)])
    n = reported.gained.shape[2]
    assert n < 60
    assert mean_gain([reported], [1]).low == pytest.approx(1 - 1.959964**2 / (n + 1.959964**2), abs=1e-6)


def test_a_prompt_weighs_as_many_pairs_as_it_has() -> None:
    """A prompt with three won pairs and one lost beside prompts of one pair: means stay those over pairs."""
    ids = items("a", 40)
    named = (ids[0], *ids, ids[0], ids[0])  # the first has four pairs
    hits = np.array([[0.0] * 43, [float(i % 3 == 0) for i in range(43)]])
    points = tuple(
        Point(value, Measure(named, tuple(row)), {"retention/facts/em": Measure(items("r", 40), (1.0,) * 40)})
        for value, row in zip((0.0, 1.0), hits, strict=True)
    )
    for part, side in zip(split_curves([Curve("q-weight", points)]), (True, False), strict=True):
        here = [i for i, name in enumerate(named) if selects(name) == side]
        assert part.pairs.sum() == len(here)
        assert part.adaptation(1) == pytest.approx(hits[1, here].mean())
        assert mean_adaptation([part], [1]).estimate == pytest.approx(hits[1, here].mean())
        assert area_interval(part, part).estimate == pytest.approx(hits[1, here].mean())


def test_a_half_with_few_prompts_chooses_nothing() -> None:
    """Six prompts have fewer than four in one of the halves, with forty pairs each too."""
    with pytest.raises(QAdapterError, match="too few to choose a dial on"):
        choose([repeated(curve(steps([0, 1], 6), steps([1, 1], 40)), 40)], Budget())
