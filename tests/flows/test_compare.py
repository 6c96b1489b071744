"""`qadapter compare`: the report of recorded runs says what the report of the run itself says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from qadapter.files.artifacts import read_json, write_json_lines
from qadapter.report.intervals import Measured
from qadapter.report.rows import Row
from qadapter.report.summary import duels, sentences, summary_metrics
from tasks.stages.context import Cell
from tasks.sweep import SweptCell
from tasks.tracking.past_runs import find_run, read_runs
from tasks.tracking.tracker import Tracker
from tests.support.commands import subcommand
from tests.support.report_files import prompt, rule_row, toy_rows

main = subcommand("compare")

SUMMARY = '{"read": 9, "used": 8, "quarantined": {"empty reply": 1}, "train_sha256": "ab", "heldout_sha256": "cd"}'


def record(tracker: Tracker, name: str, rows: list[Row], folder: Path, steps: int) -> str:
    """A flow run as the pipeline records it: rows, the base's retention in a run of its own, a data stage."""
    parent = tracker.start_parent("full-paper-repro", name, {"name": "toy", "steps": steps}, {"stage": "parent"})
    for row in rows:
        cell = Cell(row.domain, row.method, row.seed)
        with tracker.child(parent, cell.name, {"base": "helpful"}, cell.tags()) as run:
            tracker.log_metrics(run, row.metrics)
            tracker.log_tags(run, {"digest.adaptation": f"{row.adaptation}", "digest.train": f"{row.training}"})
            assert row.adaptation is not None
            assert row.retention is not None
            tracker.log_folder(run, row.adaptation, "adaptation")
            if row.training is not None:
                tracker.log_folder(run, row.training, "train")
                tracker.log_folder(run, row.retention, "retention")
        if row.method == "base":
            with tracker.child(parent, "retention · helpful base", tags={"stage": "retention"}) as run:
                tracker.log_folder(run, row.retention, "retention")
    folder.mkdir()
    (folder / "summary.json").write_text(SUMMARY)
    with tracker.child(parent, "prepare · academy", tags={"stage": "prepare"}) as run:
        tracker.log_folder(run, folder, "prepare")
    tracker.finish(parent)
    return parent


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def tracker(home: Path) -> Tracker:
    return Tracker(f"sqlite:///{home}/mlflow.db", str(home / "mlruns"))


@pytest.fixture(scope="module")
def rows(home: Path) -> list[Row]:
    return toy_rows(home / "rows")


@pytest.fixture(scope="module")
def first(tracker: Tracker, rows: list[Row], home: Path) -> str:
    return record(tracker, "smoke · lazy-fox", rows, home / "first", steps=1)


@pytest.fixture(scope="module")
def second(tracker: Tracker, rows: list[Row], home: Path) -> str:
    """The same base and Q-Adapter, found in the stage store, and another SFT, which learnt nothing and kept all."""
    kept = {"facts": [1, 1, 1, 1], "sums": [1, 1, 1, 0]}
    more = {"follows": [0, 0, 0, 1], "base_follows": [0, 0, 0, 1], "base_kept": kept}
    other = rule_row(home / "other", "academy", "sft", 0, kept=kept, **more)  # type: ignore[arg-type]
    return record(tracker, "smoke · red-owl", [*rows[:2], other], home / "second", steps=2)


@pytest.fixture(autouse=True)
def _here(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QADAPTER_HOME", str(home))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


@pytest.mark.slow
def test_a_flow_run_gives_the_report_it_had(first: str, rows: list[Row], tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert main(["smoke · lazy-fox", "--output", str(out)]) == 0
    assert read_json(out / "metrics.json") == summary_metrics(Measured(rows))
    details = pd.read_csv(out / "details.csv")
    assert details["adaptation/score"].tolist() == [0.25, 0.75, 0.5]
    text = (out / "report.md").read_text(encoding="utf-8")
    assert "q-adapter against sft: learnt +0.250 [" in text
    assert "degradation avoided +0.625 [" in text  # with an interval: the base's items were found
    assert "| academy | 9 " in " ".join(text.split("  "))
    assert "empty reply" in text
    assert first in text
    assert (out / "report.html").is_file()
    assert (out / "training_curves.png").is_file()


@pytest.mark.slow
def test_answers_to_old_prompts_come_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With them the share that stays identical has an interval."""
    monkeypatch.setenv("QADAPTER_HOME", str(tmp_path))
    rows = []
    for row, replies in zip(toy_rows(tmp_path / "rows"), ("abcd", "abcx", "wxyz"), strict=True):
        answers = [
            {"prompt": prompt(f"old {base}"), "base": base, "reply": reply}
            for base, reply in zip("abcd", replies, strict=True)
        ]
        write_json_lines(row.retention / "old_answers.jsonl", answers)
        same = sum(answer["base"] == answer["reply"] for answer in answers) / 4
        rows.append(replace(row, metrics={**row.metrics, "retention/answers_identical": same}))
    tracker = Tracker(f"sqlite:///{tmp_path}/mlflow.db", str(tmp_path / "mlruns"))
    record(tracker, "smoke · old answers", rows, tmp_path / "summary", steps=1)
    assert main(["smoke · old answers", "--output", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out/report.md").read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines() if "that stay identical" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:2] == ["the base's own answers that stay identical ↑", "1.000"]
    assert [cell.split(" [")[0] for cell in cells[2:]] == ["0.750", "0.000"]
    assert all("[" in cell for cell in cells[2:])


def test_single_runs_bring_their_base(tracker: Tracker, first: str, tmp_path: Path) -> None:
    chosen = find_run(tracker, first)
    ids = {
        run.info.run_name: run.info.run_id
        for run in tracker.call("search_runs", [chosen.info.experiment_id])
        if run.data.tags.get("mlflow.parentRunId") == first
    }
    found = read_runs(tracker, [ids["academy · sft · seed 0"]], tmp_path)
    assert {(row.domain, row.method, row.seed) for row in found.rows} == {
        ("academy", "base", None),
        ("academy", "sft", 0),
    }
    forgotten = Measured(found.rows).forgetting("sft", ["academy"])
    assert forgotten is not None
    assert forgotten.interval.estimate == 0.75


@pytest.mark.slow
def test_two_flow_runs(tracker: Tracker, first: str, second: str, tmp_path: Path) -> None:
    """What both found in the store is one row; what they trained differently is named after its flow run."""
    found = read_runs(tracker, [first, second], tmp_path)
    assert {row.method: row.metrics["adaptation/score"] for row in found.rows} == {
        "base": 0.25,
        "q-adapter": 0.75,
        "sft (lazy-fox)": 0.5,
        "sft (red-owl)": 0.25,
    }
    assert list(found.data) == ["academy"]
    assert found.config == {
        "runs": {f"lazy-fox {first}": {"steps": "1"}, f"red-owl {second}": {"steps": "2"}},
        "shared": {"name": "toy"},
    }
    measured = Measured(found.rows)
    lost = measured.forgetting("sft (red-owl)", ["academy"])
    assert lost is not None
    assert lost.interval.estimate == 0.0


@pytest.mark.slow
def test_other_bases_are_detected(tracker: Tracker, first: str, rows: list[Row], home: Path, tmp_path: Path) -> None:
    other_base = replace(rows[0], adaptation=rows[1].adaptation)
    third = record(tracker, "smoke · odd-cat", [other_base], home / "third", 3)
    found = read_runs(tracker, [first, third], tmp_path)
    assert {row.method for row in found.rows} == {
        "base (lazy-fox)",
        "q-adapter (lazy-fox)",
        "sft (lazy-fox)",
        "base (odd-cat)",
    }


@pytest.mark.parametrize(
    ("betas", "limits", "methods"),
    [
        ((0.1, 0.1), (50, 50), {"base": 1, "dpo": 2}),
        ((0.1, 1.0), (50, 50), {"base": 1, "dpo (a)": 1, "dpo (b)": 1}),
        ((0.1, 0.1), (50, 60), {"base": 1, "dpo (a)": 1, "dpo (b)": 1}),
    ],
)
def test_other_seeds_are_of_one_method_only_with_its_settings(
    betas: tuple[float, float], limits: tuple[int, int], methods: dict[str, int], home: Path, tmp_path: Path
) -> None:
    """Seed 0 of one flow run and seed 1 of another: a mean of both is of one method where both ran it alike."""
    tracker = Tracker(f"sqlite:///{home}/seeds-{betas[1]}-{limits[1]}.db", str(home / "mlruns"))
    parents = []
    for seed, (beta, limit) in enumerate(zip(betas, limits, strict=True)):
        params = {"evaluation": {"retention": {"limit": limit}}, "seeds": [seed]}
        parents.append(tracker.start_parent("full-paper-repro", f"smoke · {'ab'[seed]}", params, {"stage": "parent"}))
        for cell, digest in ((Cell("academy", "base"), "same"), (Cell("academy", "dpo", seed), f"of {seed}")):
            own = {"dpo": {"beta": beta}, "seed": seed} if cell.seed is not None else {}
            with tracker.child(parents[-1], cell.name, own, cell.tags()) as run:
                tracker.log_metrics(run, {"adaptation/score": beta})
                tracker.log_tags(run, {"digest.adaptation": digest})
    found = [row.method for row in read_runs(tracker, parents, tmp_path).rows]
    assert {method: found.count(method) for method in found} == methods


def test_settings_of_a_sweep_are_rows_of_their_own(
    tracker: Tracker, rows: list[Row], home: Path, tmp_path: Path
) -> None:
    """Two betas of one method, with the tags that a sweep writes: both are shown, each under its own name."""
    parent = tracker.start_parent("sweep", "sweep · wise-elk", {}, {"stage": "parent"})
    cells = [
        (SweptCell("academy", "dpo", 0, f"dpo β={beta}", ("dpo",)), {"adaptation/score": beta}) for beta in (0.1, 1.0)
    ]
    cells.append((SweptCell("academy", "q-adapter", 0, "residual β=1", ("beta",)), {"adaptation/score": 0.75}))
    for cell, metrics in cells:
        with tracker.child(parent, cell.name, {"base": "helpful"}, cell.tags()) as run:
            tracker.log_metrics(run, metrics)
    tracker.finish(parent)
    found = read_runs(tracker, [parent], tmp_path)
    assert {row.method: row.metrics["adaptation/score"] for row in found.rows} == {
        "dpo · β=0.1": 0.1,
        "dpo · β=1.0": 1.0,
        "q-adapter · residual β=1": 0.75,
    }
    assert {(d.method, d.baseline) for d in duels(Measured(found.rows))} == {
        ("q-adapter · residual β=1", "dpo · β=0.1"),
        ("q-adapter · residual β=1", "dpo · β=1.0"),
    }


# ---- what cannot be used


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(list(arguments)) == 2
    return capsys.readouterr().err


def test_an_unknown_run(first: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(capsys, "smoke · nobody", "--output", str(tmp_path / "out"))
    assert "no run has the id or name 'smoke · nobody'" in text
    assert f"'smoke · lazy-fox' ({first})" in text
    assert not (tmp_path / "out").exists()
    assert "no run has" in refused(capsys, "both ' and \"", "--output", str(tmp_path / "out"))


def test_a_name_of_several_runs(first: str, second: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = refused(capsys, "academy · q-adapter · seed 0", "--output", str(tmp_path / "out"))
    assert "2 runs are called 'academy · q-adapter · seed 0'; give an id instead: " in text


def test_a_run_without_measurements(
    tracker: Tracker, first: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    empty = tracker.start_parent("full-paper-repro", "smoke · killed", {}, {"stage": "parent"})
    tracker.finish(empty, "KILLED")
    text = refused(capsys, empty, "--output", str(tmp_path / "out"))
    assert "(smoke · killed, KILLED) has no adaptation/score to compare" in text
    stages = tracker.call("search_runs", [tracker.experiment_id("full-paper-repro")], "tags.stage = 'prepare'")
    assert "has no adaptation/score" in refused(capsys, stages[0].info.run_id, "--output", str(tmp_path / "out"))


def test_a_folder_in_use(first: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert "exists and is not an empty folder" in refused(capsys, first, "--output", str(tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_the_current_folder_is_refused(
    first: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "the output '.' is the current folder; name a new one in it" in refused(capsys, first, "--output", ".")


def test_no_runs_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("QADAPTER_HOME", str(tmp_path / "new"))
    assert "there are no runs yet" in refused(capsys, "x", "--output", str(tmp_path / "out"))
    assert list(tmp_path.iterdir()) == []


# ---- runs of different domains


@pytest.fixture(scope="module")
def apart(tracker: Tracker, home: Path) -> list[str]:
    """The Q-Adapter on an easy domain (the base keeps all), SFT and DPO on a hard one (it keeps 2 of 5)."""
    easy = {"base_follows": [0, 0, 1, 1], "base_kept": {"facts": [1] * 25}}
    hard = {"base_follows": [0, 0, 0, 0], "base_kept": {"facts": [1] * 10 + [0] * 15}}

    def row(domain: str, method: str, follows: list[int], kept: int, more: dict[str, Any]) -> Row:
        kept_items = {"facts": [1] * kept + [0] * (25 - kept)}
        seed = None if method == "base" else 0
        return rule_row(home / "apart", domain, method, seed, follows=follows, kept=kept_items, **more)

    of_easy = [row("easy", "base", [0, 0, 1, 1], 25, easy), row("easy", "q-adapter", [1, 1, 1, 0], 22, easy)]
    of_hard = [
        row("hard", "base", [0, 0, 0, 0], 10, hard),
        row("hard", "sft", [1, 1, 0, 0], 9, hard),
        row("hard", "dpo", [1, 0, 0, 0], 8, hard),
    ]
    return [
        record(tracker, "smoke · calm-bee", of_easy, home / "calm", steps=1),
        record(tracker, "smoke · shy-cow", of_hard, home / "shy", steps=1),
    ]


@pytest.mark.slow
def test_runs_of_different_domains_are_not_ranked_by_means(apart: list[str], tmp_path: Path) -> None:
    """22 of 25 of the easy base's retention is 88 %; against the mean of both bases, 0.7, it would be 125.7 %."""
    out = tmp_path / "out"
    assert main([*apart, "--output", str(out)]) == 0
    text = (out / "report.md").read_text(encoding="utf-8")
    summary = [line for line in text.splitlines() if line.startswith("- ")]
    assert summary[0].startswith(
        "- q-adapter, in easy only, keeps 88.0 % of the base's retention (0.880 of 1.000) and reaches an adaptation "
        "score of 0.750, +0.250 ["
    )
    assert summary[1].startswith(
        "- Not every method was measured in every domain: q-adapter lacks hard; sft and dpo lack easy."
    )
    for claim in ("125.7", "best first", "On the Pareto front", "q-adapter against"):
        assert claim not in text
    assert read_json(out / "metrics.json") == {
        "mean/adaptation/score/base": 0.25,
        "mean/retention/mean/base": 0.7,
        "mean/forgetting/mean/base": 0.0,
        "summary/adherence_gained/q-adapter": 0.25,
        "summary/adherence_gained/sft": 0.5,
        "summary/adherence_gained/dpo": 0.25,
    }
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if "|" in line]
    main_rows = {cells[0]: cells[1:] for cells in lines[:6] if len(cells) == 6}
    assert main_rows["method"] == ["easy", "hard", "learnt: mean", "facts", "kept: mean"]
    assert main_rows["q-adapter"][1:] == ["–"] * 4
    assert main_rows["sft"][0] == "–"
    assert main_rows["sft"][1].startswith("**0.500** [")
    assert [cells[0] for cells in lines if "**" in "".join(cells)] == ["sft"]
    long = pd.read_csv(out / "comparison.csv", dtype=str)
    means = long[long["domain"] == "MEAN"].set_index("method")
    assert means["retention"].to_dict() == {"base": "0.700", "q-adapter": "–", "sft": "–", "dpo": "–"}


@pytest.mark.slow
def test_a_shared_domain_is_compared_in_that_domain(
    tracker: Tracker, apart: list[str], home: Path, tmp_path: Path
) -> None:
    """A third run has the Q-Adapter on the hard domain: half is learnt there as by SFT, and 0.04 more is kept."""
    more = {"base_follows": [0, 0, 0, 0], "base_kept": {"facts": [1] * 10 + [0] * 15}}
    base = rule_row(home / "apart", "hard", "base", None, follows=[0] * 4, kept=more["base_kept"], **more)  # type: ignore[arg-type]
    kept = {"facts": [1] * 10 + [0] * 15}
    ours = rule_row(home / "apart", "hard", "q-adapter", 0, follows=[1, 0, 1, 0], kept=kept, **more)  # type: ignore[arg-type]
    third = record(tracker, "smoke · old-ant", [base, ours], home / "old", steps=1)
    measured = Measured(read_runs(tracker, [*apart, third], tmp_path).rows)
    assert summary_metrics(measured)["mean/retention/mean/q-adapter"] == pytest.approx((0.88 + 0.4) / 2)
    text = sentences(measured)
    assert text[0].startswith("Not every method was measured in every domain: sft and dpo lack easy.")
    assert text[1].startswith("q-adapter keeps 91.4 % of the base's retention (0.640 of 0.700)")
    assert text[2].startswith("q-adapter against sft, in hard only: learnt the same, 0.000 [")
    assert "degradation avoided +0.040 [" in text[2]
    assert "On the Pareto front (of the means; no other method with every domain has" in " ".join(text)
