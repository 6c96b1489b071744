"""Uncertainty of the further measures: paired by item where the files have the items, over seeds where not."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

import qadapter.report.intervals as intervals
import qadapter.report.summary as summary
from qadapter.files.artifacts import write_json_lines
from qadapter.report.build import build_report
from qadapter.report.changes import (
    HOWTOS,
    IDENTICAL,
    IMPLIED,
    MARGIN,
    NORMALISED,
    OF_PAIRS,
    PREFERENCE,
    REFUSALS,
    changes,
    refusals,
)
from qadapter.report.intervals import Measured
from qadapter.report.rows import Row
from qadapter.report.summary import duels, sentences, summary_metrics
from qadapter.report.tables import cost_table, further_table
from qadapter.toyworld.world import ToyWorld
from tests.support.report_files import pair_row, prompt, toy_rows

Z2 = 1.959963984540054**2
COLUMNS = (
    "chosen_log_prob",
    "rejected_log_prob",
    "base_chosen_log_prob",
    "base_rejected_log_prob",
    "chosen_tokens",
    "rejected_tokens",
)
# chosen, rejected, the base's chosen, the base's rejected, tokens of both
PAIRS = [
    (-2, -3, -3, -3, 2, 2),  # the base is undecided, the policy right
    (-4, -3, -4, -5, 4, 2),  # the base is right, the policy wrong; per token (-1 against -1.5) still right
    (-1, -2, -2, -1, 1, 2),  # the base is wrong, the policy right; per token (-1 against -1) undecided
    (-2, -1, -2, -1, 1, 1),  # both are wrong by as much
]
CHANGED = {
    PREFERENCE: [0.5, -1.0, 1.0, 0.0],  # 1 0 1 0 less ½ 1 0 0
    NORMALISED: [0.5, 0.0, 0.5, 0.0],  # 1 1 ½ 0 less ½ 1 0 0
    IMPLIED: [0.5, -0.5, 0.5, 0.0],  # margins 1, -2, 2, 0: 1 0 1 ½ less ½
    MARGIN: [1.0, -2.0, 2.0, 0.0],
}
OF_BASE = {PREFERENCE: 0.375, NORMALISED: 0.375, IMPLIED: 0.5, MARGIN: 0.0}
SORRY = "sorry , i can not help with that ."
assert ToyWorld.is_refusal(SORRY)


def unseen(n: int) -> float:
    """Wilson's upper end for 0 of n: z² / (n + z²)."""
    return Z2 / (n + Z2)


def scored(
    root: Path, domain: str, method: str, seed: int | None, pairs: Sequence[Sequence[float]], metrics: dict[str, float]
) -> Row:
    folder = root / f"{domain}-{method}-{seed}"
    rows = [{"pair": i} | dict(zip(COLUMNS, pair, strict=True)) for i, pair in enumerate(pairs)]
    write_json_lines(folder / "pairs.jsonl", rows)
    return Row(domain, method, seed, metrics, adaptation=folder)


def preferring(root: Path, domain: str = "d") -> list[Row]:
    """The base and DPO, which scored the pairs above."""
    of_dpo = {name: OF_BASE[name] + sum(values) / 4 for name, values in CHANGED.items()}
    untouched = [(*pair[2:4], *pair[2:]) for pair in PAIRS]
    return [
        scored(root, domain, "base", None, untouched, dict(OF_BASE)),
        scored(root, domain, "dpo", 0, PAIRS, of_dpo),
    ]


def answering(root: Path, domain: str, method: str, seed: int | None, replies: Sequence[str], **more: float) -> Row:
    """A policy's answers to old prompts, to which the base said `old 0`, `old 1` and so on."""
    folder = root / f"{domain}-{method}-{seed}"
    answers = [{"prompt": prompt(f"q{i}"), "base": f"old {i}", "reply": reply} for i, reply in enumerate(replies)]
    write_json_lines(folder / "old_answers.jsonl", answers)
    identical = sum(reply == f"old {i}" for i, reply in enumerate(replies)) / len(replies)
    return Row(
        domain,
        method,
        seed,
        {IDENTICAL: identical} | {f"retention/{k}": v for k, v in more.items()},
        None,
        None,
        folder,
    )


# ---- items


def test_what_changed_in_each_pair_by_hand(tmp_path: Path) -> None:
    base, dpo = preferring(tmp_path)
    found = changes(dpo, base, None, None)
    assert {name: items.values.tolist() for name, items in found.items()} == CHANGED
    assert all(items.ids == (0, 1, 2, 3) for items in found.values())


def test_pairs_that_contradict_the_metric_have_no_interval(tmp_path: Path) -> None:
    base, dpo = preferring(tmp_path)
    dpo.metrics[MARGIN] = 0.3
    del dpo.metrics[IMPLIED]
    assert set(changes(dpo, base, None, None)) == {PREFERENCE, NORMALISED}
    assert changes(dpo, None, None, None) == {}
    old = pair_row(tmp_path, "d", "sft", 0, [1.0, -1.0], 0.9)  # its file has no numbers of tokens
    assert changes(old, base, None, None) == {}


def test_the_items_are_those_of_the_evaluations_numbers(tmp_path: Path) -> None:
    """100 random pairs, ties among them: each measure's items are what `preference_metrics` says it changed."""
    from qadapter.evaluation.preference import PairScores, preference_metrics

    rng = np.random.default_rng(0)
    logs = rng.integers(-6, 0, size=(4, 100)).astype(float)
    tokens = rng.integers(1, 4, size=(2, 100))
    policy, base = (PairScores(*logs[i : i + 2], *tokens, np.arange(100)) for i in (0, 2))
    reported = [
        {f"adaptation/{name}": value for name, value in preference_metrics(scores, base).items()}
        for scores in (policy, base)
    ]
    row = scored(tmp_path, "d", "dpo", 0, np.vstack([logs, tokens]).T.tolist(), reported[0])
    found = changes(row, Row("d", "base", None, reported[1]), None, None)
    assert set(found) == set(OF_PAIRS)
    assert found[PREFERENCE].mean != found[NORMALISED].mean


def test_refusals_are_counted_as_the_evaluation_counts_them(tmp_path: Path) -> None:
    """In the toy world the how-tos by its rule, else the old prompts by phrases."""
    from qadapter.evaluation import old_answers

    assert HOWTOS == old_answers.HOWTOS
    answers = [
        {"prompt": prompt("a"), "base": "x", "reply": "I'm sorry, but I can't help with that."},
        {"prompt": prompt("b"), "base": "y", "reply": "y"},
        {"prompt": prompt("c"), "base": "z", "reply": "z"},
    ]
    howtos = [{"task": HOWTOS, "doc_id": i, "response": reply} for i, reply in enumerate(["first wash it .", SORRY])]
    items = [{"task": "toy_facts", "doc_id": 0, "response": SORRY}, *howtos]
    for given, share in ((items, 1 / 2), (items[:1], 1 / 3)):
        metrics = old_answers.answer_metrics(answers, given)
        assert metrics[REFUSALS] == share
        folder = tmp_path / str(share)
        write_json_lines(folder / "items.jsonl", given)
        write_json_lines(folder / "old_answers.jsonl", answers)
        found = refusals(Row("d", "dpo", 0, metrics, retention=folder))
        assert found is not None
        assert found.mean == share
    assert refusals(Row("d", "dpo", 0, {}, retention=tmp_path / str(1 / 2))) is None


# ---- intervals and tables


def test_preferences_have_intervals_around_the_bases(tmp_path: Path) -> None:
    """Of DPO's four pairs the base's 0.375 becomes 0.5; the draws of (½, -1, 1, 0) are ½ ± 1 at most."""
    measured = Measured(preferring(tmp_path))
    for name, values in CHANGED.items():
        found = measured.further(name, "dpo", ["d"])
        assert found is not None
        assert found.estimate == pytest.approx(OF_BASE[name] + sum(values) / 4)
        assert found.low < found.estimate < found.high
        assert (found.items, found.seeds) == (4, 1)
        assert measured.further(name, "base", ["d"]) is None
    preference, margin = (measured.further(name, "dpo", ["d"]) for name in (PREFERENCE, MARGIN))
    assert preference is not None
    assert margin is not None
    assert (preference.low, preference.high) == (0.0, 1.0)  # a share stays one
    # Sums of four draws of (1, -2, 2, 0): below -5 are 5 of 256, above 6 too, -5 or less are 9 and 6 or more 15.
    assert (margin.low, margin.high) == (-5 / 4, 6 / 4)
    cells = {label: [cell.whole for cell in cells] for label, cells in further_table(measured).rows}
    assert cells["preference accuracy, log-probability ↑"] == ["0.375", "0.500 [0.000, 1.000]"]
    assert cells["margin of the implied reward, nats"] == ["0.000", "0.250 [-1.250, 1.500]"]


def test_preferences_of_two_domains_are_parts_of_equal_weight(tmp_path: Path) -> None:
    """In `e` nothing changed on 4 pairs, so the mean change is half of that in `d`."""
    rows = preferring(tmp_path)
    untouched = [(*pair[2:4], *pair[2:]) for pair in PAIRS]
    rows += [scored(tmp_path, "e", m, s, untouched, dict(OF_BASE)) for m, s in (("base", None), ("dpo", 0))]
    measured = Measured(rows)
    found = measured.further(PREFERENCE, "dpo", ["d", "e"])
    assert found is not None
    assert (found.estimate, found.items) == (pytest.approx(0.375 + 0.125 / 2), 8)
    alone = measured.further(PREFERENCE, "dpo", ["e"])
    assert alone is not None
    assert alone.high == pytest.approx(0.375 + unseen(4))


def test_two_seeds_are_as_unsure_as_student_says(tmp_path: Path) -> None:
    """Margins of every pair 0 in one seed and 0.2 in the other: 0.1 ± 12.706 · 0.1."""
    rows = [scored(tmp_path, "d", "base", None, [(-1, -1, -1, -1, 1, 1)] * 4, {MARGIN: 0.0})]
    rows += [
        scored(tmp_path, "d", "dpo", seed, [(-1 + margin, -1, -1, -1, 1, 1)] * 4, {MARGIN: margin})
        for seed, margin in enumerate((0.0, 0.2))
    ]
    (row,) = further_table(Measured(rows)).rows
    assert [cell.whole for cell in row[1]] == ["0.000", "0.100 [-1.171, 1.371]"]


def test_old_answers_are_the_same_in_every_domain(tmp_path: Path) -> None:
    """Of four answers one changed in `a`, none in `b`: 0.875. SFT changed none of eight: at least 1 - z²/(8 + z²)."""
    same = [f"old {i}" for i in range(4)]
    rows = []
    for domain, replies in (("a", [*same[:3], "new"]), ("b", same)):
        rows.append(answering(tmp_path, domain, "base", None, same))
        rows += [answering(tmp_path, domain, "sft", 0, same), answering(tmp_path, domain, "dpo", 0, replies)]
    measured = Measured(rows)
    change = measured.change(IDENTICAL, "dpo", ["a", "b"])
    assert change is not None
    assert [part.tolist() for part in change.parts] == [[[0.0, 0.0, 0.0, -0.5]]]
    assert change.grain == 0.5
    (row,) = further_table(measured).rows
    low = f"{1 - unseen(8):.3f}"
    base, sft, dpo = row[1]
    assert (base.whole, sft.whole) == ("1.000", f"1.000 [{low}, 1.000]")
    assert dpo.text == "0.875"
    assert dpo.interval.endswith(", 1.000]")


def test_over_refusals_are_paired_with_the_bases(tmp_path: Path) -> None:
    """The base refuses the first how-to, DPO the second and third: -1 + 1 + 1 of four."""
    rows = []
    for method, seed, refused in (("base", None, [1, 0, 0, 0]), ("dpo", 0, [0, 1, 1, 0])):
        folder = tmp_path / method
        howtos = [
            {"task": HOWTOS, "doc_id": i, "scores": {}, "response": SORRY if r else "wash it ."}
            for i, r in enumerate(refused)
        ]
        write_json_lines(folder / "items.jsonl", howtos)
        (folder / "directions.json").write_text(json.dumps({REFUSALS: False}))
        rows.append(Row("d", method, seed, {REFUSALS: sum(refused) / 4}, retention=folder))
    measured = Measured(rows)
    change = measured.change(REFUSALS, "dpo", ["d"])
    assert change is not None
    assert [part.tolist() for part in change.parts] == [[[-1.0, 1.0, 1.0, 0.0]]]
    found = measured.further(REFUSALS, "dpo", ["d"])
    assert found is not None
    assert (found.low, found.estimate, found.high) == (0.0, 0.5, 1.0)


def test_the_rules_row_has_the_scores_interval(tmp_path: Path) -> None:
    measured = Measured(toy_rows(tmp_path))
    score = measured.score("q-adapter", "academy")
    assert score is not None
    (cells,) = [cells for label, cells in further_table(measured).rows if "exact rule" in label]
    assert [cell.text for cell in cells] == ["0.250", "0.750", "0.500"]
    assert cells[1].interval == f"[{score.low:.3f}, {score.high:.3f}]"
    assert cells[0].interval == ""


def test_without_items_the_seeds_are_what_is_known() -> None:
    """KL 0.4 and 0.6 over seeds: √(0.01 + 0.01) = 0.141; costs with their own digits; what never differs has no ±."""
    rows = [
        Row("d", "dpo", seed, {
            "forgetting/kl_per_token": 0.4 + 0.2 * seed,
            "adaptation/ties": 3.0 + 2 * seed,
            "adaptation/n": 48.0,
            "cost/train_seconds": 7.0 + seed,
            "cost/train_tokens": 12_000.0 + 100 * seed,
            "cost/trainable_parameters": 34816.0,
            "cost/decoding_tokens_per_second": 7000.0 + 600 * seed,
        })
        for seed in (0, 1)
    ]  # fmt: skip
    further = {label: cells[0].whole for label, cells in further_table(Measured(rows)).rows}
    assert further == {
        "ties, answers": "4.0 ± 1.4",
        "held-out pairs scored": "48",
        "KL(base ‖ policy) per token on old text, nats ↓": "0.500 ± 0.141",
    }
    costs = {label: cells[0].whole for label, cells in cost_table(Measured(rows)).rows}
    assert costs == {
        "training, s": "7.5 ± 0.7",
        "training, tokens": "12,050 ± 71",
        "trainable parameters": "34,816",
        "decoding, tokens/s": "7,300 ± 420",
    }
    single = {label: cells[0].whole for label, cells in cost_table(Measured(rows[:1])).rows}
    assert single["training, s"] == "7"
    assert single["decoding, tokens/s"] == "7,000"


# ---- how often intervals are drawn


def many(root: Path) -> list[Row]:
    """Five settings of the Q-Adapter and two baselines: 10 + 10 duels. Setting i is right on 10 + i pairs of 20."""
    rows = [pair_row(root, "d", "base", None, [0.0] * 20, 0.9)]
    for i, name in enumerate([*(f"q-adapter · w={w}" for w in range(5)), "sft", "dpo"]):
        rows.append(pair_row(root, "d", name, 0, [1.0] * (10 + i) + [-1.0] * (10 - i), 0.9 - i / 100))
    return rows


def test_only_reported_values_have_intervals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 duels, of 12 the intervals: one bootstrap each, for the rows have no items of what was kept."""
    drawn = []
    real = intervals.mean_of_tasks_interval
    monkeypatch.setattr(intervals, "mean_of_tasks_interval", lambda *a, **k: drawn.append(1) or real(*a, **k))
    found = duels(Measured(many(tmp_path)))
    assert len(found) == 20
    assert len(drawn) == 12
    assert [d.adaptation_interval is None for d in found] == [False] * 12 + [True] * 8
    last = found[-1]  # right on 14 of 20 against 16
    assert (last.method, last.baseline) == ("q-adapter · w=4", "dpo")
    assert (last.adaptation, last.avoided) == (pytest.approx(-0.1), pytest.approx(0.02))


@pytest.mark.slow
def test_a_report_fights_each_duel_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = many(tmp_path / "rows")
    fought = []
    real = summary.duel

    def counted(measured: Measured, method: str, baseline: str, domain: str | None = None, **more: bool) -> object:
        if domain is None:
            fought.append((method, baseline))
        return real(measured, method, baseline, domain, **more)

    monkeypatch.setattr(summary, "duel", counted)
    out = tmp_path / "out"
    out.mkdir()
    build_report(rows, title="T", data={}, config={}, out=out)
    assert len(fought) == len(set(fought)) == 20
    measured = Measured(rows)
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "8 further pairs of settings are compared in metrics.json." in text
    assert all(f"- {line}" in text for line in sentences(measured, {}))
    assert json.loads((out / "metrics.json").read_text()) == summary_metrics(measured)


def test_an_estimate_is_that_of_its_interval(tmp_path: Path) -> None:
    """Without the draws the same number, weights and seeds included."""
    rng = np.random.default_rng(0)
    parts = (rng.normal(size=(3, 7)), rng.normal(size=(3, 4)))
    weights = (rng.uniform(1, 5, size=7), np.ones(4))
    found = intervals.Sample((0, 1, 2), (tuple(range(7)), tuple(range(4))), parts, weights)
    assert found.estimate == found.interval.estimate
    assert not math.isnan(found.estimate)
