"""A comparison in which not every method has every domain or seed: like is compared with like, and the rest is told."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from qadapter.report.figures import retention_against_adaptation
from qadapter.report.intervals import Measured
from qadapter.report.rows import Row, comparable_domains, spread
from qadapter.report.summary import adherence_gained, coverage_sentences, duel, points, sentences, summary_metrics
from qadapter.report.tables import (
    COLUMNS,
    comparison,
    cost_table,
    drift_table,
    forgetting_table,
    further_table,
    main_table,
)
from tests.support.report_files import pair_row, rule_row


def row(domain: str, method: str, seed: int | None, score: float, kept: float, **more: float) -> Row:
    metrics = {"adaptation/score": score, "retention/mean": kept, "retention/facts/acc": kept}
    return Row(domain, method, seed, metrics | {name.replace("__", "/"): value for name, value in more.items()})


@pytest.fixture
def apart() -> list[Row]:
    """The Q-Adapter on an easy domain, SFT and DPO on a hard one; the base on both."""
    return [
        row("easy", "base", None, 0.5, 1.0),
        row("easy", "q-adapter", 0, 0.9, 0.88, cost__train_seconds=8.5, adaptation__win_rate=0.9),
        row("hard", "base", None, 0.1, 0.4),
        row("hard", "sft", 0, 0.6, 0.36, cost__train_seconds=4.0, adaptation__win_rate=0.6),
        row("hard", "dpo", 0, 0.5, 0.38, cost__train_seconds=6.0, adaptation__win_rate=0.7),
    ]


@pytest.fixture
def overlapping(apart: list[Row]) -> list[Row]:
    """The Q-Adapter on the hard domain too, where it is behind both."""
    return [*apart, row("hard", "q-adapter", 0, 0.4, 0.3, cost__train_seconds=10.0, adaptation__win_rate=0.5)]


# ---- means


def test_a_mean_wants_every_domain_of_the_comparison(apart: list[Row], overlapping: list[Row]) -> None:
    """The Q-Adapter's over both: (.9 + .4)/2 and (.88 + .3)/2. SFT has no row in `easy`, so it has no mean."""
    assert [spread(apart, "retention/mean", None, m).text() for m in ("base", "q-adapter", "sft")] == [
        "0.700",
        "–",
        "–",
    ]
    assert spread(overlapping, "adaptation/score", None, "q-adapter").mean == pytest.approx(0.65)
    assert spread(overlapping, "retention/mean", None, "q-adapter").mean == pytest.approx(0.59)
    assert spread(overlapping, "retention/mean", None, "sft").n == 0


def test_a_seed_that_lacks_a_domain_is_not_in_the_mean() -> None:
    """Seed 1 is in `a` alone, where it is good: the mean is seed 0's, (.2 + .4)/2, not with .9 beside it."""
    rows = [row("a", "sft", 0, 0.2, 0.5), row("a", "sft", 1, 0.9, 0.9), row("b", "sft", 0, 0.4, 0.7)]
    found = spread(rows, "adaptation/score", None, "sft")
    assert (found.mean, found.n) == (pytest.approx(0.3), 1)
    assert spread(rows, "adaptation/score", "a", "sft").n == 2
    assert coverage_sentences(Measured(rows)) == [
        "Not every seed was measured in every domain: sft lacks seed 1 in b. A mean over domains is of the seeds that "
        "have them all."
    ]
    split = [rows[0], row("b", "sft", 1, 0.4, 0.7)]
    assert spread(split, "adaptation/score", None, "sft").n == 0


def test_intervals_are_of_the_seeds_of_their_numbers(tmp_path: Path) -> None:
    """DPO's seed 1 lacks `b`: over both domains the interval is seed 0's gain, (½ + 0)/2, in `a` it is of two seeds."""
    rows = [pair_row(tmp_path, domain, "base", None, [0.0] * 4, 0.9) for domain in "ab"]
    rows += [
        pair_row(tmp_path, "a", "dpo", 0, [1.0, 1.0, 1.0, 1.0], 0.9),
        pair_row(tmp_path, "a", "dpo", 1, [1.0, 1.0, -1.0, -1.0], 0.9),
        pair_row(tmp_path, "b", "dpo", 0, [1.0, 1.0, -1.0, -1.0], 0.9),
    ]
    measured = Measured(rows)
    assert (measured.seeds("dpo"), measured.seeds("dpo", ["a", "b"])) == ([0, 1], [0])
    both, in_a = measured.score("dpo", None), measured.score("dpo", "a")
    assert both is not None
    assert (both.estimate, both.seeds) == (0.75, 1)
    assert in_a is not None
    assert (in_a.estimate, in_a.seeds) == (0.75, 2)
    gained, interval = adherence_gained(measured, "dpo")
    assert interval is not None
    assert (gained, interval.estimate) == (0.25, 0.25)


def test_a_missing_row_counts_as_missing_in_the_other_measures(apart: list[Row], overlapping: list[Row]) -> None:
    """No two methods share a domain: each stands alone. With the Q-Adapter on both: `hard`, where all three are."""
    assert comparable_domains(apart, "cost/train_seconds") == [["easy"], ["hard"]]
    assert comparable_domains(overlapping, "cost/train_seconds") == [["hard"]]
    assert comparable_domains(overlapping, "cost/unknown") == []
    costs = {label: [cell.text for cell in cells] for label, cells in cost_table(Measured(apart)).rows}
    # Whole seconds of a group have no digits behind the point.
    assert costs == {
        "training, s (easy only)": ["–", "8.5", "–", "–"],
        "training, s (hard only)": ["–", "–", "4", "6"],
    }
    further = {label: [cell.text for cell in cells] for label, cells in further_table(Measured(overlapping)).rows}
    assert further == {"win rate of answers against the base ↑ (hard only)": ["–", "0.500", "0.600", "0.700"]}


# ---- tables


def test_who_lacks_a_domain_has_no_mean_in_the_tables(apart: list[Row]) -> None:
    measured = Measured(apart)
    table = main_table(measured)
    assert table.columns == ("easy", "hard", "mean", "facts", "mean", "win rate (easy)", "win rate (hard)")
    assert {method: [cell.text for cell in cells] for method, cells in table.rows} == {
        "base": ["0.500", "0.100", "0.300", "0.700", "0.700", "–", "–"],
        "q-adapter": ["0.900", "–", "–", "–", "–", "0.900", "–"],
        "sft": ["–", "0.600", "–", "–", "–", "–", "0.600"],
        "dpo": ["–", "0.500", "–", "–", "–", "–", "0.700"],
    }
    assert [(m, i) for m, cells in table.rows for i, cell in enumerate(cells) if cell.best] == [("sft", 1), ("dpo", 6)]
    assert {c.text for _, cells in forgetting_table(measured).rows for c in cells} == {"–"}
    long = comparison(apart)
    means = long[long["domain"] == "MEAN"].set_index("method")
    assert means.loc["base", ["adaptation", "retention"]].tolist() == ["0.300", "0.700"]
    assert set(means.loc[["q-adapter", "sft", "dpo"], list(COLUMNS)].to_numpy().ravel()) == {"–"}


# ---- sentences, single figures and the picture


def test_no_false_claim_about_means_of_different_domains(apart: list[Row]) -> None:
    """By plain means the Q-Adapter would keep 0.88 of 0.7, 125.7 %, and be ahead of all in both."""
    measured = Measured(apart)
    text = sentences(measured)
    assert text[:2] == [
        "Not every method was measured in every domain: q-adapter lacks hard; sft and dpo lack easy. A method that "
        "lacks one has no mean over domains and no place among the means, in the ranking or on the front; two methods "
        "are compared over the domains that both have.",
        "q-adapter, in easy only, keeps 88.0 % of the base's retention (0.880 of 1.000), reaches an adaptation score "
        "of 0.900, +0.400 against the base and wins 90 % of its answers against the base's (a tie is half a win).",
    ]
    whole = " ".join(text)
    assert "125.7" not in whole
    assert "best first" not in whole
    assert "front (" not in whole
    assert points(apart, None) == {"base": (pytest.approx(0.3), pytest.approx(0.7))}
    assert summary_metrics(measured) == {
        "mean/adaptation/score/base": pytest.approx(0.3),
        "mean/retention/mean/base": pytest.approx(0.7),
        "summary/adherence_gained/q-adapter": pytest.approx(0.4),
        "summary/adherence_gained/sft": pytest.approx(0.5),
        "summary/adherence_gained/dpo": pytest.approx(0.4),
    }


def test_what_is_shared_is_compared_and_named(overlapping: list[Row]) -> None:
    """In `hard` the Q-Adapter learnt .2 less than SFT and kept .06 less; over both it keeps (.88 + .3) of (1 + .4)."""
    measured = Measured(overlapping)
    text = sentences(measured)
    assert text[0].startswith("Not every method was measured in every domain: sft and dpo lack easy. A method ")
    assert text[1].startswith("q-adapter keeps 84.3 % of the base's retention (0.590 of 0.700), reaches")
    assert text[2].startswith("q-adapter against sft, in hard only: sft learnt 0.200 more")
    assert "degradation avoided -0.060" in text[2]
    found = duel(measured, "q-adapter", "dpo")
    assert found is not None
    assert found.domains == ("hard",)
    assert (found.adaptation, found.avoided) == (pytest.approx(-0.1), pytest.approx(-0.08))
    whole = " ".join(text)
    assert "On the Pareto front (of the means; no other method with every domain has at least as much of" in whole
    assert "best first" not in whole  # one method alone is no ranking


@pytest.mark.slow
def test_the_large_panel_has_who_has_every_domain(apart: list[Row], overlapping: list[Row], tmp_path: Path) -> None:
    figure = retention_against_adaptation(Measured(apart), tmp_path / "figure.png", "T")
    drawn = [
        sorted(float(line.get_xdata()[0]) for line in panel.lines if len(line.get_xdata()) == 1)
        for panel in figure.axes
    ]  # type: ignore[arg-type, index]
    assert drawn == [[pytest.approx(0.3)], [0.5, 0.9], [0.1, 0.5, 0.6]]
    bare = [r for r in apart if r.method != "base"]
    figure = retention_against_adaptation(Measured(bare), tmp_path / "bare.png", "T")
    assert [text.get_text() for text in figure.axes[0].texts] == ["no method has every domain"]
    assert not math.isnan(np.asarray(figure.axes[0].get_xlim()).sum())


def test_a_method_is_against_its_own_base_in_its_own_domains(tmp_path: Path) -> None:
    """Two domains with items; DPO has only `b`: kept there 1 of 2 facts of the base's 2, over all nothing is said."""
    more = {"base_follows": [0, 0], "base_kept": {"facts": [1, 1]}}
    rows = [
        rule_row(tmp_path, d, "base", None, follows=[0, 0], kept={"facts": [1, 1]}, **more)  # type: ignore[arg-type]
        for d in "ab"
    ]
    rows.append(rule_row(tmp_path, "b", "dpo", 0, follows=[1, 0], kept={"facts": [1, 0]}, **more))  # type: ignore[arg-type]
    measured = Measured(rows)
    assert measured.retention("dpo", None) is None
    assert measured.score("dpo", None) is None
    kept = measured.retention("dpo", "b")
    assert kept is not None
    assert kept.estimate == 0.5


def test_drift_is_a_mean_over_the_domains_of_all(tmp_path: Path) -> None:
    """DPO writes 2 words more in `x` and 60 in `y`, SFT 3 in `x` alone: in `x`, where both are, DPO drifts less.

    DPO's seed 1 lacks `y`; of DPO alone, over both domains, the mean is of seed 0: (2 + 60)/2.
    """

    def drifted(domain: str, method: str, seed: int, words: float) -> Row:
        ends = {"drift/words/low": words - 1, "drift/words/high": words + 1}
        return Row(domain, method, seed, {"drift/words": words, **ends, "drift/moved": 1.0})

    dpo = [drifted("x", "dpo", 0, 2.0), drifted("x", "dpo", 1, 8.0), drifted("y", "dpo", 0, 60.0)]
    both = drift_table(Measured([*dpo, drifted("x", "sft", 0, 3.0)]))
    assert both is not None
    shown = {label: [cell.whole for cell in cells] for label, cells in both.rows}
    assert both.columns == ("sft", "dpo")
    assert shown["words per reply (x only)"] == ["+3.000 [1 of 1]", "+5.000 [2 of 2]"]
    assert shown["traits that moved beyond noise (x only)"] == ["1.0 of 1", "1.0 of 1"]
    alone = drift_table(Measured(dpo))
    assert alone is not None
    (of_words,) = dict(alone.rows)["words per reply"]
    assert of_words.whole == "+31.000 [2 of 2]"
    apart = drift_table(Measured([drifted("y", "dpo", 0, 60.0), drifted("x", "sft", 0, 3.0)]))
    assert apart is not None
    shown = {label: [cell.whole for cell in cells] for label, cells in apart.rows}
    assert shown["words per reply (y only)"] == ["–", "+60.000 [1 of 1]"]
    assert shown["words per reply (x only)"] == ["+3.000 [1 of 1]", "–"]


def test_a_win_rate_of_some_domains_names_them() -> None:
    """Judged in `a` alone: .9 there says nothing of `b`."""
    rows = []
    for domain, judged in (("a", {"adaptation/win_rate": 0.9}), ("b", {})):
        rows += [row(domain, "base", None, 0.5, 0.5), Row(domain, "q-adapter", 0, {"adaptation/score": 0.7, **judged})]
    assert any("wins 90 % of its answers in a against the base's" in line for line in sentences(Measured(rows)))
    assert any("wins 90 % of its answers against the base's" in line for line in sentences(Measured(rows[:2])))
