"""The report: arithmetic over seeds and domains by hand, a table that says what was measured and what was not."""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
from matplotlib.container import ErrorbarContainer

from qadapter.files.artifacts import read_json
from qadapter.report.build import build_report
from qadapter.report.figures import retention_against_adaptation, styles_of
from qadapter.report.intervals import Measured
from qadapter.report.rows import Row, Spread, methods_of, ordered, spread
from qadapter.report.summary import first_sentences, sentences, summary_metrics
from qadapter.report.tables import COLUMNS, comparison, cost_table, further_table, main_table, task_details
from tests.support.report_files import toy_rows

DATA = {
    "harmless": {
        "read": 256,
        "used": 250,
        "duplicates": 2,
        "cross_split_prompts": 0,
        "train_pairs": 154,
        "heldout_pairs": 96,
        "quarantined": {"empty reply": 4, "no prompt": 2},
        "train_sha256": "0123456789abcdef" * 4,
        "heldout_sha256": "fedcba9876543210" * 4,
    }
}
CONFIG = {"name": "test", "training": {"max_steps": 3}}


def row(domain: str, method: str, seed: int | None, adaptation: float, retention: float, **more: float) -> Row:
    metrics = {
        "adaptation/score": adaptation,
        "adaptation/implied_reward_accuracy": 0.5,
        "retention/mean": retention,
        "retention/toy_facts/exact_match": retention,
        **{name.replace("__", "/"): value for name, value in more.items()},
    }
    return Row(domain, method, seed, metrics)


@pytest.fixture
def rows() -> list[Row]:
    """Two domains, the base and two methods; SFT with three seeds, the Q-Adapter with one."""
    return [
        row("harmless", "base", None, 0.1, 1.0),
        row("harmless", "sft", 0, 0.8, 0.5, forgetting__mean=0.5, cost__train_seconds=10.04),
        row("harmless", "sft", 1, 0.9, 0.6, forgetting__mean=0.4, cost__train_seconds=11.0),
        row("harmless", "sft", 2, 1.0, 0.7, forgetting__mean=0.3, cost__train_seconds=12.0),
        row("harmless", "q-adapter", 0, 0.75, 0.95, forgetting__mean=0.05, cost__train_tokens_per_second=1234.4),
        row("academy", "base", None, 0.3, 0.8),
        row("academy", "sft", 0, 0.4, 0.1, forgetting__mean=0.7),
        row("academy", "sft", 1, 0.5, 0.2, forgetting__mean=0.6),
        row("academy", "sft", 2, 0.3, 0.3, forgetting__mean=0.5),
        row("academy", "q-adapter", 0, 0.25, 0.85, forgetting__mean=-0.05),
    ]


def cell(table: pd.DataFrame, domain: str, method: str, column: str) -> Any:
    found = table[(table["domain"] == domain) & (table["method"] == method)]
    assert len(found) == 1
    return found.iloc[0][column]


# ---- arithmetic


def test_spread_over_seeds_by_hand() -> None:
    """Mean (.8 + .9 + 1)/3 = .9; deviation √((.01 + 0 + .01)/2) = .1."""
    found = Spread.of([0.8, 0.9, 1.0])
    assert found.mean == pytest.approx(0.9)
    assert found.deviation == pytest.approx(0.1)
    assert found.n == 3
    assert found.text() == "0.900 ± 0.100"
    assert found.text(1) == "0.9 ± 0.1"


def test_one_seed_has_no_deviation() -> None:
    found = Spread.of([0.25])
    assert (found.mean, found.n) == (0.25, 1)
    assert math.isnan(found.deviation)
    assert found.text() == "0.250"


def test_nothing_has_no_sign() -> None:
    assert Spread.of([-1e-9]).text() == "0.000"
    assert Spread.of([-0.001]).text() == "-0.001"


def test_what_was_not_measured_is_a_dash() -> None:
    assert Spread.of([]).text() == Spread.of([math.nan]).text() == "–"
    assert Spread.of([0.5, math.nan]).n == 1


def test_the_mean_over_domains_is_taken_seed_by_seed(rows: list[Row]) -> None:
    """Seeds of SFT over two domains: (.8 + .4)/2 = .6, (.9 + .5)/2 = .7, (1 + .3)/2 = .65.

    Their mean is .65 and their deviation √((.0025 + .0025 + 0)/2) = .05; over all six values it would be .288.
    """
    found = spread(rows, "adaptation/score", None, "sft")
    assert (found.mean, found.deviation, found.n) == (pytest.approx(0.65), pytest.approx(0.05), 3)
    base = spread(rows, "retention/mean", None, "base")
    assert (base.mean, base.n) == (pytest.approx(0.9), 1)


def test_a_mean_over_domains_wants_every_domain(rows: list[Row]) -> None:
    """The training time of seed 0 is known in one domain only: no mean is better than half a one."""
    assert spread(rows, "cost/train_seconds", "harmless", "sft").n == 3
    assert spread(rows, "cost/train_seconds", None, "sft").n == 0


def test_order() -> None:
    assert ordered(["b", "z", "a", "b"], ("a", "b", "c")) == ["a", "b", "z"]
    assert ordered(["b", "a", "b"]) == ["b", "a"]


# ---- table


def test_table(rows: list[Row]) -> None:
    table = comparison(rows)
    assert list(table.columns) == ["domain", "method", *COLUMNS]
    assert list(zip(table["domain"], table["method"], strict=True)) == [
        (domain, method) for domain in ("harmless", "academy", "MEAN") for method in ("base", "q-adapter", "sft")
    ]
    assert cell(table, "harmless", "sft", "adaptation") == "0.900 ± 0.100"
    assert cell(table, "harmless", "sft", "retention") == "0.600 ± 0.100"
    assert cell(table, "harmless", "sft", "forgetting") == "0.400 ± 0.100"
    assert cell(table, "harmless", "q-adapter", "adaptation") == "0.750"
    assert cell(table, "academy", "q-adapter", "forgetting") == "-0.050"
    assert cell(table, "MEAN", "sft", "adaptation") == "0.650 ± 0.050"
    assert cell(table, "MEAN", "q-adapter", "forgetting") == "0.000"
    assert cell(table, "harmless", "sft", "train s") == "11.0 ± 1.0"
    assert cell(table, "harmless", "q-adapter", "tokens/s") == "1234"


def test_missing_measurements_are_dashes(rows: list[Row]) -> None:
    table = comparison(rows)
    assert cell(table, "harmless", "base", "forgetting") == "–"
    assert cell(table, "harmless", "base", "train s") == "–"
    assert cell(table, "academy", "sft", "train s") == "–"
    assert cell(table, "MEAN", "sft", "train s") == "–"
    assert set(table["KL/token"]) == {"–"}


def test_one_domain_needs_no_mean(rows: list[Row]) -> None:
    assert set(comparison([r for r in rows if r.domain == "academy"])["domain"]) == {"academy"}


def test_a_method_that_did_not_run_has_no_row_and_no_mean(rows: list[Row]) -> None:
    some = [r for r in rows if (r.domain, r.method) != ("academy", "sft")]
    table = comparison(some)
    assert not ((table["domain"] == "academy") & (table["method"] == "sft")).any()
    assert cell(table, "MEAN", "sft", "adaptation") == "–"
    assert cell(table, "MEAN", "q-adapter", "adaptation") == "0.500"


def test_details_are_numbers(rows: list[Row]) -> None:
    details = task_details(rows)
    assert len(details) == len(rows)
    assert set(details.columns) == {
        "domain",
        "method",
        "seed",
        "adaptation/score",
        "adaptation/implied_reward_accuracy",
        "retention/mean",
        "retention/toy_facts/exact_match",
        "forgetting/mean",
        "cost/train_seconds",
        "cost/train_tokens_per_second",
    }
    second = details[(details["domain"] == "harmless") & (details["method"] == "sft") & (details["seed"] == 1)]
    assert second["retention/mean"].tolist() == [0.6]
    assert details[details["method"] == "base"]["forgetting/mean"].isna().all()


def test_summary_for_the_parent_run(rows: list[Row]) -> None:
    """Retention over both domains with the seed both have: the Q-Adapter .9, SFT .3: .6 of degradation avoided."""
    assert summary_metrics(Measured(rows)) == {
        "mean/adaptation/score/base": pytest.approx(0.2),
        "mean/adaptation/score/sft": pytest.approx(0.65),
        "mean/adaptation/score/q-adapter": pytest.approx(0.5),
        "mean/retention/mean/base": pytest.approx(0.9),
        "mean/retention/mean/sft": pytest.approx(0.4),
        "mean/retention/mean/q-adapter": pytest.approx(0.9),
        "mean/forgetting/mean/sft": pytest.approx(0.5),
        "mean/forgetting/mean/q-adapter": pytest.approx(0.0),
        "summary/adherence_gained/q-adapter": pytest.approx(0.3),
        "summary/adherence_gained/sft": pytest.approx(0.45),
        "summary/degradation_avoided/q-adapter/against_sft": pytest.approx(0.6),
    }


def test_rankings_are_computed(rows: list[Row]) -> None:
    text = sentences(Measured(rows))
    assert "Learnt most, best first: sft 0.650, q-adapter 0.500." in text
    assert "Kept most, best first: q-adapter 0.900, sft 0.400." in text
    assert sentences(Measured([r for r in rows if r.method == "base"])) == []


def test_what_max_length_cut_is_said_per_domain(rows: list[Row]) -> None:
    assert not [line for line in sentences(Measured(rows)) if "max_length" in line]
    cut = [
        row("harmless", "sft", 0, 0.8, 0.5, train__truncated_prompts=12.0, train__truncated_replies=1.0),
        row("harmless", "dpo", 0, 0.8, 0.5, train__truncated_prompts=12.0, train__truncated_replies=1.0),
        row("academy", "sft", 0, 0.8, 0.5, train__truncated_prompts=0.0, train__truncated_replies=3.0),
    ]
    (said,) = [line for line in sentences(Measured(cut)) if "max_length" in line]
    assert said == (
        "training.max_length cut the beginning of 12 prompts and the end of a reply in 1 pair (harmless); "
        "the end of a reply in 3 pairs (academy)."
    )


def test_answers_without_a_judge_are_said_to_be_unjudged() -> None:
    """Among the first six sentences: a preference between given replies says nothing of the own ones."""

    def said(**metrics: float) -> list[str]:
        rows = [row("harmless", "base", None, 0.5, 0.9), row("harmless", "dpo", 0, 1.0, 0.9, **metrics)]
        first, further = first_sentences(Measured(rows))
        assert not any("not judged" in line for line in further)
        return [line for line in first if "not judged" in line]

    assert said(adaptation__win_rate=0.7, adaptation__speaks=1.0) == []
    assert said(adaptation__exact_rule=0.7, adaptation__speaks=1.0) == []
    (unjudged,) = said(adaptation__speaks=1.0)
    assert unjudged.startswith("Answers not judged: no judge compared the generated answers with the base's, so what ")
    (unknown,) = said()
    assert unknown == (
        "Answers not judged: none are recorded, so it is not known whether the policies answer in language."
    )


def test_a_method_far_from_its_base_is_named(rows: list[Row]) -> None:
    """(.4 + .7) / 2 is .55, above one half; .5 itself is not."""
    far = [row("harmless", "sft", seed, 0.8, 0.5, forgetting__kl_per_token=kl) for seed, kl in enumerate((0.4, 0.7))]
    near = row("harmless", "dpo", 0, 0.8, 0.5, forgetting__kl_per_token=0.5)
    assert [line for line in sentences(Measured([*far, near])) if "far from" in line] == [
        "harmless: sft is far from its base (KL 0.55 per token; trainings that keep the base's abilities lie below "
        "0.2): it may have lost what the base could do."
    ]


def test_rankings_leave_out_what_was_not_measured() -> None:
    bare = [Row("d", "base", None, {}), Row("d", "sft", 0, {"adaptation/score": 0.5}), Row("d", "q-adapter", 0, {})]
    text = " ".join(sentences(Measured(bare)))
    assert "q-adapter was not measured." in text
    assert "nan" not in text
    assert "best first" not in text


def test_main_table_has_the_papers_shape(rows: list[Row]) -> None:
    table = main_table(Measured(rows))
    assert table.columns == ("harmless", "academy", "mean", "toy_facts", "mean")
    assert table.groups == (("Learnt: adaptation score", 3), ("Kept: retention, mean over domains", 2))
    cells = {method: [cell.text for cell in cells] for method, cells in table.rows}
    assert cells == {
        "base": ["0.100", "0.300", "0.200", "0.900", "0.900"],
        "q-adapter": ["0.750", "0.250", "0.500", "0.900", "0.900"],
        "sft": ["0.900 ± 0.100", "0.400 ± 0.100", "0.650 ± 0.050", "0.400 ± 0.100", "0.400 ± 0.100"],
    }
    best = {method: [cell.best for cell in cells] for method, cells in table.rows}
    assert best == {
        "base": [False] * 5,
        "q-adapter": [False, False, False, True, True],
        "sft": [True, True, True, False, False],
    }


def test_ties_are_all_best_and_one_method_alone_is_not() -> None:
    same = [Row("d", m, 0, {"adaptation/score": 0.5, "retention/mean": 0.25}) for m in ("sft", "dpo")]
    assert [cell.best for _, cells in main_table(Measured(same)).rows for cell in cells] == [True] * 4
    assert [cell.best for _, cells in main_table(Measured(same[:1])).rows for cell in cells] == [False] * 2


def test_costs_and_further_measures() -> None:
    more = {"cost/trainable_parameters": 34816.0, "cost/adapter_bytes": 142800.0, "cost/new_one": 1.25}
    rows = [
        Row("d", "base", None, {"cost/decoding_tokens_per_second": 7343.2, "retention/over_refusals": 0.0}),
        Row("d", "dpo", 0, {"cost/train_seconds": 7.99, "adaptation/ties": 12.0, "adaptation/strange": 0.5, **more}),
    ]
    costs = {label: [cell.text for cell in cells] for label, cells in cost_table(Measured(rows)).rows}
    assert costs == {
        "training, s": ["–", "8.0"],
        "trainable parameters": ["–", "34,816"],
        "adapter, bytes": ["–", "142,800"],
        "decoding, tokens/s": ["7,300", "–"],
        "new one": ["–", "1.2"],
    }
    further = {label: [cell.text for cell in cells] for label, cells in further_table(Measured(rows)).rows}
    assert further == {
        "ties, answers": ["–", "12"],
        "harmless requests that are refused ↓": ["0.000", "–"],
        "adaptation/strange": ["–", "0.500"],
    }


def test_what_a_judge_is_worth_has_names_and_counts_are_counts() -> None:
    judge = {
        "judge_accuracy": 0.75,
        "judge_accuracy_low": 0.598,
        "judge_accuracy_high": 0.858,
        "judge_accuracy_n": 40.0,
    }
    metrics = {**judge, "judge_order_agreement": 0.875, "undecided": 3.0}
    rows = [Row("d", "dpo", 0, {f"adaptation/{name}": value for name, value in metrics.items()})]
    assert [(label, cells[0].text) for label, cells in further_table(Measured(rows)).rows] == [
        ("undecided, answers", "3"),
        ("the judge's accuracy on held-out pairs ↑", "0.750"),
        ("the judge's accuracy, low end of its 95 % interval ↑", "0.598"),
        ("the judge's accuracy, high end of its 95 % interval ↑", "0.858"),
        ("held-out pairs the judge was tried on", "40"),
        ("answers the judge decides alike in both orders ↑", "0.875"),
    ]


def test_variants_of_a_method_stand_beside_it_and_look_different() -> None:
    rows = [Row("d", m, 0, {}) for m in ("dpo (b)", "new", "sft", "dpo (a)", "q-adapter", "base")]
    methods = methods_of(rows)
    assert methods == ["base", "q-adapter", "sft", "dpo (b)", "dpo (a)", "new"]
    assert len(set(styles_of(methods).values())) == 6


# ---- files


def test_report_files(rows: list[Row], tmp_path: Path) -> None:
    build_report(rows, title="Test world", data=DATA, config=CONFIG, out=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "report.md",
        "report.html",
        "report.tex",
        "comparison.csv",
        "details.csv",
        "retention_adaptation.png",
        "metrics.json",
        "cards",
    }
    csv = pd.read_csv(tmp_path / "comparison.csv", dtype=str)
    assert csv.equals(comparison(rows).astype(str))
    assert pd.read_csv(tmp_path / "details.csv")["adaptation/score"].tolist() == [
        r.metrics["adaptation/score"] for r in rows
    ]
    assert read_json(tmp_path / "metrics.json") == summary_metrics(Measured(rows))


def markdown_tables(text: str) -> list[list[list[str]]]:
    """The tables of a Markdown text: rows of cells, the line below the heading left out."""
    tables: list[list[list[str]]] = [[]]
    for line in text.splitlines():
        if line.startswith("|"):
            cells = [part.strip() for part in line.strip("|").split("|")]
            if not all(set(part) <= set(":-") for part in cells):
                tables[-1].append(cells)
        elif tables[-1]:
            tables.append([])
    return [table for table in tables if table]


def test_the_report_shows_the_table_as_it_is(rows: list[Row], tmp_path: Path) -> None:
    """Cell by cell: nothing on the way to Markdown rounds `0.900` to `0.9`."""
    build_report(rows, title="Test world", data=DATA, config=CONFIG, out=tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert text.startswith("# Test world\n")
    assert "- Learnt most, best first: sft 0.650, q-adapter 0.500." in text
    assert "](retention_adaptation.png)" in text
    main, table, forgotten, _, costs, data, quarantined = markdown_tables(text)
    assert main[2] == ["q-adapter", "0.750", "0.250", "0.500", "**0.900**", "**0.900**"]
    expected = comparison(rows)
    assert table[0] == list(expected.columns)
    assert table[1:] == expected.astype(str).to_numpy().tolist()
    assert forgotten == [["method", "toy_facts", "mean"], ["q-adapter", "–", "0.000"], ["sft", "–", "0.500"]]
    assert costs == [
        ["measure", "base", "q-adapter", "sft"],
        ["training, s (harmless only)", "–", "–", "11.0 ± 1.0"],
        ["training, tokens/s (harmless only)", "–", "1,234", "–"],
    ]
    assert main[0] == ["method", "harmless", "academy", "learnt: mean", "toy_facts", "kept: mean"]
    head = ["source", "read", "used", "duplicates", "cross_split_prompts", "train_pairs", "heldout_pairs"]
    assert data == [
        [*head, "quarantined", "train sha256", "held-out sha256"],
        ["harmless", "256", "250", "2", "0", "154", "96", "6", "0123456789abcdef", "fedcba9876543210"],
    ]
    assert quarantined[1:] == [["harmless", "empty reply", "4"], ["harmless", "no prompt", "2"]]
    digest = hashlib.sha256(json.dumps(CONFIG, sort_keys=True).encode()).hexdigest()
    assert f"sha256 `{digest}`" in text
    assert "```yaml\nname: test\ntraining:\n  max_steps: 3\n```" in text


def test_one_seeds_report_keeps_its_digits(rows: list[Row], tmp_path: Path) -> None:
    build_report([r for r in rows if r.seed in (None, 0)], title="Test world", data=DATA, config=CONFIG, out=tmp_path)
    table = markdown_tables((tmp_path / "report.md").read_text(encoding="utf-8"))[1]
    assert [cells[2] for cells in table[1:]] == [
        *("0.100", "0.750", "0.800"),
        *("0.300", "0.250", "0.400"),
        *("0.200", "0.500", "0.600"),
    ]


def test_the_report_of_real_data_without_tasks(tmp_path: Path) -> None:
    """Nothing kept was measured: the report says so with dashes and draws an empty figure, it does not fail."""
    bare = [Row("d", "base", None, {"adaptation/score": 0.5}), Row("d", "sft", 0, {"adaptation/score": 0.7})]
    build_report(bare, title="Bare", data=DATA, config=CONFIG, out=tmp_path)
    text = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "nan" not in text.lower()
    table = markdown_tables(text)[1]
    assert table[2][:6] == ["d", "sft", "0.700", "–", "–", "–"]


@pytest.mark.slow
def test_the_figure_can_be_looked_at(rows: list[Row], tmp_path: Path) -> None:
    file = tmp_path / "figure.png"
    figure = retention_against_adaptation(Measured(rows), file, "Test world")
    assert len(figure.axes) == 3
    assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    picture = matplotlib.image.imread(file)
    height, width = picture.shape[:2]
    assert width > height > 300  # three panels in a line
    assert len(np.unique(picture[..., :3].reshape(-1, 3), axis=0)) > 50  # something is drawn on it
    for colour in ("#D55E00", "#0072B2"):  # the Q-Adapter's and SFT's
        wanted = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        assert (np.abs(picture[..., :3] - wanted).max(axis=-1) < 0.02).sum() > 50, colour


def test_the_figure_has_error_bars_and_a_front(tmp_path: Path) -> None:
    """The Q-Adapter and SFT have item scores, so a bar in both directions; the base and the Q-Adapter are the front."""
    figure = retention_against_adaptation(Measured(toy_rows(tmp_path)), tmp_path / "figure.png", "T")
    (panel,) = figure.axes
    bars = [len(container.lines[2]) for container in panel.containers if isinstance(container, ErrorbarContainer)]
    assert bars == [0, 2, 2]
    (front,) = [line for line in panel.lines if line.get_linestyle() == "--"]
    left, bottom = panel.get_xlim()[0], panel.get_ylim()[0]
    corners = [[left, 0.875], [0.25, 0.875], [0.25, 0.75], [0.75, 0.75], [0.75, bottom]]
    assert np.asarray(front.get_xydata()).tolist() == corners


@pytest.mark.slow
def test_figures_are_drawn_in_threads(rows: list[Row], tmp_path: Path) -> None:
    """Prefect runs stages in threads; pyplot's global state would be shared among them."""
    from concurrent.futures import ThreadPoolExecutor

    files = [tmp_path / f"{i}.png" for i in range(4)]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda file: retention_against_adaptation(Measured(rows), file, "T"), files))
    assert len({file.read_bytes() for file in files}) == 1
