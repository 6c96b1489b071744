"""The report along the dial: table, sentences, metrics, figure and page, from curves made up here."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import numpy as np
import pytest

from qadapter.config.budget import Budget
from qadapter.config.experiment import load_experiment
from qadapter.errors import QAdapterError
from qadapter.evaluation.curve.budget import choose_on
from qadapter.evaluation.curve.parts import selects
from qadapter.evaluation.curve.points import Curve, Measure, Point, write_curves
from qadapter.policy.dial import DialKind
from qadapter.report.budget import (
    MethodCurve,
    ahead_of,
    budget_metrics,
    budget_sentences,
    budget_table,
    curves_of,
    values_table,
)
from qadapter.report.build import build_report
from qadapter.report.cards import write_cards
from qadapter.report.dial_figure import DIAL_FIGURE
from qadapter.report.intervals import Measured
from qadapter.report.own_budget import own_budget_table
from qadapter.report.rows import Row
from qadapter.report.sweep.build import build_sweep_report
from qadapter.report.sweep.points import RULE, Setting

ITEMS, KEPT = 200, 2000
VALUES = (0.0, 0.5, 1.0)


def curve_at(
    learnt: tuple[float, ...],
    kept: tuple[float, ...],
    values: tuple[float, ...] = VALUES,
    kind: DialKind = "q-weight",
    items: int = KEPT,
) -> Curve:
    """Shares that hold in each half of the split, as far as whole items allow."""
    points = []
    for place, value in enumerate(values):
        task = Measure(names("r", items), hits(names("r", items), kept[place]))
        gained = Measure(names("a", ITEMS), hits(names("a", ITEMS), learnt[place]))
        points.append(Point(value, gained, {"retention/facts/em": task}))
    return Curve(kind, tuple(points))


def write_curve(folder: Path, learnt: tuple[float, ...], kept: tuple[float, ...], items: int = KEPT) -> Path:
    folder.mkdir(parents=True)
    write_curves(folder, [curve_at(learnt, kept, items=items)])
    return folder


def names(prefix: str, count: int) -> tuple[str, ...]:
    return tuple(f"{prefix}{i}" for i in range(count))


def hits(items: tuple[str, ...], share: float) -> tuple[float, ...]:
    """The first of each half, as many as the share says."""
    found = np.zeros(len(items))
    for side in (True, False):
        of_side = [i for i, item in enumerate(items) if selects(item) == side]
        found[of_side[: round(share * len(of_side))]] = 1.0
    return tuple(found.tolist())


@pytest.fixture
def rows(tmp_path: Path) -> list[Row]:
    """DPO overshoots: all learnt, nothing lost at .5, nothing learnt at 1. SFT loses 3 % for what it learns."""
    dpo = write_curve(tmp_path / "dpo", (0.0, 1.0, 0.0), (1.0, 1.0, 0.9))
    sft = write_curve(tmp_path / "sft", (0.0, 0.4, 1.0), (1.0, 1.0, 0.97))
    metrics = {"adaptation/score": 0.5, "retention/mean": 0.9, "forgetting/mean": 0.1}
    return [
        Row("academy", "base", None, {**metrics, "forgetting/mean": 0.0}),
        Row("academy", "sft", 0, metrics, curve=sft),
        Row("academy", "dpo", 0, metrics, curve=dpo),
    ]


@pytest.mark.slow
def test_adaptation_at_each_budget(rows: list[Row]) -> None:
    found = {one.method: one for one in curves_of(rows)}
    assert [found["sft"].at(budget).value for budget in (0.005, 0.01, 0.02, 0.05)] == [0.5, 0.5, 0.5, 1.0]
    assert [found["dpo"].at(budget).value for budget in (0.005, 0.05)] == [0.5, 0.5]
    assert found["dpo"].at(0.01).adaptation.estimate == 1.0
    assert found["sft"].at(0.01).adaptation.estimate == pytest.approx(0.4, abs=0.01)
    # SFT: .4 up to a budget of 3 %, then 1: (.4 · .03 + 1 · .02)/.05
    assert found["sft"].area.estimate == pytest.approx(0.64, abs=0.02)
    assert found["dpo"].area.estimate == pytest.approx(1.0)
    table = budget_table(curves_of(rows))
    assert table is not None
    assert [label for label, _ in table.rows] == ["academy · sft", "academy · dpo"]
    assert len(table.rows[0][1]) == len(table.columns) == 13
    assert [cell.text for cell in table.rows[1][1][:3]] == ["1.000", "0.5", "0.000"]


def test_what_it_says_of_equal_budgets(rows: list[Row]) -> None:
    first, second = budget_sentences(curves_of(rows))
    assert first == "academy, at most 1 % forgotten: dpo learns most, adaptation 1.000."
    assert second == (
        "What the dial takes back at no cost in adaptation: academy · dpo (forgotten 0.100 as trained, 0.000 at 0.5; "
        "adaptation 0.000 and 1.000)."
    )


def test_nobody_learns_most_where_each_dial_stands_at_the_base(tmp_path: Path) -> None:
    """Each value above 0 forgets a fifth and more: 1 % leaves the base, of which there is nothing to rank."""
    found = [
        Row("d", name, 0, {}, curve=write_curve(tmp_path / name, (0.5, learnt, learnt), (1.0, 0.8, 0.6)))
        for name, learnt in (("sft", 0.7), ("dpo", 0.9))
    ]
    sentences = budget_sentences(curves_of(found))
    assert "d, at most 1 % forgotten: no method leaves its base." in sentences
    assert not any("most" in line.replace("at most", "") for line in sentences)


def test_values_of_one_seed_alone_are_named(tmp_path: Path) -> None:
    """Seed 0 was measured at .5 and .75, seed 1 at .5 and .25: of five values two cannot be chosen."""
    own = [(0.0, 0.5, 0.75, 1.0), (0.0, 0.25, 0.5, 1.0)]
    curves = tuple(curve_at((0.0, 0.4, 0.6, 1.0), (1.0,) * 4, values) for values in own)
    one = MethodCurve("academy", "dpo", "q-weight", curves, (0, 1))
    assert [line for line in budget_sentences([one]) if "not every seed" in line] == [
        "At equal budgets, values of the dial that not every seed was measured at cannot be chosen: in 1 of 1 curves, "
        "2 of 5 for academy · dpo. `evaluation.curve.values` measures the same for every seed."
    ]
    assert not [
        line for line in budget_sentences([replace(one, curves=curves[:1], seeds=(0,))]) if "not every seed" in line
    ]


def test_methods_are_compared_over_the_seeds_of_both() -> None:
    """At 1 % the Q-Adapter learns .8, .4 and 0 with seeds 0, 1 and 2; DPO .2 and .6 with seeds 1 and 0, or with others.

    Over seeds 0 and 1: .6 less .4 is .2, and where no seed is common the difference of the means, .4 less .4.
    """

    def method(name: str, learnt: dict[int, float]) -> MethodCurve:
        curves = tuple(curve_at((0.0, most, most), (1.0, 1.0, 0.9)) for most in learnt.values())
        return MethodCurve("law", name, "q-weight", curves, tuple(learnt))

    ours = method("q-adapter", {0: 0.8, 1: 0.4, 2: 0.0})
    assert ahead_of([ours], [method("dpo", {1: 0.2, 0: 0.6})], 0.01).estimate == pytest.approx(0.2, abs=0.01)
    assert ahead_of([ours], [method("dpo", {7: 0.2, 8: 0.6})], 0.01).estimate == pytest.approx(0.0, abs=0.01)


@pytest.mark.slow
def test_many_methods_are_listed_by_group(tmp_path: Path) -> None:
    """Eleven methods in two domains and their means: a heading per domain and kind, and every row below one."""
    metrics = {"adaptation/score": 0.5, "retention/mean": 0.9}
    many = ["q-adapter", "sft", "dpo", "replay", "orpo", "kto", "ipo", "rpo", "rloo", "kl-sft", "vas"]
    found = []
    for domain, method in product(("academy", "harmless"), many):
        curve = write_curve(
            tmp_path / domain / method, (0.0, 0.5, 0.2 if method == "ipo" else 1.0), (1.0, 1.0, 1.0), 200
        )
        found.append(Row(domain, method, 0, metrics, curve=curve))
    table = budget_table(curves_of(found))
    assert table is not None
    assert [heading for heading, _ in table.sections][:6] == [
        "academy: Q-Adapter", "academy: baselines", "academy: preference losses", "academy: RL",
        "academy: regularised", "academy: guided",
    ]  # fmt: skip
    assert sum(count for _, count in table.sections) == len(table.rows) == 33
    assert [label for label, _ in table.parts[1][1]] == ["academy · sft", "academy · replay"]
    behind = [line for line in budget_sentences(curves_of(found)) if "surely behind" in line]
    assert behind == [
        f"{domain}, surely behind another method at every budget: ipo." for domain in ("academy", "harmless")
    ]
    (ahead,) = [line for line in budget_sentences(curves_of(found)) if line.startswith("At most")]
    assert re.sub(r"\d\.\d{3}", "x", ahead) == (
        "At most 1 % forgotten, mean over 2 domains: adaptation of q-adapter minus that of ipo +x [x, x]: larger than "
        "the noise; sft, replay, dpo, orpo, kto, rpo, rloo, kl-sft and vas +x: not larger than the noise."
    )
    assert "ipo +0.500 [" in ahead
    assert "vas +0.000:" in ahead


def test_what_the_dial_takes_back_of_many(tmp_path: Path) -> None:
    """Each loses a tenth as trained and nothing at half of its change."""
    many = ["sft", "dpo", "orpo", "kto", "ipo", "rpo", "cpo"]
    metrics = {"adaptation/score": 0.5, "retention/mean": 0.9}
    found = [
        Row("law", method, 0, metrics, curve=write_curve(tmp_path / method, (0.0, 1.0, 1.0), (1.0, 1.0, 0.9), 200))
        for method in many
    ]
    sentence = budget_sentences(curves_of(found))[-1]
    start = "What the dial takes back at no cost in adaptation (forgotten as trained → with it): law: sft 0."
    assert sentence.startswith(start)
    assert re.findall(r"([a-z]+) 0\.(?:09|10)\d → 0\.000", sentence) == many


@pytest.mark.slow
def test_metrics_of_the_run(rows: list[Row]) -> None:
    found = budget_metrics(curves_of(rows))
    assert found["curve/academy/dpo/adaptation_at_1_percent"] == 1.0
    assert found["curve/academy/dpo/adaptation_at_0.5_percent/dial"] == 0.5
    assert found["curve/academy/sft/adaptation_at_5_percent/forgetting"] == pytest.approx(0.03, abs=0.002)
    low, area, high = (found[f"curve/academy/sft/area{end}"] for end in ("/low", "", "/high"))
    assert low <= area <= high


@pytest.mark.slow
def test_the_report_has_the_curves(rows: list[Row], tmp_path: Path) -> None:
    for name, along in (("with", rows), ("without", [Row(r.domain, r.method, r.seed, r.metrics) for r in rows])):
        out = tmp_path / name
        out.mkdir()
        build_report(along, title="t", data={}, config={}, out=out)
    text, page = ((tmp_path / "with" / f"report.{end}").read_text() for end in ("md", "html"))
    assert "## At equal budgets" in text
    assert f"![curves of the dial]({DIAL_FIGURE})" in text
    assert "academy, at most 1 % forgotten: dpo learns most" in text
    assert 'id="budget"' in page
    assert (tmp_path / "with" / DIAL_FIGURE).stat().st_size > 10_000
    metrics = json.loads((tmp_path / "with" / "metrics.json").read_text())
    assert metrics["curve/academy/dpo/adaptation_at_1_percent"] == 1.0
    assert "At equal budgets" not in (tmp_path / "without" / "report.md").read_text()
    assert 'id="budget"' not in (tmp_path / "without" / "report.html").read_text()
    assert not (tmp_path / "without" / DIAL_FIGURE).exists()


@pytest.fixture
def both(tmp_path: Path) -> list[Row]:
    """Two domains, two methods, both dials up to 1.5. The seed's curve is the same in both domains but for academy's
    q-adapter, which learns half of what it learns on law."""
    values, rows = (0.0, 0.5, 1.0, 1.5), []
    metrics = {"adaptation/score": 0.5, "retention/mean": 0.9, "forgetting/mean": 0.1}
    for domain, most in (("law", 0.8), ("academy", 0.4)):
        rows.append(Row(domain, "base", None, {**metrics, "forgetting/mean": 0.0}))
        for method, learnt, kept in (
            ("q-adapter", (0.0, most, most, most), (1.0, 1.0, 1.0, 0.9)),
            ("dpo", (0.0, 1.0, 0.5, 0.0), (1.0, 1.0, 0.9, 0.8)),
        ):
            folder = tmp_path / domain / method
            folder.mkdir(parents=True)
            weighted = curve_at(learnt, kept, values)
            scaled = curve_at((learnt[0], learnt[1] / 2, *learnt[2:]), kept, values, "scale")
            write_curves(folder, [weighted, scaled])
            rows.append(Row(domain, method, 0, metrics, curve=folder))
    return rows


@pytest.mark.slow
def test_both_dials_side_by_side(both: list[Row], tmp_path: Path) -> None:
    curves = curves_of(both)
    assert [(one.domain, one.method, one.kind) for one in curves[:3]] == [
        ("law", "q-adapter", "q-weight"),
        ("law", "q-adapter", "scale"),
        ("law", "dpo", "q-weight"),
    ]
    assert all(Curve.from_json(one.to_json()) == one for own in curves for one in own.curves)
    table = values_table(curves)
    assert table is not None
    assert table.groups == (("", 2), ("q-weight", 2), ("scale", 2))
    assert table.columns == ("base", "as trained", "0.5", "1.5", "0.5", "1.5")
    assert [label for label, _ in table.rows] == [
        *(f"{domain} · {method}" for domain in ("law", "academy", "mean") for method in ("q-adapter", "dpo"))
    ]
    shown = {label: [cell.text for cell in cells] for label, cells in table.rows}
    assert shown["law · dpo"] == [
        *("0.000 / 1.000", "0.500 / 0.900", "1.000 / 1.000", "0.000 / 0.800", "0.500 / 1.000", "0.000 / 0.800")
    ]
    assert shown["mean · q-adapter"][1] == "0.600 / 1.000"  # (.8 + .4)/2
    budgets = budget_table(curves)
    assert budgets is not None
    assert [label for label, _ in budgets.rows][-4:] == [
        *(f"mean · {method} · {kind}" for kind in ("q-weight", "scale") for method in ("q-adapter", "dpo"))
    ]
    learnt, dial, lost = (cell.text for cell in dict(budgets.rows)["mean · q-adapter · q-weight"][:3])
    assert float(learnt) == pytest.approx(0.6, abs=0.005)  # of whole items in a half
    assert (dial, lost) == ("0.50", "0.000")
    metrics = budget_metrics(curves)
    assert metrics["curve/law/dpo/scale/adaptation_at_1_percent"] == 0.5
    assert metrics["curve/law/dpo/adaptation_at_1_percent"] == 1.0
    assert metrics["curve/mean/q-adapter/adaptation_at_1_percent"] == pytest.approx(0.6, abs=0.005)
    assert metrics["curve/mean/dpo/scale/area"] == pytest.approx(0.5)  # half is reached with nothing forgotten
    build_report(both, title="t", data={}, config={}, out=tmp_path)
    text, page = ((tmp_path / f"report.{end}").read_text() for end in ("md", "html"))
    assert "### At each value of the dial" in text
    assert "0.500 / 0.900" in text
    assert "0.500 / 0.900" in page


@pytest.mark.slow
def test_how_far_ahead_at_equal_budgets(both: list[Row]) -> None:
    """On law 1 − .8, on academy 1 − .4: DPO at .5 is ahead by .4 in the mean; as trained it would be behind."""
    sentences = budget_sentences(curves_of(both))
    start = "At most 1 % forgotten, mean over 2 domains (dial q-weight): adaptation of q-adapter minus that of dpo "
    assert sentences[0].startswith(start)
    assert float(sentences[0].removeprefix(start).split()[0]) == pytest.approx(-0.4, abs=0.005)
    assert sentences[0].endswith(", larger than the noise.")
    assert sentences[1].startswith("law, at most 1 % forgotten (dial q-weight): dpo learns most, adaptation 1.000")
    assert "At most 1 % forgotten, mean over 2 domains (dial scale)" in sentences[3]
    assert sentences[4].startswith("What the dial q-weight takes back at no cost in adaptation: law · dpo")


@pytest.mark.slow
def test_a_sweep_compares_methods_at_equal_budgets(tmp_path: Path) -> None:
    """Two settings of each method. At 1 % DPO's best is `high` at .5, though as trained `low` learns most."""
    settings = {
        "sft a": ((0.0, 0.2, 0.4), (1.0, 1.0, 1.0)),
        "sft lr=0.1": ((0.0, 0.3, 1.0), (1.0, 1.0, 0.97)),
        "dpo low": ((0.0, 0.1, 0.9), (1.0, 1.0, 1.0)),
        "dpo high": ((0.0, 1.0, 0.0), (1.0, 1.0, 0.9)),
        "residual": ((0.0, 0.5, 0.5), (1.0, 1.0, 1.0)),
    }
    metrics = {"adaptation/score": 0.5, "retention/mean": 0.9, "forgetting/mean": 0.0, RULE: 0.5}
    rows = [Row("academy", "base", None, metrics)]
    described = []
    for name, (learnt, kept) in settings.items():
        rows.append(Row("academy", name, 0, metrics, curve=write_curve(tmp_path / name, learnt, kept)))
        method = "q-adapter" if name == "residual" else name.split()[0]
        described.append(Setting(name, name.split()[0], method, (method,), True, {}, name))
    out = tmp_path / "sweep"
    out.mkdir()
    build_sweep_report(rows, described, expected=1, title="t", out=out)
    text = (out / "sweep.md").read_text()
    section = text.partition("## The methods at equal forgetting budgets")[2].partition("## Every setting")[0]
    lines = {line.split("|")[1].strip(): line for line in section.splitlines() if line.startswith("|")}
    assert "dpo high, dial 0.5" in lines["dpo"]
    assert "sft a, dial 1" in lines["sft"]  # at .5, 1 and 2 %
    assert "sft lr=0.1, dial 1" in lines["sft"]  # at 5 %
    assert "- q-adapter − dpo: at 0.5 % -0.5" in section
    assert "larger than the noise" in section
    found = json.loads((out / "metrics.json").read_text())
    assert found["sweep/equal/dpo/adaptation_at_1_percent"] == 1.0
    assert found["sweep/equal/sft/adaptation_at_1_percent"] == pytest.approx(0.4, abs=0.01)
    assert found["sweep/equal/sft/adaptation_at_5_percent"] == 1.0
    assert found["curve/academy/sft lr=0.1/adaptation_at_5_percent"] == 1.0
    assert found["sweep/equal/difference_at_1_percent/dpo"] == pytest.approx(-0.5, abs=0.01)


def test_who_is_not_compared_is_not_chosen_at_equal_budgets(tmp_path: Path) -> None:
    """SFT's `b` does not speak, `c` lacks a training and `d` a curve: `a` is chosen, though it learns least."""
    settings = {"sft a": 0.2, "sft b": 1.0, "sft c": 1.0, "sft d": 1.0, "residual": 0.5}
    metrics = {"adaptation/score": 0.5, "retention/mean": 0.9, "forgetting/mean": 0.0, RULE: 0.5}
    rows = [Row("academy", "base", None, metrics)]
    described = []
    for name, learnt in settings.items():
        curve = write_curve(tmp_path / name, (0.0, learnt, learnt), (1.0, 1.0, 1.0), items=400)
        own = [Row("academy", name, seed, metrics, curve=curve) for seed in (0, 1)]
        if name == "sft b":
            own = [replace(row, metrics={**metrics, "adaptation/speaks": 0.0}) for row in own]
        if name == "sft d":
            own[1] = replace(own[1], curve=None)
        rows += own[:1] if name == "sft c" else own
        method = "q-adapter" if name == "residual" else "sft"
        described.append(Setting(name, method, method, (method,), True, {}, name))
    (tmp_path / "sweep").mkdir()
    build_sweep_report(rows, described, expected=2, title="t", out=tmp_path / "sweep")
    text = (tmp_path / "sweep" / "sweep.md").read_text()
    section = text.partition("## The methods at equal forgetting budgets")[2]
    compared, _, listing = section.partition("## Every setting")
    assert "sft a, dial 0.5" in compared
    assert not any(name in compared for name in ("sft b", "sft c", "sft d"))
    assert "- academy, at most 1 % forgotten: residual learns most, adaptation 0.5" in listing
    assert all(f"| academy · {name} " in listing for name in settings), "each is listed"
    found = json.loads((tmp_path / "sweep" / "metrics.json").read_text())
    assert found["sweep/equal/sft/adaptation_at_1_percent"] == pytest.approx(0.2, abs=0.01)


def test_a_silent_method_is_not_ranked_at_equal_budgets(rows: list[Row], tmp_path: Path) -> None:
    """DPO learns most there, and it does not speak."""
    rows = [replace(r, metrics={**r.metrics, "adaptation/speaks": float(r.method != "dpo")}) for r in rows]
    build_report(rows, title="t", data={}, config={}, out=tmp_path)
    top = (tmp_path / "report.md").read_text().partition("## Main table")[0]
    assert "dpo does not speak" in top
    assert "academy, at most 1 % forgotten: sft learns most, adaptation 0.4" in top
    assert "What the dial takes back" not in top


def test_a_dial_that_forgets_more_takes_nothing_back(tmp_path: Path) -> None:
    """At .5 nothing is lost where the dial is chosen and 5 % where it is reported; as trained 10 and 3 %."""

    def halves(prefix: str, count: int, chosen: float, other: float) -> Measure:
        items = names(prefix, count)
        mixed = zip(items, hits(items, chosen), hits(items, other), strict=True)
        return Measure(items, tuple(one if selects(item) else two for item, one, two in mixed))

    shares = ((0.0, 0.0, 1.0, 1.0), (0.5, 0.9, 1.0, 0.95), (1.0, 0.5, 0.9, 0.97))
    for name, kept in (("more", 0.95), ("none", 1.0)):
        points = [
            Point(value, halves("a", ITEMS, learnt, learnt), {"retention/facts/em": halves("r", KEPT, one, two)})
            for value, learnt, one, two in (shares[0], (0.5, 0.9, 1.0, kept), shares[2])
        ]
        (tmp_path / name).mkdir()
        write_curves(tmp_path / name, [Curve("q-weight", tuple(points))])
        found = budget_sentences(curves_of([Row("d", "sft", 0, {}, curve=tmp_path / name)]))
        assert found[0].startswith("d, at most 1 % forgotten: sft learns most, adaptation 0.9")
        assert any("takes back" in line for line in found) == (name == "none")


def test_a_limit_per_task_is_kept_to_task_by_task(tmp_path: Path) -> None:
    """Where it is reported one task loses 5 % and the other gains them: the mean loses nothing, a task too much."""
    points = []
    for value, first, second in ((0.0, 0.9, 0.9), (1.0, 0.85, 0.95)):
        kept = {}
        for name, other in (("first", first), ("second", second)):
            items = names(name, KEPT)
            mixed = zip(items, hits(items, 0.9), hits(items, other), strict=True)
            kept[f"retention/{name}/em"] = Measure(items, tuple(a if selects(i) else b for i, a, b in mixed))
        points.append(Point(value, Measure(names("a", ITEMS), hits(names("a", ITEMS), value)), kept))
    write_curves(tmp_path, [Curve("q-weight", tuple(points))])
    (one,) = curves_of([Row("d", "sft", 0, {}, curve=tmp_path)])
    shown = []
    for budget in (Budget(max_forgetting=0.02), Budget(max_forgetting=0.02, per_task=0.02)):
        table = own_budget_table([one], budget)
        assert table is not None
        shown.append([cell.text for cell in table.rows[0][1]][1:])
    assert shown[0] == ["1", "0.000", "surely"]
    assert shown[1][:2] == ["1", "0.000"]
    assert float(re.fullmatch(r"perhaps: (0\.\d+) beyond", shown[1][2])[1]) > 0.03 - 0.001  # type: ignore[index]
    text = choose_on(*one.parts, Budget(max_forgetting=0.02, per_task=0.02)).sentence()
    assert "Not surely within the budget of 0.02, 0.02 per task: the interval reaches 0.0" in text


def test_a_card_says_which_way_a_loss_is_counted(tmp_path: Path) -> None:
    """1.2 bits per byte after 1: .2 forgotten is the policy minus the base. Of an accuracy it is the base minus it."""
    (tmp_path / "directions.json").write_text(json.dumps({"retention/text/bits_per_byte": False}))
    before = {"adaptation/score": 0.5, "retention/text/bits_per_byte": 1.0, "retention/facts/acc": 0.9}
    after = {**before, "retention/text/bits_per_byte": 1.2, "retention/facts/acc": 0.8}
    lost = {"forgetting/text/bits_per_byte": 0.2, "forgetting/facts/acc": 0.1}
    none = dict.fromkeys(lost, 0.0)
    rows = [
        Row("d", "base", None, before | none, retention=tmp_path),
        Row("d", "sft", 0, after | lost, retention=tmp_path),
    ]
    write_cards(Measured(rows), {}, {}, tmp_path)
    card = (tmp_path / "cards/d/sft/README.md").read_text()
    assert "| text, policy minus base | 0.2 |" in card
    assert "| facts, base minus policy | 0.1 |" in card


@pytest.mark.slow
def test_the_profiles_own_budget(rows: list[Row], tmp_path: Path) -> None:
    budget = {"max_forgetting": 0.05, "per_task": 0.01}
    evaluation = {"budget": budget, "retention": {"tasks": ["toy_howtos"]}}
    build_report(rows, title="t", data={}, config={"evaluation": evaluation}, out=tmp_path)
    text, page = ((tmp_path / f"report.{end}").read_text() for end in ("md", "html"))
    section = text.partition("### Under the profile's budget")[2].partition("###")[0]
    (line,) = [line.split("|") for line in section.splitlines() if "academy · sft" in line]
    assert float(line[2].split()[0]) == pytest.approx(0.4, abs=0.01)
    assert line[3].strip() == "0.5", "a task may lose 1 %, so not 1"
    assert line[5].strip() == "surely"
    assert "budget 5 %, 1 % per task" in page
    nowhere = Budget(max_forgetting=0.0)
    lost = write_curve(tmp_path / "lost", (0.0, 1.0, 1.0), (1.0, 0.9, 0.8))
    table = own_budget_table(curves_of([Row("d", "sft", 0, {}, curve=lost)]), nowhere)
    assert table is not None
    found = [cell.text for cell in table.rows[0][1]]
    assert found[1:3] == ["0", "0.000"]
    assert found[3].startswith("no: 0.5 exceeds it by 0.")
    assert float(found[3].split()[-1]) == pytest.approx(0.1, abs=0.002)
    with pytest.raises(QAdapterError, match=r"evaluation.*budget needs points of the dial"):
        load_experiment("smoke", {"evaluation.budget.max_forgetting": 0.01})


def test_curves_with_too_few_items_are_left_out(tmp_path: Path) -> None:
    few = Point(0.0, Measure(("a",), (0.0,)), {"retention/x/em": Measure(("b",), (1.0,))})
    write_curves(tmp_path, [Curve("q-weight", (few, Point(1.0, few.learnt, few.kept)))])
    assert curves_of([Row("d", "sft", 0, {}, curve=tmp_path)]) == []
    assert budget_table([]) is None


@pytest.mark.slow
def test_a_model_card_for_each_method(rows: list[Row], tmp_path: Path) -> None:
    summary = {"train_sha256": "ab" * 32, "heldout_sha256": "cd" * 32}
    config = {
        "domains": {"academy": {"source": "academy", "base": "helpful"}},
        "model": {"pretrained": "owner/model"},
        "training": {"learning_rate": 3e-4},
        "methods": {"sft": {"learning_rate": None}, "dpo": {"beta": 0.1}},
    }
    build_report(rows, title="t", data={"academy": summary}, config=config, out=tmp_path)
    assert sorted(p.parent.name for p in (tmp_path / "cards" / "academy").rglob("README.md")) == ["dpo", "sft"]
    card = (tmp_path / "cards/academy/dpo/README.md").read_text()
    assert "base_model: owner/model (helpful)" in card
    assert "| adaptation score | 0.5 | – | 0.5 |" in card
    assert "| mean, base minus policy | 0.1 |" in card
    assert "| data | academy, train | `abababababababab…` | not stated |" in card
    assert "| dpo.beta | 0.1 |" in card
    assert "| learning_rate | 0.0003 |" in card
