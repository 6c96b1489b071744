"""The sweep's choice on one half of the items and its report on the other, on measurements written by hand."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qadapter.report.rows import Row
from qadapter.report.sweep.halves import _differences, half_rows, halves_section, selects
from qadapter.report.sweep.points import Setting

PROMPTS = [f"prompt {number}" for number in range(12)]  # two pairs each
ITEMS = 20


def lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def measured(
    folder: Path,
    method: str,
    seed: int | None,
    chosen: float,
    other: float,
    kept: float,
    domain: str = "academy",
    count: int = ITEMS,
) -> Row:
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
    scores = [float(number < kept * count) for number in range(count)]
    items = [{"task": "facts", "doc_id": place, "scores": {"acc": score}} for place, score in enumerate(scores)]
    lines(folder / "retention/items.jsonl", items)
    (folder / "retention/directions.json").write_text(json.dumps({"retention/facts/acc": True}))
    won = sum((0.5 if method == "base" else float(pair["chosen_log_prob"] > 0)) for pair in pairs) / len(pairs)
    retention = sum(scores) / count
    metrics = {
        "adaptation/score": won,
        "retention/facts/acc": retention,
        "retention/mean": retention,
        "forgetting/facts/acc": 0.0,
        "forgetting/kl_per_token": 0.0 if method == "base" else 0.01,
    }
    return Row(domain, method, seed, metrics, None, folder / "adaptation", folder / "retention")


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


def test_a_confirming_seed_that_lacks_a_domain_is_not_in_the_mean(tmp_path: Path) -> None:
    """All pairs won in `a`, half of them in `b`: ¾. A further seed in `a` alone would make it (¾ + 1)/2."""
    rows = []
    for domain, share in (("a", 1.0), ("b", 0.5)):
        rows.append(measured(tmp_path / f"base {domain}", "base", None, 0, 0, 1.0, domain))
        rows += [measured(tmp_path / f"{n} {domain}", n, 0, share, share, 1.0, domain) for n in ("dpo a", "q a")]
    confirming = [measured(tmp_path / f"{name} 1", name, 1, 1.0, 1.0, 1.0, "a") for name in ("dpo a", "q a")]
    text, metrics = halves_section(rows, SETTINGS, 2, confirming)
    assert (text, metrics) == halves_section(rows, SETTINGS, 2)
    (line,) = [line for line in text.splitlines() if line.startswith("| dpo ")]
    assert line.split("|")[3].strip() == "0.750"


def test_domains_that_disagree_are_told(tmp_path: Path) -> None:
    """Ahead by all pairs in `a`, behind by all in `b`: the mean is 0, which is in no domain."""
    rows = []
    for domain, q, dpo in (("a", 1.0, 0.0), ("b", 0.0, 1.0)):
        rows.append(measured(tmp_path / f"base {domain}", "base", None, 0, 0, 1.0, domain))
        rows.append(measured(tmp_path / f"q {domain}", "q a", 0, q, q, 1.0, domain))
        rows.append(measured(tmp_path / f"dpo {domain}", "dpo a", 0, dpo, dpo, 1.0, domain))
    text, metrics = halves_section(rows, SETTINGS, 2)
    assert metrics["sweep/half_adaptation_difference/dpo"] == pytest.approx(0, abs=1e-9)
    _, told = text.split("The same by domain and seed")
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in told.splitlines() if line.startswith("|")]
    assert cells[0] == ["domain", "seed", "− dpo"]
    (a, b) = cells[2:]
    assert a[:2] == ["a", "0"]
    assert b[:2] == ["b", "0"]
    assert a[2].startswith(r"+1.000\* [+")
    assert b[2].startswith(r"-1.000\* [-")


def test_one_domain_and_one_seed_are_told_once(tmp_path: Path) -> None:
    rows = [measured(tmp_path / "base", "base", None, 0, 0, 1.0)]
    rows += [measured(tmp_path / name, name, 0, 1.0, 1.0, 1.0) for name in ("q a", "dpo a")]
    text, _ = halves_section(rows, SETTINGS, 1)
    assert "Differences there" in text
    assert "by domain" not in text


def test_domains_share_their_retention_items(tmp_path: Path) -> None:
    """The same answers in four domains are no surer than in one: an item's difference is averaged over them first."""
    shares = {"dpo a": (1.0, 0.5, 0.5), "q a": (1.0, 0.5, 1.0)}
    lost = {}
    for domains in (["a"], ["a", "b", "c", "d"]):
        rows = []
        for domain in domains:
            folder = tmp_path / f"{len(domains)} {domain}"
            rows.append(measured(folder / "base", "base", None, 0, 0, 1.0, domain, 200))
            rows += [measured(folder / name, name, 0, *values, domain, 200) for name, values in shares.items()]
        _, found = _differences(half_rows(rows, False), "q a", "dpo a")
        items = [number for number in range(200) if not selects(("facts", number))]
        assert found.estimate == pytest.approx(sum(number >= 100 for number in items) / len(items))
        lost[len(domains)] = found
    one, four = lost[1], lost[4]
    assert (four.low, four.high) == pytest.approx((one.low, one.high), abs=0.01)
    assert one.high - one.low == pytest.approx(2 * 1.96 * 0.5 / 10, rel=0.1)  # of some 100 items


def test_a_difference_is_that_of_the_numbers_in_the_table(tmp_path: Path) -> None:
    """A prompt of five pairs, all won, beside prompts of one pair, none won: a mean over pairs, as the table's."""
    half = [prompt for prompt in (f"prompt {number}" for number in range(40)) if not selects(prompt)][:8]
    asked = [half[0]] * 5 + half[1:]

    def row(method: str, seed: int | None, won: int) -> Row:
        found = measured(tmp_path / method, method, seed, 0, 0, 1.0)
        assert found.adaptation is not None
        sides = {"rejected_log_prob": 0.0, "base_chosen_log_prob": 0.0, "base_rejected_log_prob": 0.0}
        lines(
            found.adaptation / "pairs.jsonl",
            [
                {"pair": place, "prompt": prompt, "chosen_log_prob": 1.0 if place < won else -1.0, **sides}
                for place, prompt in enumerate(asked)
            ],
        )
        return replace(found, metrics={**found.metrics, "adaptation/score": won / len(asked)})

    halves = half_rows([row("q a", 0, 5), row("dpo a", 0, 0)], False)
    scores = [half.row.metrics["adaptation/score"] for half in halves]
    gain, _ = _differences(halves, "q a", "dpo a")
    assert gain.estimate == pytest.approx(scores[0] - scores[1]) == pytest.approx(5 / 12)
    assert gain.low <= 0  # one prompt of eight differs


def test_two_seeds_are_as_unsure_as_in_a_comparison(tmp_path: Path) -> None:
    """Retention ahead by 0 and by a share s: Student's interval of two seeds is ± 12.7 · s/2 around s/2."""
    rows = [measured(tmp_path / "base", "base", None, 0, 0, 1.0)]
    rows += [measured(tmp_path / f"q {seed}", "q a", seed, 1.0, 0.5, 1.0) for seed in (0, 1)]
    rows += [measured(tmp_path / f"dpo {seed}", "dpo a", seed, 1.0, 0.5, kept) for seed, kept in ((0, 1.0), (1, 0.75))]
    _, keep = _differences(half_rows(rows, False), "q a", "dpo a")
    assert (keep.low, keep.high) == (-1.0, 1.0)
