"""The sweep's choice on one half of the items and its report on the other, on measurements written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qadapter.report.rows import Row
from qadapter.report.sweep.halves import half_rows, halves_section, selects
from qadapter.report.sweep.points import Setting

PROMPTS = [f"prompt {number}" for number in range(12)]  # two pairs each
ITEMS = 20


def lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def measured(folder: Path, method: str, seed: int | None, chosen: float, other: float, kept: float) -> Row:
    """A policy that wins these shares of the pairs of either half, and answers this share of the items."""
    counts = {True: 0, False: 0}
    totals = {half: 2 * sum(selects(prompt) == half for prompt in PROMPTS) for half in (True, False)}
    pairs = []
    for prompt in (prompt for prompt in PROMPTS for _ in range(2)):
        half = selects(prompt)
        wins = counts[half] < round((chosen if half else other) * totals[half])
        counts[half] += 1
        margin = 0.0 if method == "base" else (1.0 if wins else -1.0)
        sides = {"chosen_log_prob": margin, "rejected_log_prob": 0.0}
        pairs.append({"pair": len(pairs), "prompt": prompt, **sides, **{f"base_{name}": 0.0 for name in sides}})
    lines(folder / "adaptation/pairs.jsonl", pairs)
    scores = [float(number < kept * ITEMS) for number in range(ITEMS)]
    items = [{"task": "facts", "doc_id": place, "scores": {"acc": score}} for place, score in enumerate(scores)]
    lines(folder / "retention/items.jsonl", items)
    (folder / "retention/directions.json").write_text(json.dumps({"retention/facts/acc": True}))
    won = sum((0.5 if method == "base" else float(pair["chosen_log_prob"] > 0)) for pair in pairs) / len(pairs)
    retention = sum(scores) / ITEMS
    metrics = {
        "adaptation/score": won,
        "retention/facts/acc": retention,
        "retention/mean": retention,
        "forgetting/facts/acc": 0.0,
        "forgetting/kl_per_token": 0.0 if method == "base" else 0.01,
    }
    return Row("academy", method, seed, metrics, None, folder / "adaptation", folder / "retention")


def setting(name: str, method: str) -> Setting:
    return Setting(name, method, method, ("g",), True, {}, name)


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    """DPO's first setting is lucky on the half that chooses, its second good on both; the Q-Adapter has one of each."""
    shares = {"dpo a": (1.0, 0.5), "dpo b": (0.75, 1.0), "q a": (0.75, 0.75), "q b": (0.5, 1.0)}
    found = [measured(tmp_path / "base", "base", None, 0, 0, 1.0)]
    for name, (chosen, other) in shares.items():
        found += [measured(tmp_path / f"{name} {seed}", name, seed, chosen, other, 1.0) for seed in (0, 1)]
    return found


SETTINGS = [setting("dpo a", "dpo"), setting("dpo b", "dpo"), setting("q a", "q-adapter"), setting("q b", "q-adapter")]


def test_pairs_of_one_prompt_are_on_one_side(rows: list[Row]) -> None:
    for chosen in (True, False):
        halves = half_rows(rows, chosen)
        prompts = [prompt for prompt in PROMPTS if selects(prompt) == chosen]
        assert {len(half.gains) for half in halves} == {len(prompts)}
        assert 2 <= len(prompts) <= len(PROMPTS) - 2
        assert halves[0].row.metrics["adaptation/score"] == 0.5
        of_a = next(half for half in halves if half.row.method == "dpo a")
        assert of_a.row.metrics["adaptation/score"] == pytest.approx(1.0 if chosen else 0.5, abs=0.1)


def test_the_lucky_setting_is_reported_without_its_luck(rows: list[Row]) -> None:
    text, metrics = halves_section(rows, SETTINGS, expected=2)
    reported = {half.row.method: half.row.metrics["adaptation/score"] for half in half_rows(rows, False)}
    table = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "dpo a" in table["dpo"]
    assert f"{reported['dpo a']:.3f}" in table["dpo"]
    assert "q a" in table["q-adapter"]
    difference = metrics["sweep/half_adaptation_difference/dpo"]
    assert difference == pytest.approx(reported["q a"] - reported["dpo a"], abs=1e-9)
    assert metrics["sweep/half_retention_difference/dpo"] == 0
    assert f"- q-adapter − dpo: adaptation {difference:+.3f} [" in text


def test_without_items_there_is_no_section(rows: list[Row], tmp_path: Path) -> None:
    (tmp_path / "q a 1/adaptation/pairs.jsonl").unlink()
    assert halves_section(rows, SETTINGS, expected=2) == ("", {})


def test_a_chosen_setting_is_confirmed_by_a_seed_that_chose_nothing(rows: list[Row], tmp_path: Path) -> None:
    """Seed 2 of the chosen settings counts in what is reported, as one of three; a row that has no partner does not."""
    alone, before = halves_section(rows, SETTINGS, expected=2)
    confirming = [
        measured(tmp_path / "dpo a 2", "dpo a", 2, 0.0, 1.0, 0.5),
        measured(tmp_path / "q a 2", "q a", 2, 0.0, 0.25, 1.0),
        measured(tmp_path / "q a 3", "q a", 3, 1.0, 1.0, 1.0),
        measured(tmp_path / "dpo b 2", "dpo b", 2, 1.0, 1.0, 1.0),
    ]
    text, metrics = halves_section(rows, SETTINGS, 2, confirming)
    table = {line.split("|")[1].strip(): line for line in text.splitlines() if line.startswith("|")}
    assert "dpo a" in table["dpo"]
    assert "q a" in table["q-adapter"]
    score = {
        (half.row.method, half.row.seed): half.row.metrics["adaptation/score"]
        for half in half_rows([*rows, *confirming], False)
    }
    by_seed = [score["q a", seed] - score["dpo a", seed] for seed in (0, 1, 2)]
    assert by_seed[0] == by_seed[1] != by_seed[2]
    assert metrics["sweep/half_adaptation_difference/dpo"] == pytest.approx(sum(by_seed) / 3, abs=1e-9)
    kept = [half_rows([row], False)[0].row.metrics["retention/mean"] for row in confirming[:1]]
    assert metrics["sweep/half_retention_difference/dpo"] == pytest.approx((1 - kept[0]) / 3, abs=1e-9)
    assert before["sweep/half_retention_difference/dpo"] == 0
    sentence = " Settings were chosen with seed 0 and 1; the chosen ones were trained again with seed 2."
    assert sentence in text
    assert sentence not in alone
