"""Items, intervals and single figures of the report, against numbers worked out by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from qadapter.files.artifacts import read_json_lines, write_json_lines
from qadapter.report.front import pareto_front
from qadapter.report.intervals import Measured, Sample
from qadapter.report.items import adaptation_gain, retention_items, retention_measures
from qadapter.report.rows import Row
from qadapter.report.summary import (
    adherence_gained,
    duel,
    duels,
    first_sentences,
    judge_sentences,
    points,
    sentences,
    summary_metrics,
)
from qadapter.report.tables import further_table, main_table, subtask_measures
from tests.support.report_files import kept_files, pair_row, rule_row, toy_rows

Z2 = 1.959963984540054**2


def unseen(n: int) -> float:
    """Wilson's upper end for 0 of n: z² / (n + z²)."""
    return Z2 / (n + Z2)


# ---- items


def test_items_of_a_task_and_of_a_group(tmp_path: Path) -> None:
    """A group is the mean over the items of its subtasks: (1 + 0 + 1)/3."""
    folder = kept_files(tmp_path, {"mmlu_law": [1, 0], "mmlu_art": [1], "bbh": [0, 1, 1, 1]})
    row = Row("d", "sft", 0, {"retention/mmlu/acc": 2 / 3, "retention/bbh/acc": 0.75}, retention=folder)
    found = retention_items(row, retention_measures([row]))
    assert set(found) == {"retention/mmlu/acc", "retention/bbh/acc"}
    assert found["retention/mmlu/acc"].values.tolist() == [1, 0, 1]
    assert found["retention/mmlu/acc"].ids == (("mmlu_law", 0), ("mmlu_law", 1), ("mmlu_art", 0))


def test_a_group_has_no_items_of_a_longer_named_one(tmp_path: Path) -> None:
    """`mmlu_pro_law` is `mmlu_pro`'s where that is measured: mmlu (1 + 0)/2, mmlu_pro (1 + 1 + 0)/3.

    `bbh_dates`, measured alone too, is still one of `bbh`: (1 + 0)/2.
    """
    scores = {
        "mmlu_law": [1],
        "mmlu_art": [0],
        "mmlu_pro_law": [1, 1],
        "mmlu_pro_art": [0],
        "bbh_dates": [1],
        "bbh_sums": [0],
    }
    metrics = {
        "retention/mmlu/acc": 0.5,
        "retention/mmlu_pro/acc": 2 / 3,
        "retention/bbh/acc": 0.5,
        "retention/bbh_dates/acc": 1.0,
    }
    row = Row("d", "sft", 0, metrics, retention=kept_files(tmp_path, scores))
    found = retention_items(row, list(metrics))
    assert {name: items.values.tolist() for name, items in found.items()} == {
        "retention/mmlu/acc": [1, 0],
        "retention/mmlu_pro/acc": [1, 1, 0],
        "retention/bbh/acc": [1, 0],
        "retention/bbh_dates/acc": [1],
    }


def test_items_that_do_not_give_the_reported_number_are_left_out(tmp_path: Path) -> None:
    row = Row("d", "sft", 0, {"retention/facts/acc": 0.7}, retention=kept_files(tmp_path, {"facts": [1, 0]}))
    assert retention_items(row, ["retention/facts/acc"]) == {}


def test_bits_per_byte_are_weighted_by_bytes(tmp_path: Path) -> None:
    """2 bits on 4 bytes and 9 on 12: 11/16 in all, not the mean of 0.5 and 0.75."""
    ln2 = math.log(2)
    scores = [[-2 * ln2, 4], [-9 * ln2, 12]]
    folder = kept_files(tmp_path, {"text": scores}, metric="bits_per_byte")  # type: ignore[dict-item]
    row = Row("d", "sft", 0, {"retention/text/bits_per_byte": 11 / 16}, retention=folder)
    items = retention_items(row, ["retention/text/bits_per_byte"])["retention/text/bits_per_byte"]
    assert items.values == pytest.approx([0.5, 0.75])
    assert items.weights.tolist() == [4, 12]
    assert items.mean == pytest.approx(11 / 16)


def test_gain_by_the_rule_is_won_minus_lost_prompts(tmp_path: Path) -> None:
    base, ours, sft = toy_rows(tmp_path)
    gain = adaptation_gain(ours, base)
    assert gain is not None
    assert gain.values.tolist() == [1, 1, 0, 0]
    gain = adaptation_gain(sft, base)
    assert gain is not None
    assert gain.values.tolist() == [1, 1, 0, -1]


def test_gain_by_the_rule_needs_verdicts(tmp_path: Path) -> None:
    base, ours, _ = toy_rows(tmp_path)
    assert ours.adaptation is not None
    write_json_lines(ours.adaptation / "answers.jsonl", [{"prompt": [], "reply": "as it was written before"}])
    assert adaptation_gain(ours, base) is None


def test_gain_on_pairs_is_the_preference_minus_one_half(tmp_path: Path) -> None:
    gain = adaptation_gain(pair_row(tmp_path, "d", "dpo", 0, [0.5, -0.1, 0.0, 2.0], 0.9), None)
    assert gain is not None
    assert gain.values.tolist() == [0.5, -0.5, 0.0, 0.5]


def test_pairs_of_one_prompt_are_one_item(tmp_path: Path) -> None:
    """Four pairs of two prompts, as DSP has them, and one of a third: 1/2, 0 and -1/2, weighed by their number."""
    row = pair_row(tmp_path, "d", "dpo", 0, [1.0] * 4 + [1.0, -1.0, 1.0, -1.0] + [-1.0], 0.9)
    assert row.adaptation is not None
    pairs = read_json_lines(row.adaptation / "pairs.jsonl")
    write_json_lines(row.adaptation / "pairs.jsonl", [{**p, "prompt": "aaaabbbbc"[p["pair"]]} for p in pairs])
    gain = adaptation_gain(row, None)
    assert gain is not None
    assert (gain.ids, gain.values.tolist(), gain.weights.tolist()) == (("a", "b", "c"), [0.5, 0.0, -0.5], [4, 4, 1])
    assert gain.mean == pytest.approx(row.metrics["adaptation/score"] - 0.5)


def test_four_pairs_of_a_prompt_that_agree_are_no_surer_than_one(tmp_path: Path) -> None:
    """100 prompts of which 70 are won: ± 1.96 · √(.7 · .3/100), with one pair each and with four."""
    widths = []
    for each in (1, 4):
        margins = [1.0 if place < 70 * each else -1.0 for place in range(100 * each)]
        row = pair_row(tmp_path / str(each), "d", "dpo", 0, margins, 0.9)
        assert row.adaptation is not None
        pairs = read_json_lines(row.adaptation / "pairs.jsonl")
        write_json_lines(row.adaptation / "pairs.jsonl", [{**p, "prompt": f"{p['pair'] // each}"} for p in pairs])
        base = Row("d", "base", None, {"adaptation/score": 0.5, "retention/mean": 0.9})
        found = Measured([base, row]).score("dpo", "d")
        assert found is not None
        assert found.estimate == pytest.approx(0.7)
        widths.append(found.high - found.low)
    assert widths == pytest.approx([2 * 1.96 * math.sqrt(0.7 * 0.3 / 100)] * 2, rel=0.1)


def test_pairs_of_a_prompt_that_are_won_independently_are_as_sure_as_pairs() -> None:
    """Of four pairs each, all won with .7: of 200 prompts' means the variance is .21/4, so ± 1.96 · √(.21/800)."""
    wins = np.repeat([0, 0.25, 0.5, 0.75, 1], [2, 15, 53, 82, 48])  # binomial(4, .7)
    assert (wins.mean(), wins.var()) == (pytest.approx(0.7, abs=0.01), pytest.approx(0.21 / 4, rel=0.02))
    found = Sample((0,), (tuple(range(200)),), (wins[None] - 0.5,), (np.full(200, 4.0),)).interval
    half, of_pairs = (found.high - found.low) / 2, 1.96 * math.sqrt(0.21 / 800)
    assert of_pairs <= half <= 1.2 * of_pairs


# ---- intervals


def sample(*seeds: list[float], ids: tuple[object, ...] | None = None) -> Sample:
    values = np.array(seeds, dtype=float)
    n = values.shape[1]
    return Sample(tuple(range(len(seeds))), (ids or tuple(range(n)),), (values,), (np.ones(n),))


def test_two_items_can_only_be_drawn_three_ways() -> None:
    """Means of two draws of (0, 1): 0, ½, 1 with ¼, ½, ¼: the 2.5 % and 97.5 % points are 0 and 1."""
    found = replace(sample([0.0, 1.0]), grain=0.0).interval
    assert (found.estimate, found.low, found.high) == (0.5, 0.0, 1.0)


def test_a_constant_is_not_certain() -> None:
    """Nothing changed on 4 items: the share that changes may still be up to z²/(4 + z²) = 0.49."""
    found = sample([0.0] * 4).interval
    assert (found.low, found.high) == (pytest.approx(-unseen(4)), pytest.approx(unseen(4)))
    assert unseen(4) == pytest.approx(0.4899, abs=1e-4)
    assert not found.excludes_zero


def test_two_seeds_are_as_unsure_as_student_says() -> None:
    """Means 0.0 and 0.2: s/√2 = 0.1, t of one degree of freedom 12.706: ±1.2706 around 0.1."""
    found = replace(sample([0.0, 0.0], [0.2, 0.2]), grain=0.0).interval
    assert found.estimate == pytest.approx(0.1)
    assert (found.low, found.high) == (pytest.approx(0.1 - 1.27062, abs=1e-4), pytest.approx(0.1 + 1.27062, abs=1e-4))


def test_a_difference_of_shares_is_within_one() -> None:
    """The same two seeds with yes-or-no items: Student's ±1.27 around 0.1 is cut at ±1, and at ±2 between two bases."""
    found = sample([0.0, 0.0], [0.2, 0.2])
    assert (found.interval.low, found.interval.high) == (-1.0, 1.0)
    assert found.interval.estimate == pytest.approx(0.1)
    none = sample([0.0, 0.0], [0.0, 0.0])
    same, others = found.minus(none), found.minus(replace(none, base="base (other run)"))
    assert same is not None
    assert others is not None
    assert (same.interval.low, same.interval.high) == (-1.0, 1.0)
    assert others.interval.high == pytest.approx(0.1 + 1.27062, abs=1e-4)
    all_won = replace(sample([1.0] * 4), base="base").interval  # Wilson's half-width would reach 1.49
    assert (all_won.estimate, all_won.low, all_won.high) == (1.0, pytest.approx(1 - unseen(4)), 1.0)


def test_five_seeds_are_as_unsure_as_student_says() -> None:
    """Means 0 to 0.4: s = 0.158, s/√5 = 0.0707, t of four degrees of freedom 2.776: ±0.196 around 0.2."""
    found = replace(sample(*[[v] * 50 for v in (0.0, 0.1, 0.2, 0.3, 0.4)]), grain=0.0).interval
    assert (found.low, found.high) == (pytest.approx(0.2 - 0.1963, abs=1e-4), pytest.approx(0.2 + 0.1963, abs=1e-4))


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 5, 8])
def test_intervals_hold_the_truth_as_often_as_they_say(seeds: int) -> None:
    """200 experiments whose noise is mostly the seeds': the truth, 0.1, is held in at least 93 % (within counting)."""
    rng = np.random.default_rng(seeds)
    held = 0
    for _ in range(200):
        values = 0.1 + 0.05 * rng.normal(size=(seeds, 1)) + 0.05 * rng.normal(size=(seeds, 40))
        one = Sample(tuple(range(seeds)), (tuple(range(40)),), (values,), (np.ones(40),), grain=0.0).interval
        held += one.low <= 0.1 <= one.high
    assert held / 200 >= 0.93


def test_more_change_never_gives_less_doubt() -> None:
    """Of 64 items 0 to 32 changed, alone and beside a task in which nothing did."""
    last = [0.0, 0.0]
    for changed in range(33):
        part = np.array([[1.0] * changed + [0.0] * (64 - changed)])
        ids, quiet = tuple(range(64)), np.zeros((1, 64))
        for place, parts in enumerate([(part,), (part, quiet)]):
            found = Sample((0,), (ids,) * len(parts), parts, (np.ones(64),) * len(parts)).interval
            width = found.high - found.low
            assert width >= last[place] * 0.95, (changed, place)  # the bootstrap's ends are drawn
            assert found.low <= found.estimate <= found.high
            last[place] = width
    assert last[1] > 0


def test_a_constant_task_adds_doubt_to_a_mean() -> None:
    """Nothing changed on 4 and on 9 items: half the root of the squares of both ends."""
    values, weights = (np.zeros((1, 4)), np.zeros((1, 9))), (np.ones(4), np.ones(9))
    found = Sample((0,), (tuple(range(4)), tuple(range(9))), values, weights).interval
    assert found.high == pytest.approx(math.hypot(unseen(4), unseen(9)) / 2)


def test_one_change_of_320_is_less_sure_than_none() -> None:
    """64 items in five domains: none changed, ±z²/(320 + z²); one item in one domain, a bit more."""
    ids, weights = (tuple(range(64)),), (np.ones(64),)
    none = Sample((0,), ids, (np.zeros((1, 64)),), weights, grain=0.2).interval
    one = Sample((0,), ids, (np.array([[0.2] + [0.0] * 63]),), weights, grain=0.2).interval
    assert none.high == pytest.approx(unseen(320))
    assert one.high - one.estimate > none.high
    assert not one.excludes_zero


def test_differences_take_the_seeds_both_have() -> None:
    first, second = sample([1.0, 1.0], [0.0, 1.0]), sample([0.0, 1.0])
    difference = first.minus(second)
    assert difference is not None
    assert difference.parts[0].tolist() == [[1.0, 0.0]]
    assert difference.seeds == (0,)


def test_differences_without_a_common_seed_are_of_means() -> None:
    first = sample([1.0, 1.0], [0.0, 1.0])
    second = Sample((7,), first.ids, (np.array([[0.0, 1.0]]),), first.weights)
    difference = first.minus(second)
    assert difference is not None
    assert difference.parts[0].tolist() == [[0.5, 0.0]]


def test_a_share_of_what_a_baseline_forgets_is_over_the_seeds_of_both(tmp_path: Path) -> None:
    """SFT forgets .5 with seed 0, .3 with three others; the Q-Adapter .05 with seed 0: .45/.5 avoided, not .45/.35."""
    more = {"follows": [1, 1], "base_follows": [0, 0], "base_kept": {"facts": [1] * 200}}

    def row(method: str, seed: int | None, lost: int) -> Row:
        kept = {"facts": [0] * lost + [1] * (200 - lost)}
        return rule_row(tmp_path, "academy", method, seed, kept=kept, **more)

    sft = [row("sft", seed, lost) for seed, lost in enumerate((100, 60, 60, 60))]
    found = duel(Measured([row("base", None, 0), row("q-adapter", 0, 10), *sft]), "q-adapter", "sft")
    assert found is not None
    assert found.avoided == pytest.approx(0.45)
    assert found.share == pytest.approx(0.9)


def test_other_items_cannot_be_compared() -> None:
    assert sample([1.0, 1.0]).minus(sample([1.0, 1.0], ids=("a", "b"))) is None


def test_forgetting_by_hand(tmp_path: Path) -> None:
    """SFT lost all 4 facts and 2 of 3 right sums: facts 1, sums ½, mean ¾."""
    measured = Measured(toy_rows(tmp_path))
    facts = measured.forgetting("sft", ["academy"], "retention/facts/acc")
    sums = measured.forgetting("sft", ["academy"], "retention/sums/acc")
    both = measured.forgetting("sft", ["academy"])
    assert facts is not None
    assert sums is not None
    assert both is not None
    assert facts.parts[0].tolist() == [[1, 1, 1, 1]]
    assert sums.parts[0].tolist() == [[0, 1, 1, 0]]
    assert both.interval.estimate == 0.75
    kept = measured.retention("sft", "academy")
    assert kept is not None
    assert kept.estimate == pytest.approx(0.875 - 0.75)
    assert kept.low == pytest.approx(max(0.0, 0.875 - both.interval.high))


def test_an_items_change_is_averaged_over_domains_first(tmp_path: Path) -> None:
    """One fact lost in one domain of two is half a fact lost: (0 + ½)/2 over the two items."""
    rows = []
    for domain, kept in (("a", [1, 1]), ("b", [1, 0])):
        more = {"base_follows": [0, 0], "base_kept": {"facts": [1, 1]}}
        rows += [
            rule_row(tmp_path, domain, "base", None, follows=[0, 0], kept={"facts": [1, 1]}, **more),
            rule_row(tmp_path, domain, "dpo", 0, follows=[1, 0], kept={"facts": kept}, **more),
        ]
    found = Measured(rows).forgetting("dpo", ["a", "b"], "retention/facts/acc")
    assert found is not None
    assert found.parts[0].tolist() == [[0.0, 0.5]]


def test_scores_that_are_no_shares_are_not_cut(tmp_path: Path) -> None:
    """BLEU-like: the base 34 and 36, the policy 20 and 22: 14 points forgotten, 21 kept."""
    base, policy = {"retention/text/bleu": 35.0}, {"retention/text/bleu": 21.0}
    rows = [
        Row("d", "base", None, base, retention=kept_files(tmp_path / "b", {"text": [34, 36]}, metric="bleu")),
        Row("d", "sft", 0, policy, retention=kept_files(tmp_path / "s", {"text": [20, 22]}, metric="bleu")),
    ]
    measured = Measured(rows)
    lost = measured.forgetting("sft", ["d"], "retention/text/bleu")
    kept = measured.retention("sft", "d", "retention/text/bleu")
    assert lost is not None
    assert kept is not None
    assert (lost.interval.estimate, lost.interval.low, lost.interval.high) == (14.0, 14.0, 14.0)
    assert (kept.low, kept.estimate, kept.high) == (21.0, 21.0, 21.0)


def test_lower_is_better_turns_forgetting_and_its_interval_around(tmp_path: Path) -> None:
    """Perplexity-like: the base 2 and 4, the policy 3 and 4: forgotten ½, kept interval [3, 4] around 3.5."""
    rows = []
    for method, seed, values in (("base", None, [2.0, 4.0]), ("dpo", 0, [3.0, 4.0])):
        folder = kept_files(tmp_path / method, {"text": values}, metric="bits")
        (folder / "directions.json").write_text('{"retention/text/bits": false}')
        mean = sum(values) / 2
        metrics = {"retention/text/bits": mean, "forgetting/text/bits": mean - 3.0}
        rows.append(Row("d", method, seed, metrics, retention=folder))
    measured = Measured(rows)
    lost = measured.forgetting("dpo", ["d"], "retention/text/bits")
    assert lost is not None
    assert lost.parts[0].tolist() == [[1.0, 0.0]]
    kept = measured.retention("dpo", "d", "retention/text/bits")
    assert kept is not None
    assert (kept.low, kept.estimate, kept.high) == (3.0, 3.5, 4.0)
    assert measured.accuracies == []


# ---- single figures


def test_adherence_and_degradation_by_hand(tmp_path: Path) -> None:
    """Base follows 1 of 4; the Q-Adapter 3 and SFT 2. Forgotten: Q-Adapter ⅛ (1 fact of 4, no sum), SFT ¾."""
    measured = Measured(toy_rows(tmp_path))
    value, interval = adherence_gained(measured, "q-adapter")
    assert value == 0.5
    assert interval is not None
    assert interval.estimate == 0.5
    found = duel(measured, "q-adapter", "sft")
    assert found is not None
    assert found.adaptation == 0.25
    assert found.avoided == pytest.approx(0.625)
    assert found.avoided_interval is not None
    assert found.avoided_interval.estimate == pytest.approx(0.625)
    assert found.avoided_interval.excludes_zero
    assert found.share == pytest.approx(0.625 / 0.75)
    assert [d.baseline for d in duels(measured)] == ["sft"]
    assert summary_metrics(measured) | {} == {
        "mean/adaptation/score/base": 0.25,
        "mean/adaptation/score/q-adapter": 0.75,
        "mean/adaptation/score/sft": 0.5,
        "mean/retention/mean/base": 0.875,
        "mean/retention/mean/q-adapter": 0.75,
        "mean/retention/mean/sft": 0.125,
        "mean/forgetting/mean/base": 0.0,
        "mean/forgetting/mean/q-adapter": 0.125,
        "mean/forgetting/mean/sft": 0.75,
        "summary/adherence_gained/q-adapter": 0.5,
        "summary/adherence_gained/sft": 0.25,
        "summary/degradation_avoided/q-adapter/against_sft": 0.625,
    }


def test_a_duel_is_over_the_domains_both_have(tmp_path: Path) -> None:
    rows = [
        pair_row(tmp_path, "a", "q-adapter", 0, [1, 1], 0.9),
        pair_row(tmp_path, "a", "dpo", 0, [1, -1], 0.8),
        pair_row(tmp_path, "b", "q-adapter", 0, [-1, -1], 0.1),
    ]
    found = duel(Measured(rows), "q-adapter", "dpo")
    assert found is not None
    assert (found.adaptation, found.avoided) == (0.5, pytest.approx(0.1))
    assert duel(Measured([rows[1], rows[2]]), "q-adapter", "dpo") is None


def test_a_difference_lies_in_its_interval_for_any_bases(tmp_path: Path) -> None:
    """Two runs with bases of their own: each method is taken against its own, in the number as in the interval.

    Base (a) follows 0 of 20 and keeps all; the Q-Adapter 10 and 16. Base (b) follows 8 and keeps 10; DPO 16 and 8.
    """
    rows = []
    for label, method, before, after, base_kept, kept in (
        ("a", "q-adapter", 0, 10, 20, 16),
        ("b", "dpo", 8, 16, 10, 8),
    ):
        follows, old = [1] * before + [0] * (20 - before), {"facts": [1] * base_kept + [0] * (20 - base_kept)}
        new = {"facts": [1] * kept + [0] * (20 - kept)}
        more = {"base_follows": follows, "base_kept": old}
        root = tmp_path / label
        rows.append(rule_row(root, "d", f"base ({label})", None, follows=follows, kept=old, **more))
        mine = [1] * after + [0] * (20 - after)
        rows.append(rule_row(root, "d", f"{method} ({label})", 0, follows=mine, kept=new, **more))
    found = duel(Measured(rows), "q-adapter (a)", "dpo (b)")
    assert found is not None
    assert found.adaptation == pytest.approx(0.5 - 0.4)
    assert found.avoided == pytest.approx(0.1 - 0.2)
    for value, interval in (
        (found.adaptation, found.adaptation_interval),
        (found.avoided, found.avoided_interval),
    ):
        assert interval is not None
        assert interval.low <= value <= interval.high
    bare = duel(Measured([replace(row, adaptation=None, retention=None) for row in rows]), "q-adapter (a)", "dpo (b)")
    assert bare is not None
    assert bare.adaptation == pytest.approx(0.1)
    assert bare.avoided == pytest.approx(-0.1)
    assert bare.avoided_interval is None


def test_the_number_is_over_the_seeds_of_its_interval(tmp_path: Path) -> None:
    """The Q-Adapter has a second seed that SFT lacks: the difference is over the first."""
    rows = toy_rows(tmp_path)
    kept = {"facts": [0, 0, 0, 0], "sums": [0, 0, 0, 0]}
    more = {"base_follows": [0, 0, 0, 1], "base_kept": {"facts": [1, 1, 1, 1], "sums": [1, 1, 1, 0]}}
    rows.append(rule_row(tmp_path, "academy", "q-adapter", 1, follows=[0, 0, 0, 0], kept=kept, **more))
    found = duel(Measured(rows), "q-adapter", "sft")
    assert found is not None
    assert (found.adaptation, found.avoided) == (pytest.approx(0.25), pytest.approx(0.625))


def test_pareto_front() -> None:
    """b is beaten by a; d and e are the same and beat each other not."""
    found = pareto_front({"a": (0.5, 0.9), "b": (0.5, 0.8), "c": (0.9, 0.5), "d": (0.7, 0.7), "e": (0.7, 0.7)})
    assert found == ["a", "c", "d", "e"]


def test_points_leave_out_what_was_not_measured() -> None:
    rows = [
        Row("d", "sft", 0, {"adaptation/score": 0.5}),
        Row("d", "dpo", 0, {"adaptation/score": 0.6} | {"retention/mean": 0.7}),
    ]
    assert points(rows, None) == {"dpo": (0.6, 0.7)}


# ---- sentences


def test_the_summary_says_what_the_numbers_say(tmp_path: Path) -> None:
    text = sentences(Measured(toy_rows(tmp_path)))
    assert text[0].startswith(
        "q-adapter keeps 85.7 % of the base's retention (0.750 of 0.875) and reaches an adaptation"
    )
    assert "adaptation score of 0.750, +0.500 [" in text[0]
    assert text[1].startswith("q-adapter against sft: learnt +0.250 [")
    assert "(not larger than the item noise, one seed); degradation avoided +0.625 [" in text[1]
    assert text[1].endswith("83 % of what sft forgets (larger than the item noise, one seed).")
    assert any(line.endswith("as much of both): q-adapter.") for line in text)
    assert "Kept most, best first: q-adapter 0.750, sft 0.125." in text
    assert any("Each method is shown at one setting, not at the best" in line for line in text)
    assert text[-1].startswith("One seed only (q-adapter and sft): ")


def test_a_mean_that_one_domain_carries_is_taken_apart() -> None:
    """Avoided against SFT: 0.3 in a, -0.02 in b and c; SFT learnt more. In b and c SFT is ahead in both."""
    rows = [Row(d, "base", None, {"adaptation/score": 0.0, "retention/mean": 1.0}) for d in "abc"]
    for domain, ours, sft in (("a", 0.9, 0.6), ("b", 0.9, 0.92), ("c", 0.9, 0.92)):
        rows.append(Row(domain, "q-adapter", 0, {"adaptation/score": 0.8, "retention/mean": ours}))
        rows.append(Row(domain, "sft", 0, {"adaptation/score": 0.9, "retention/mean": sft}))
        rows.append(Row(domain, "replay", 0, {"adaptation/score": 0.0, "retention/mean": 1.0}))
    text = "\n".join(sentences(Measured(rows), {"methods": {"dpo": {"beta": 1.0}}}))
    assert "q-adapter against sft: sft learnt 0.100 more (noise unknown" in text
    assert "by domain, learnt and degradation avoided: a -0.100 and +0.300, b -0.100 and -0.020, c" in text
    assert "from a: without it -0.020." in text
    assert "sft has at least as much of both, and more of one, in b and c." in text
    assert "On that front, but not above the base in what was learnt, beyond the noise: replay." in text
    assert "Each method is shown at one setting, not" in text
    rows.append(Row("a", "dpo", 0, {"adaptation/score": 0.8, "retention/mean": 0.9}))
    text = "\n".join(sentences(Measured(rows), {"methods": {"dpo": {"beta": 1.0}}}))
    assert "q-adapter against dpo, in a only: learnt the same, 0.000 (" in text
    assert "shown at one setting (dpo: β = 1.0), not" in text


def test_a_judge_at_chance_is_reported() -> None:
    """11 of 20 pairs may be a coin's, 19 of 20 not."""
    for accuracy, chance in ((0.55, True), (0.95, False)):
        metrics = {"adaptation/score": 0.5, "adaptation/judge_accuracy": accuracy, "adaptation/judge_accuracy_n": 20.0}
        text = "\n".join(sentences(Measured([Row("d", "dpo", 0, metrics)])))
        assert f"d: the judge of the answers agrees with {accuracy:.3f} [" in text
        assert ("which may be chance: its win rates are left out" in text) == chance


def test_win_rates_of_a_judge_at_chance_are_no_result() -> None:
    """11 of 20 pairs may be a coin's, 19 of 20 not: the first domain's win rate is in no table and no sentence."""
    rows = []
    for domain, accuracy in (("a", 0.55), ("b", 0.95)):
        judged = {"adaptation/judge_accuracy": accuracy, "adaptation/judge_accuracy_n": 20.0}
        kept = {"adaptation/score": 0.7, "retention/mean": 0.5, "retention/facts/acc": 0.5, **judged}
        rows += [
            Row(domain, "base", None, kept | {"adaptation/score": 0.5, "adaptation/win_rate": 0.5}),
            Row(domain, "q-adapter", 0, kept | {"adaptation/win_rate": 0.9 if domain == "a" else 0.6}),
        ]
    measured = Measured(rows)
    assert measured.judged_by_chance == ["a"]
    table = main_table(measured)
    assert table.columns[-1] == "win rate (b)"
    assert [cells[-1].text for _, cells in table.rows] == ["0.500", "0.600"]
    labels = [label for label, _ in further_table(measured).rows]
    assert "win rate of answers against the base ↑ (b only)" in labels
    lines = sentences(measured)
    assert any("and wins 60 % of its answers" in line for line in lines)
    assert "a: the judge of the answers agrees with 0.550" in "\n".join(first_sentences(measured)[0])
    only_a = Measured(rows[:2])
    assert "win rate" not in main_table(only_a).columns
    assert not any("wins" in line or "Answers not judged" in line for line in sentences(only_a))
    assert rows[1].metrics["adaptation/win_rate"] == 0.9, "what was measured stays as it is"


def test_measures_of_subtasks_are_not_listed() -> None:
    """`blimp` and `mmlu_pro` are measured; `blimp_x` is a part of the first, and so is no measure of its own."""
    kept = {"retention/blimp/acc": 0.8, "retention/mmlu_pro/acc": 0.5, "retention/mmlu_pro/acc_norm": 0.6}
    forgotten = {"forgetting/blimp/acc": 0.0, "forgetting/mmlu_pro/acc": 0.0}
    parts = {f"retention/blimp_{part}/acc": 0.7 for part in ("x", "y_1")}
    measured = Measured([Row("d", "dpo", 0, {"adaptation/score": 0.5, **kept, **forgotten, **parts})])
    assert subtask_measures(measured) == list(parts)
    assert [label for label, _ in further_table(measured).rows] == ["retention/mmlu_pro/acc_norm"]


def test_a_judges_interval_is_of_the_pairs_it_was_tried_on() -> None:
    """30 right of 40 are [.598, .858] by Wilson, for any number of pairs of the policy's own accuracy.

    With z² = 3.8415: centre (.75 + 3.8415/80)/(1 + 3.8415/40) = .7281, half a width
    1.96/1.09604 · √(.75 · .25/40 + 3.8415/6400) = .1299.
    """
    metrics = {"adaptation/score": 0.5, "adaptation/n": 400.0, "adaptation/judge_accuracy": 0.75}
    row = Row("d", "dpo", 0, {**metrics, "adaptation/judge_accuracy_n": 40.0})
    assert judge_sentences(Measured([row])) == [
        "d: the judge of the answers agrees with 0.750 [0.598, 0.858] of 40 held-out pairs."
    ]
    assert judge_sentences(Measured([Row("d", "dpo", 0, metrics)])) == []
    ends = {"adaptation/judge_accuracy_low": 0.48, "adaptation/judge_accuracy_high": 0.9}  # several pairs a prompt
    wide = Measured([replace(row, metrics={**row.metrics, **ends})])
    assert "agrees with 0.750 [0.480, 0.900] of 40" in judge_sentences(wide)[0]
    assert wide.judged_by_chance == ["d"]


def test_undecided_answers_are_reported() -> None:
    """3 + 5 of DPO in two domains, 4 of SFT; without any there is nothing to say."""
    rows = [Row("a", "base", None, {"adaptation/score": 0.5})]
    for domain, method, count in (("a", "dpo", 3.0), ("b", "dpo", 5.0), ("a", "sft", 4.0), ("b", "sft", 0.0)):
        rows.append(Row(domain, method, 0, {"adaptation/score": 0.5, "adaptation/undecided": count}))
    expected = (
        "Answers that the judge left undecided, over all domains and seeds: 12 (sft 4, dpo 8). "
        "Win rates are over the others."
    )
    assert expected in sentences(Measured(rows))
    for row in rows[1:]:
        row.metrics["adaptation/undecided"] = 0.0
    assert "undecided" not in "\n".join(sentences(Measured(rows)))


def test_a_win_rate_has_its_interval(tmp_path: Path) -> None:
    """Two wins and two ties of four are 0.75; in another domain there was no judge, so the mean is over the first."""
    rows = toy_rows(tmp_path)
    rows[1].metrics["adaptation/win_rate"] = 0.75
    rows.append(pair_row(tmp_path, "harmless", "q-adapter", 0, [1.0], 0.9))
    value, interval = Measured(rows).win_rate("q-adapter", ["academy"])
    assert value.mean == 0.75
    assert interval is not None
    assert interval.estimate == 0.75
    assert interval.low < 0.75 < interval.high <= 1.0
    table = main_table(Measured(rows))
    assert table.columns[-1] == "win rate (academy)"
    assert [cells[-1].text for _, cells in table.rows] == ["–", "0.750", "–"]


def test_wins_are_reported(tmp_path: Path) -> None:
    rows = toy_rows(tmp_path)
    rows[1].metrics["adaptation/win_rate"] = 0.8
    assert "and wins 80 % of its answers against the base's" in sentences(Measured(rows))[0]


def test_chance_is_called_chance(tmp_path: Path) -> None:
    """10 right of 20 may be a coin's; 20 of 20 not: the interval of a constant starts at 1 - z²/(20 + z²) = 0.84."""
    coin = [1.0, -1.0] * 10
    rows = [
        pair_row(tmp_path, "harmless", "base", None, [0.0] * 20, 0.9),
        pair_row(tmp_path, "harmless", "dpo", 0, coin, 0.9),
        pair_row(tmp_path, "academy", "base", None, [0.0] * 20, 0.9),
        pair_row(tmp_path, "academy", "dpo", 0, [1.0] * 20, 0.9),
    ]
    text = "\n".join(sentences(Measured(rows)))
    assert "harmless: no method's accuracy is distinguishable from chance (0.5): dpo 0.500 [" in text
    assert "academy" not in text
    score = Measured(rows).score("dpo", "academy")
    assert score is not None
    assert (score.low, score.high) == (pytest.approx(1 - unseen(20)), 1.0)


def test_the_toy_world_knows_no_chance(tmp_path: Path) -> None:
    assert "chance" not in "\n".join(sentences(Measured(toy_rows(tmp_path))))


def test_without_item_scores_the_noise_is_unknown() -> None:
    rows = [
        Row("d", "base", None, {"adaptation/score": 0.5, "retention/mean": 1.0}),
        Row("d", "q-adapter", 0, {"adaptation/score": 0.75, "retention/mean": 0.9}),
        Row("d", "dpo", 0, {"adaptation/score": 0.5, "retention/mean": 0.8}),
    ]
    text = sentences(Measured(rows))
    assert (
        "q-adapter against dpo: learnt +0.250 (noise unknown: no item scores); degradation avoided +0.100 (" in text[1]
    )


def test_compared_runs_with_bases_of_their_own(tmp_path: Path) -> None:
    """`sft (b)` is measured against `base (b)`, not against another run's base."""
    rows = toy_rows(tmp_path)
    other = [
        Row(r.domain, f"{r.method} (b)", r.seed, {**r.metrics, "retention/mean": 0.5}, r.training, r.adaptation)
        for r in rows
    ]
    measured = Measured([*rows, *other])
    assert measured.methods == ["base", "base (b)", "q-adapter", "q-adapter (b)", "sft", "sft (b)"]
    assert measured.base_of("sft (b)") == "base (b)"
    assert measured.base_of("sft") == "base"
    assert {(d.method, d.baseline) for d in duels(measured)} == {
        ("q-adapter", "q-adapter (b)"),
        ("q-adapter", "sft"),
        ("q-adapter", "sft (b)"),
        ("q-adapter (b)", "sft"),
        ("q-adapter (b)", "sft (b)"),
    }
