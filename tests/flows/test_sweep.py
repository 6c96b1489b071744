"""Sweeps: what a file says, which settings follow, the table's arithmetic, a small one through Prefect and MLflow."""

from __future__ import annotations

import csv
import json
import logging
from collections import Counter
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from itertools import combinations
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest
import yaml
from matplotlib.text import Text
from mlflow.entities import Run
from prefect import flow, task
from prefect.artifacts import Artifact
from prefect.settings import PREFECT_API_URL
from trl import DPOTrainer

from flows.full_paper_repro import full_paper_repro
from flows.running.prefect_run import PrefectRun, StagesFailedError, checked_run
from flows.running.sweep_plan import SweepRecorder, plan_text
from flows.sweep import check_sweep, sweep, sweep_stages, swept_domains
from qadapter.config.experiment import load_experiment, profiles
from qadapter.config.sweep import SWEEP_FOLDER, Sweep, estimate_hours, expand, load_sweep, merged_overrides
from qadapter.errors import QAdapterError
from qadapter.judging.endpoint_asking import EndpointJudge
from qadapter.judging.plan import case_of, judge_of
from qadapter.methods.table import METHODS
from qadapter.policy.files import copy_turned, read_settings
from qadapter.report.latex import escape
from qadapter.report.page import data_uri
from qadapter.report.rows import Row
from qadapter.report.sweep.build import build_sweep_report
from qadapter.report.sweep.figure import draw_sweep
from qadapter.report.sweep.points import (
    RULE,
    Point,
    Setting,
    best_by_trade,
    best_that_keeps,
    chosen_on_other_seeds,
    differences,
    front_area,
    front_of,
    learnt,
    points_of,
    trade,
)
from qadapter.report.sweep.sentences import difference_table, edge_sentences, largest_front
from tasks.judge import judge_material
from tasks.stages.context import RunContext
from tasks.stages.store import StageStore
from tasks.tracking.tracker import Tracker
from tasks.train import Base
from tests.processes.test_pipeline import Home, new_stages, small
from tests.support.commands import subcommand
from tests.support.tiny_toy import TinyToy, make_tiny_toy

main = subcommand("sweep")

SECONDS = {"base": 10, "dial": 1, "sft": 2, "replay": 2, "dpo": 3, "q-adapter": 4}
GROUPS: dict[str, Any] = {
    "replay": {"method": "replay", "tuning": True, "combine": {"temperature": [0, 1]}},
    "dpo": {"method": "dpo", "tuning": True, "centre": {"learning_rate": 0.01}, "combine": {"beta": [0.3, 1]}},
    "q-adapter": {
        "method": "q-adapter",
        "tuning": True,
        "centre": {"preset": "residual"},
        "combine": {"preference_scale": [None, 5]},
    },
    "residual": {
        "method": "q-adapter",
        "centre": {"preset": "residual"},
        "one_at_a_time": {"alpha_0": [0.1], "preference_scale": [5]},
        "alpha_0_at_inference": [0.5],
    },
}
TINY = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "layers": 1, "heads": 2}
NAMES = [
    "replay T=0",
    "replay T=1",
    "dpo lr=0.01 β=0.3",
    "dpo lr=0.01 β=1",
    "residual",
    "residual w=5",
    "residual α0=0.1",
    "residual, then α0=0.5",
]


def content(**changes: Any) -> dict[str, Any]:
    """A small sweep, as its file would hold it."""
    start = {"name": "tiny", "profile": "smoke", "seeds": [0, 1], "domains": ["harmless"]}
    return {**start, "settings": {}, "groups": GROUPS, "seconds": SECONDS, **changes}


def write(folder: Path, **changes: Any) -> str:
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(content(**changes), sort_keys=False), encoding="utf-8")
    return str(file)


# ---- what a file says


def test_the_sweeps_of_the_project() -> None:
    assert sorted(file.name for file in SWEEP_FOLDER.iterdir()) == ["mini.yaml", "small.yaml", "smoke.yaml"]
    assert "sweep" not in profiles()
    for name, settings, seeds, hours in (("smoke", 104, 5, 1.45), ("mini", 52, 2, 1.6)):
        loaded = load_sweep(name)
        experiment = load_experiment(name, merged_overrides(loaded, name, {}))
        variants = expand(loaded, experiment)
        assert len(variants) == len({variant.name for variant in variants}) == settings
        assert experiment.seeds == loaded.seeds == tuple(range(seeds))
        efforts = Counter(variant.method for variant in variants if variant.tuning)
        assert set(efforts) == {method.name for method in METHODS if method.by_default}
        assert len(set(efforts.values())) == 1
        rates = {
            method: {v.experiment.methods.of(method).learning_rate for v in variants if v.tuning and v.method == method}
            for method in ("dpo", "q-adapter")
        }
        assert rates["dpo"] == rates["q-adapter"]
        assert {"residual", "paper", "published-code", "published-code-shifted"} <= {v.family for v in variants}
        assert 0.9 < estimate_hours(loaded, variants, experiment) < hours


def test_the_sweep_of_the_pretrained_model() -> None:
    """Four learning rates for each method; β on both sides of the two presets', α0 towards each other's value."""
    loaded = load_sweep("small")
    experiment = load_experiment("small", merged_overrides(loaded, "small", {}))
    assert (list(experiment.domains), experiment.seeds, loaded.confirm_seeds) == (["harmless", "academy"], (0,), (1,))
    variants = expand(loaded, experiment)
    default = experiment.training.learning_rate
    for method in ("q-adapter", "sft", "dpo", "replay"):
        tuned = [v.experiment.methods.of(method) for v in variants if v.tuning and v.method == method]
        assert {choice.learning_rate or default for choice in tuned} == {1e-5, 3e-5, 1e-4, 3e-4}
    for family, alpha_0 in (("paper", {0.01, 0.1}), ("residual", {0.1, 1})):
        own = [v.experiment.methods.q_adapter for v in variants if v.family == family and v.alpha_0 is None]
        preset = 0.01 if family == "paper" else 1.0
        assert {preset if s.alpha_0 is None else s.alpha_0 for s in own} == alpha_0
        assert {0.1 if s.beta is None else s.beta for s in own} == {0, 0.1, 1}


def test_the_toy_worlds_sweep_asks_what_the_issue_asks() -> None:
    loaded = load_sweep("smoke")
    variants = {v.name: v for v in expand(loaded, load_experiment("smoke", merged_overrides(loaded, "smoke", {})))}
    for family in ("residual", "published-code", "published-code-shifted", "paper"):
        own = [v.experiment.methods.q_adapter for v in variants.values() if v.family == family and v.alpha_0 is None]
        preset = 1.0 if family == "residual" else 0.01
        assert {preset if s.alpha_0 is None else s.alpha_0 for s in own} == {0, 0.01, 0.1, 1}
        assert {0.1 if s.beta is None else s.beta for s in own} == {0, 0.01, 0.1, 1}
        assert {1.0 if s.preference_scale is None else s.preference_scale for s in own} == {1, 5, 10}
        finer = {2e-4} if family == "residual" else set()  # of the tuning, whose rates DPO has too
        assert {s.learning_rate or 3e-4 for s in own} == {1e-4, 3e-4, 1e-3} | finer
        dialled = {v.alpha_0 for v in variants.values() if v.family == family and v.alpha_0 is not None}
        assert {preset, *dialled} >= {0, 0.01, 0.1, 1}
    assert {v.experiment.methods.dpo.beta for v in variants.values() if v.method == "dpo"} == {0.1, 1, 5}
    assert variants["residual, then α0=0.5"].trained_as == "residual"
    assert variants["published-code-shifted"].experiment.methods.q_adapter.shift_mask is True
    assert variants["published-code"].experiment.methods.q_adapter.shift_mask is None


def test_settings_that_two_groups_share_are_measured_once(tmp_path: Path) -> None:
    loaded = load_sweep(write(tmp_path))
    variants = expand(loaded, load_experiment("smoke"))
    assert [variant.name for variant in variants] == NAMES
    by_name = {variant.name: variant for variant in variants}
    assert by_name["residual w=5"].groups == ("q-adapter", "residual")
    assert by_name["residual w=5"].tuning
    assert by_name["residual α0=0.1"].groups == ("residual",)
    assert not by_name["residual α0=0.1"].tuning
    assert by_name["residual, then α0=0.5"].alpha_0 == 0.5


def test_names_of_settings_are_ascii_in_latex() -> None:
    loaded = load_sweep("smoke")
    names = [v.name for v in expand(loaded, load_experiment("smoke", merged_overrides(loaded, "smoke", {})))]
    assert any("β" in name for name in names)
    assert any("α" in name for name in names)
    assert all(escape(name).isascii() for name in names)
    assert escape("dpo β=1 lr=0.0001") == r"dpo $\beta$=1 lr=0.0001"
    assert escape("residual, then α0=2") == r"residual, then $\alpha$0=2"


def test_a_setting_equal_to_the_profiles_is_the_profiles(tmp_path: Path) -> None:
    """Then their trainings have one key, and the full experiment's are found."""
    profile = load_experiment("smoke", {"training.learning_rate": 0.01, "methods.dpo.beta": 0.3})
    by_name = {variant.name: variant.experiment for variant in expand(load_sweep(write(tmp_path)), profile)}
    for name in ("dpo lr=0.01 β=0.3", "residual", "replay T=0"):
        assert by_name[name] == profile, name
    assert by_name["dpo lr=0.01 β=1"].methods.dpo.model_dump() == {"beta": 1.0, "learning_rate": None}
    assert by_name["residual w=5"].methods.q_adapter.model_dump(exclude_none=True) == {
        "preset": "residual",
        "preference_scale": 5.0,
    }


def test_unused_sources_are_dropped_unless_the_user_sets_them(tmp_path: Path) -> None:
    loaded = load_sweep(write(tmp_path, settings={"parallel": 2, "threads": 1}))
    merged = merged_overrides(loaded, "smoke", {"seeds": [3], "parallel": 1, "sources.harmless.max_chars": 77})
    experiment = load_experiment("smoke", merged)
    assert set(experiment.sources) == {"helpful", "harmless"}
    assert list(experiment.domains) == ["harmless"]
    assert (experiment.seeds, experiment.parallel, experiment.threads) == ((3,), 1, 1)
    assert experiment.sources["harmless"].max_chars == 77


def test_the_files_settings_reach_domains_and_sources(tmp_path: Path) -> None:
    """Beside those of other sections; the user's come before them."""
    settings = {
        "domains.harmless.base": "pretrained",
        "sources.harmless.max_chars": 77,
        "sources.helpful.max_chars": 88,
    }
    loaded = load_sweep(write(tmp_path, settings=settings))
    experiment = load_experiment("smoke", merged_overrides(loaded, "smoke", {"sources.helpful.max_chars": 99}))
    assert experiment.domains["harmless"].base == "pretrained"
    assert [experiment.sources[name].max_chars for name in ("harmless", "helpful")] == [77, 99]


def group(**changes: Any) -> dict[str, Any]:
    return {"groups": {**GROUPS, "extra": changes}}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"seed": [0]}, ["seed: unknown key, did you mean 'seeds'?"]),
        (group(method="dpo", combin={}), ["groups.extra.combin: unknown key, did you mean 'combine'?"]),
        (
            {"groups": {**GROUPS, "dpo": {"method": "dpo", "tuning": True, "combine": {"beta": [1, 2, 3]}}}},
            ["same number of tuning settings", "dpo 3", "replay 2"],
        ),
        (group(method="dpo", tuning=True), ["both the tuning of dpo"]),
        (group(method="dpo", centre={"alpha_0": 1}), ["centre names ['alpha_0']; dpo has beta, learning_rate"]),
        (group(method="dpo", alpha_0_at_inference=[1]), ["dpo has no α0"]),
        (group(method="sft", combine={"learning_rate": [1, 1]}), ["learning_rate names [1.0] more than once"]),
        ({"seconds": {"base": 1}}, ["seconds", "'dial'"]),
        ({"seeds": []}, ["seeds"]),
        ({"confirm_seeds": [1]}, ["seeds names [1] more than once"]),
        (
            {"confirm_seeds": [2], "groups": {"residual": GROUPS["residual"]}},
            ["confirm_seeds train the chosen setting of each tuned method, and no group has tuning: true"],
        ),
    ],
)
def test_bad_sweeps_are_refused(changes: dict[str, Any], expected: list[str], tmp_path: Path) -> None:
    with pytest.raises(QAdapterError) as error:
        load_sweep(write(tmp_path, **changes))
    for part in expected:
        assert part in str(error.value)


def test_more_that_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QAdapterError, match=r"no sweep 'smok', did you mean 'smoke'"):
        load_sweep("smok")
    with pytest.raises(QAdapterError, match=r"domains \['law'\] are not in the profile 'smoke'; it has harmless"):
        merged_overrides(load_sweep(write(tmp_path, domains=["law"])), "smoke", {})
    with pytest.raises(
        QAdapterError, match=r"methods.run has no effect, because the groups of a sweep name its methods"
    ):
        merged_overrides(load_sweep(write(tmp_path)), "smoke", {"methods.run": ["sft"]})
    negative = load_sweep(write(tmp_path, **group(method="dpo", combine={"beta": [-1]})))
    with pytest.raises(QAdapterError, match=r"groups.extra: beta: Input should be greater than 0 \(given: {'beta'"):
        expand(negative, load_experiment("smoke"))
    twice = load_sweep(
        write(tmp_path, **group(method="dpo", centre={"learning_rate": 1e-3}, combine={"beta": [None, 1]}))
    )
    given = twice.model_copy(update={"groups": {"dpo": twice.groups["extra"].model_copy(update={"tuning": True})}})
    with pytest.raises(
        QAdapterError, match=r"groups.dpo: \{'learning_rate': 0.001, 'beta': 1.0\} is a setting that .*"
    ):
        expand(given, load_experiment("smoke", {"methods.dpo.beta": 1}))
    confirmed = write(tmp_path, confirm_seeds=[2])
    with pytest.raises(QAdapterError, match=r"confirm_seeds .* a toy world's policies are scored by its rule"):
        check_sweep(confirmed, None, None, {})


def test_names_tell_settings_apart_and_have_numbers_as_they_were_understood(tmp_path: Path) -> None:
    rates = ["1e-4", 1.2345671e-3, 1.2345672e-3]
    sweep = load_sweep(write(tmp_path, **group(method="dpo", combine={"learning_rate": rates})))
    names = [variant.name for variant in expand(sweep, load_experiment("smoke")) if variant.groups == ("extra",)]
    assert names == ["dpo lr=0.0001", "dpo lr=0.0012345671", "dpo lr=0.0012345672"]


# ---- α0 at inference


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> TinyToy:
    return make_tiny_toy(tmp_path_factory.mktemp("toy"), steps=3)


@pytest.mark.slow
def test_alpha_0_is_moved_and_nothing_else(toy: TinyToy, tmp_path: Path) -> None:
    import torch

    from qadapter.policy.loading import load_base, load_policy
    from tests.support.tiny_toy import MODEL

    trained = toy.train("q-adapter", tmp_path / "trained") / "adapter"
    copy_turned(trained, tmp_path / "moved", alpha_0=0.25)
    before, after = read_settings(trained), read_settings(tmp_path / "moved")
    assert (before.alpha_0, after.alpha_0) == (1.0, 0.25)
    assert after.objective == before.objective
    weights = "adapter_model.safetensors"
    assert (tmp_path / "moved" / weights).read_bytes() == (trained / weights).read_bytes()

    def scores(adapter: Path) -> torch.Tensor:
        network, _ = load_base(toy.base, MODEL)
        with torch.no_grad():
            return load_policy(network, adapter)(input_ids=torch.arange(5, 11)[None]).logits.log_softmax(-1)

    network, _ = load_base(toy.base, MODEL)
    with torch.no_grad():
        base = network(input_ids=torch.arange(5, 11)[None]).logits.log_softmax(-1)
    # log π̃ = Q + α0 · log π1 up to a constant: moving α0 by −0.75 takes 0.75 · log π1 away.
    expected = (scores(trained) - 0.75 * base).log_softmax(-1)
    torch.testing.assert_close(scores(tmp_path / "moved"), expected, atol=1e-5, rtol=1e-5)


def test_only_q_adapters_have_the_dial(toy: TinyToy, tmp_path: Path) -> None:
    adapter = toy.train("sft", tmp_path / "sft") / "adapter"
    with pytest.raises(QAdapterError, match="is no Q-Adapter"):
        copy_turned(adapter, tmp_path / "moved", alpha_0=0.5)
    assert not (tmp_path / "moved").exists()


# ---- the table's arithmetic


def setting(name: str, method: str = "q-adapter", tuning: bool = True, trained_as: str | None = None) -> Setting:
    return Setting(name, method, method, (method,), tuning, {"beta": 0.1}, trained_as or name)


def measured(base: float = 0.8, **values: list[tuple[float, float]]) -> list[Row]:
    """Name → (adaptation, retention) for each seed, in one domain."""
    rows = [Row("harmless", "base", None, {"adaptation/score": 0.1, RULE: 0.1, "retention/mean": base})]
    for name, seeds in values.items():
        for seed, (score, kept) in enumerate(seeds):
            metrics = {"adaptation/score": score, RULE: score, "retention/mean": kept, "forgetting/kl_per_token": 0.5}
            rows.append(Row("harmless", name, seed, metrics))
    return rows


def points(**values: list[tuple[float, float]]) -> dict[str, Point]:
    rows = measured(**values)
    (seeds,) = {len(v) for v in values.values()}
    return {p.setting.name: p for p in points_of(rows, [setting(name) for name in values], seeds)}


def test_trade_is_the_harmonic_mean() -> None:
    assert trade(0.5, 1.0) == pytest.approx(2 / 3)  # 2 · 0.5 · 1 / 1.5
    assert trade(0.5, 1.4) == pytest.approx(2 / 3)  # keeping more than the base had is no credit
    assert trade(0.0, 0.0) == 0.0


def test_doing_nothing_is_worth_nothing(tmp_path: Path) -> None:
    """An implied-reward accuracy of 0.5 is chance: 2 · 0.5 − 1 = 0. The rule's share of 0.5 is half of all."""
    assert learnt({"adaptation/score": 0.5}) == 0.0
    assert learnt({"adaptation/score": 0.75, "adaptation/implied_reward_accuracy": 0.75}) == 0.5
    assert learnt({"adaptation/score": 0.5, RULE: 0.5}) == 0.5
    idle, worse, busy = ([(score, kept)] for score, kept in ((0.5, 0.8), (0.4, 0.8), (0.75, 0.6)))
    rows = [
        Row(row.domain, row.method, row.seed, {k: v for k, v in row.metrics.items() if k != RULE})
        for row in measured(idle=idle, worse=worse, busy=busy)
    ]
    for row in rows:
        row.metrics["adaptation/win_rate"] = 0.625
    settings = [setting(name) for name in ("idle", "worse", "busy")]
    found = {point.setting.name: point for point in points_of(rows, settings, 1)}
    assert (found["idle"].trade, found["worse"].trade) == (0.0, 0.0)
    assert found["worse"].learnt == pytest.approx(-0.2)
    assert found["busy"].trade == pytest.approx(0.6)  # 2 · 0.5 · 0.75 / 1.25
    assert best_by_trade(list(found.values())).setting.name == "busy"
    assert front_area(list(found.values())) == pytest.approx(0.5 * 0.75)
    build_sweep_report(rows, settings, expected=1, title="Sweep", out=tmp_path)
    lines = (tmp_path / "sweep.md").read_text(encoding="utf-8").splitlines()
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if line.startswith("|")]
    header = next(row for row in table if row[0] == "setting")
    cells = {row[0]: dict(zip(header, row, strict=True)) for row in table if len(row) == len(header)}
    assert [cells["busy"][name] for name in ("adaptation", "learnt", "win rate")] == ["0.750", "0.500", "0.625"]
    assert [cells["base"][name] for name in ("adaptation", "retention", "kept", "trade")] == [
        "0.100",
        "0.800",
        "1.000",
        "",
    ]
    for row in rows:  # a judge that agrees with 11 of 20 may decide by chance
        row.metrics.update({"adaptation/judge_accuracy": 0.55, "adaptation/judge_accuracy_n": 20.0})
    build_sweep_report(rows, settings, expected=1, title="Sweep", out=tmp_path)
    text = (tmp_path / "sweep.md").read_text(encoding="utf-8")
    assert "No win rate for harmless: the judge may decide by chance." in text
    assert "0.625" not in text


def test_a_base_that_had_nothing_can_lose_nothing() -> None:
    (point,) = points_of(measured(base=0.0, a=[(0.5, 0.0)]), [setting("a")], 1)
    assert point.kept == 1.0
    assert point.trade == point.by_seed[0].trade == pytest.approx(2 / 3)


def test_the_time_is_counted_from_the_seconds(tmp_path: Path) -> None:
    """10 + 2 seeds · (2·2 replay + 2·3 dpo + 3·4 q-adapter + 1 dial) = 56 s; two at a time, the 46 go 1.7 × as fast."""
    loaded = load_sweep(write(tmp_path))
    experiment = load_experiment("smoke", merged_overrides(loaded, "smoke", {"parallel": 1}))
    assert estimate_hours(loaded, expand(loaded, experiment), experiment) * 3600 == pytest.approx(56)
    both = experiment.model_copy(update={"parallel": 2})
    assert estimate_hours(loaded, expand(loaded, both), both) * 3600 == pytest.approx(10 + 46 / 1.7)
    confirmed = loaded.model_copy(update={"confirm_seeds": (2, 3)})  # one more of each method, twice: 2 + 3 + 4
    assert estimate_hours(confirmed, expand(confirmed, both), both) * 3600 == pytest.approx(10 + (46 + 18) / 1.7)


def test_points_front_and_area() -> None:
    """Base 0.8: kept is retention / 0.8. Front: c (0.9, 0.4), a (0.6, 0.8); b is beaten by a, d ties a and stays."""
    found = points(
        a=[(0.5, 0.8), (0.7, 0.8)], b=[(0.5, 0.6), (0.5, 0.6)], c=[(0.9, 0.4), (0.9, 0.4)], d=[(0.6, 0.8), (0.6, 0.8)]
    )
    assert found["a"].adaptation.mean == pytest.approx(0.6)
    assert found["a"].adaptation.deviation == pytest.approx(stdev([0.5, 0.7]))
    assert found["b"].kept == pytest.approx(0.75)
    assert found["b"].trade == pytest.approx(0.6)  # 2 · 0.5 · 0.75 / 1.25
    assert [p.setting.name for p in front_of(list(found.values()))] == ["c", "a", "d"]
    # strips: 0.9 wide up to 0.5 kept, then 0.6 wide from 0.5 to 1
    assert front_area([found["a"], found["b"], found["c"]]) == pytest.approx(0.9 * 0.5 + 0.6 * 0.5)


def test_the_two_rules() -> None:
    """c adapts most and keeps 0.95; b keeps 0.98 exactly; a keeps all."""
    found = points(a=[(0.6, 0.8)], b=[(0.8, 0.784)], c=[(0.99, 0.76)])
    assert best_by_trade(list(found.values())).setting.name == "c"
    assert found["c"].trade == pytest.approx(2 * 0.99 * 0.95 / 1.94)
    keeping = best_that_keeps(list(found.values()))
    assert keeping is not None
    assert keeping.setting.name == "b"
    assert best_that_keeps([found["c"]]) is None


def test_choosing_on_other_seeds_does_not_profit_from_chance() -> None:
    """All keep 1. Seed 0 alone favours a, seed 1 alone b: chosen on the other seed, each is wrong."""
    found = points(a=[(1.0, 0.8), (0.2, 0.8)], b=[(0.2, 0.8), (0.9, 0.8)])
    low = trade(0.2, 1.0)
    assert chosen_on_other_seeds(list(found.values())) == pytest.approx({0: low, 1: low})
    assert chosen_on_other_seeds(list(points(a=[(1.0, 0.8)]).values())) == {}


def test_the_report_compares_what_is_complete(tmp_path: Path) -> None:
    rows = measured(q=[(0.9, 0.8), (0.8, 0.8)], s=[(0.5, 0.8), (0.4, 0.8)], lost=[(1.0, 0.8)])
    settings = [setting("q"), setting("s", "sft"), setting("lost", "dpo"), setting("never", "replay")]
    build_sweep_report(rows, settings, expected=2, title="Sweep", out=tmp_path)
    text = (tmp_path / "sweep.md").read_text(encoding="utf-8")
    assert "Not complete, so listed but not compared: lost, never." in text
    assert f"The best trade, {trade(0.85, 1.0):.3f}, is reached by q-adapter." in text
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["sweep/settings"] == 2
    assert metrics["sweep/trade/q-adapter"] == pytest.approx(trade(0.85, 1.0))
    difference = fmean([trade(0.9, 1.0) - trade(0.5, 1.0), trade(0.8, 1.0) - trade(0.4, 1.0)])
    assert metrics["sweep/trade_difference/sft"] == pytest.approx(difference)
    assert "sweep/trade/dpo" not in metrics
    assert f"q-adapter − sft: {difference:+.3f}" in text


def tried(method: str, *settings: tuple[dict[str, float], float]) -> list[Point]:
    """One seed of each setting; all keep everything, so the most adaptation is the best trade."""
    names = [f"{method} {place}" for place in range(len(settings))]
    rows = measured(**{name: [(score, 0.8)] for name, (_, score) in zip(names, settings, strict=True)})
    known = [
        Setting(name, method, method, (method,), True, values, name)
        for name, (values, _) in zip(names, settings, strict=True)
    ]
    return points_of(rows, known, 1)


def grid(method: str, best: tuple[float, float]) -> list[Point]:
    """Learning rates 1e-4, 3e-4, 1e-3 × β 0.1, 1, 5, γ always 1; one of them learns more than the others."""
    knobs = [(rate, beta) for rate in (1e-4, 3e-4, 1e-3) for beta in (0.1, 1, 5)]
    return tried(
        method,
        *(
            ({"learning_rate": rate, "beta": beta, "gamma": 1.0}, 0.9 if (rate, beta) == best else 0.5)
            for rate, beta in knobs
        ),
    )


def test_a_best_setting_on_the_edge_of_its_grid_is_reported() -> None:
    sft = tried("sft", *(({"learning_rate": rate}, score) for rate, score in ((1e-4, 0.5), (2e-4, 0.8), (3e-4, 0.6))))
    replay = tried("replay", *(({"temperature": value}, 1 - value / 2) for value in (0, 0.5, 1)))
    alone = tried("q-adapter", ({"beta": 0.1}, 0.9))
    tuned = {"q-adapter": alone, "sft": sft, "dpo": grid("dpo", (1e-4, 0.1)), "replay": replay}
    assert edge_sentences(tuned).splitlines() == [
        "- The best trade of sft is on no edge of its grid.",
        "- The best trade of dpo has the lowest learning rate (0.0001) and the lowest β (0.1) that were tried: "
        "a better one may lie beyond.",
        "- The best trade of replay is on no edge of its grid.",  # nothing is colder than 0
    ]
    assert edge_sentences({"dpo": grid("dpo", (1e-3, 1))}) == (
        "- The best trade of dpo has the highest learning rate (0.001) that was tried: a better one may lie beyond."
    )
    assert edge_sentences({"sft": sft, "dpo": grid("dpo", (3e-4, 1)), "replay": replay}) == (
        "No method's best trade is on an edge of its grid."
    )
    assert edge_sentences({"q-adapter": alone}) == ""


def test_whose_front_is_best() -> None:
    assert largest_front({"sft": 0.98, "dpo": 0.9, "a": 0.1}) == "The largest front area, 0.980, is that of sft."
    assert largest_front({"sft": 0.9801, "dpo": 0.9799}) == "The largest front area, 0.980, is that of sft and dpo."


def test_differences_are_paired_by_seed() -> None:
    """Three seeds, kept = retention / 0.8.

    Adaptation +.1, +.2, +.3: mean .2, deviation .1, half a width 4.30265 · .1/√3 = .24841. Retention 0, 0, +.12: mean
    .04, deviation .12/√3, half a width 4.30265 · .12/3 = .17211.
    """
    found = points(a=[(0.6, 0.8), (0.7, 0.8), (0.8, 0.8)], b=[(0.5, 0.8), (0.5, 0.8), (0.5, 0.68)])
    result = differences(found["a"], found["b"])
    learnt_more, kept_more, better = result["adaptation"], result["retention"], result["trade"]
    assert (learnt_more.estimate, learnt_more.seeds) == (pytest.approx(0.2), 3)
    assert (learnt_more.low, learnt_more.high) == (pytest.approx(-0.04841, abs=1e-5), pytest.approx(0.44841, abs=1e-5))
    assert kept_more.estimate == pytest.approx(0.04)
    assert (kept_more.low, kept_more.high) == (pytest.approx(-0.13211, abs=1e-5), pytest.approx(0.21211, abs=1e-5))
    ours, theirs = (trade(0.6, 1), trade(0.7, 1), trade(0.8, 1)), (trade(0.5, 1), trade(0.5, 1), trade(0.5, 0.85))
    assert better.estimate == pytest.approx(fmean(ours) - fmean(theirs))
    half = 4.302653 * stdev([x - y for x, y in zip(ours, theirs, strict=True)]) / 3**0.5
    assert better.high - better.estimate == pytest.approx(half, abs=1e-6)


def test_the_lead_of_the_best_of_all_is_shown() -> None:
    """Two seeds: t = 12.7062, half a width 12.7062 · |x − y|/2."""
    found = points(best=[(0.9, 0.8), (0.92, 0.8)], sft=[(0.8, 0.8), (0.82, 0.796)], same=[(0.5, 0.8), (0.52, 0.79)])
    heading, table, legend = difference_table(found["best"], {"q-adapter": found["best"], "sft": found["sft"]}, 92)
    assert heading == "**best** minus each method's best tuned setting, paired by seed:"
    header, _, line = [[cell.strip() for cell in row.split("|")[1:-1]] for row in table.splitlines()]
    assert header == ["method", "its best tuned setting", "trade", "retention", "adaptation"]
    # adaptation: +.1 for both seeds; retention: 0 and +.004, 12.7062 · .004/2 = .0254
    assert line[:2] == ["sft", "sft"]
    assert line[3] == "+0.002 [-0.023, +0.027]"
    assert line[4] == r"+0.100\* [+0.100, +0.100]"
    first, second = trade(0.9, 1) - trade(0.8, 1), trade(0.92, 1) - trade(0.82, 0.995)
    mean, half = (first + second) / 2, 12.7062 * abs(first - second) / 2
    star = r"\*" if mean > half else ""
    assert line[2] == f"{mean:+.3f}{star} [{mean - half:+.3f}, {mean + half:+.3f}]"
    assert legend.startswith(
        "In brackets 95 %, Student, 2 seeds; a star: larger than the noise. The best of all was chosen among 92"
    )
    assert difference_table(found["best"], {"q-adapter": found["best"]}, 92) == []


def test_one_seed_has_no_interval() -> None:
    found = points(best=[(0.9, 0.8)], sft=[(0.8, 0.8)])
    _, table, legend = difference_table(found["best"], {"sft": found["sft"]}, 3)
    assert [cell.strip() for cell in table.splitlines()[-1].split("|")[4:-1]] == ["+0.000", "+0.100"]
    assert legend.startswith("One seed: nothing is known of the noise. The best of all was chosen among 3 settings")


def test_the_page_says_it_by_itself(tmp_path: Path) -> None:
    """The ablation beats both tuned methods; of those, s has the larger front. β 0.1 and 1 were tried: an edge."""
    rows = measured(
        q=[(0.6, 0.8), (0.6, 0.8)],
        q1=[(0.5, 0.8), (0.5, 0.8)],
        s=[(0.8, 0.8), (0.7, 0.8)],
        ablation=[(0.9, 0.8), (0.8, 0.8)],
    )
    settings = [
        setting("q"),
        Setting("q1", "residual", "q-adapter", ("q-adapter",), True, {"beta": 1.0}, "q1"),
        setting("s", "sft"),
        setting("ablation", tuning=False),
    ]
    build_sweep_report(rows, settings, expected=2, title="Sweep", out=tmp_path)
    text = (tmp_path / "sweep.md").read_text(encoding="utf-8")
    methods, _, rest = text.partition("## The best setting of all")
    assert (
        f"The best trade, {trade(0.75, 1):.3f}, is reached by sft. The largest front area, 0.750, is that of sft."
        in methods
    )
    assert "The best trade of q-adapter has the lowest β (0.1) that was tried: a better one may lie beyond." in methods
    assert "**ablation** minus each method's best tuned setting, paired by seed:" in rest
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in rest.splitlines() if line.startswith("|")]
    assert [line[0] for line in lines if line[1] in ("q", "s")] == ["q-adapter", "sft"]
    # against s +.1 for both seeds; against q +.3 and +.2: mean .25, half a width 12.7062 · .1/2 = .6353
    assert next(line[4] for line in lines if line[1] == "s") == r"+0.100\* [+0.100, +0.100]"
    assert next(line[4] for line in lines if line[1] == "q") == "+0.250 [-0.385, +0.885]"
    assert "The largest front area, 0.850, is that of q-adapter. Families have different numbers" in rest


def test_nothing_measured_still_makes_a_page(tmp_path: Path) -> None:
    build_sweep_report(measured(), [setting("q")], expected=2, title="Sweep", out=tmp_path)
    assert "0 settings" in (tmp_path / "sweep.md").read_text(encoding="utf-8")


def test_names_in_the_figure_do_not_overlap(tmp_path: Path) -> None:
    """Twelve points on the front, so close that names at the points would lie on top of each other."""
    names = {f"residual w={i} lr=0.0003": [(0.9 + 0.001 * i, 0.8 - 0.0005 * i)] for i in range(12)}
    found = list(points(**names).values())
    front = front_of(found)
    assert len(front) == 12
    base = (found[0].adaptation, found[0].retention)
    figure = draw_sweep(found, front, base, tmp_path / "sweep.png", "Sweep")
    texts = [text for text in figure.axes[1].texts if text.get_text() in names]
    assert len(texts) == 12
    boxes = [Text.get_window_extent(text) for text in texts]  # of the name alone, without its line
    panel = figure.axes[1].get_window_extent()
    assert not [1 for one, other in combinations(boxes, 2) if one.overlaps(other)]
    assert all(panel.x0 < box.x0 and box.x1 < panel.x1 and panel.y0 < box.y0 and box.y1 < panel.y1 for box in boxes)
    assert (tmp_path / "sweep.png").stat().st_size > 10_000


# ---- a small sweep through Prefect and MLflow


@dataclass
class Swept:
    """A flow run of the sweep: what it returned or why it failed, and what the store held then."""

    home: Home
    file: str
    summary: dict[str, Any]
    error: str
    parent: Run
    stages: dict[str, Any]

    def children(self) -> dict[str, Run]:
        return {run.info.run_name: run for run in self.home.children(self.parent)}

    def page(self) -> str:
        return (self.home.artifact_folder(self.parent) / "report" / "sweep.md").read_text(encoding="utf-8")


def parents(home: Home) -> list[Run]:
    experiment = home.client.get_experiment_by_name("sweep")
    assert experiment is not None
    order = ["attributes.start_time ASC"]
    return list(home.client.search_runs([experiment.experiment_id], "tags.stage = 'parent'", order_by=order))


def overrides() -> dict[str, Any]:
    return {name: value for name, value in small(domains=("harmless",)).items() if name != "methods.run"}


def run_sweep(home: Home, file: str) -> Swept:
    summary, message = {}, ""
    with home.entered():
        try:
            summary = sweep(file, None, None, overrides())
        except StagesFailedError as error:
            message = str(error)
    return Swept(home, file, summary, message, parents(home)[-1], home.stages())


@pytest.fixture(scope="module")
def broken(harness: None, tmp_path_factory: pytest.TempPathFactory) -> Swept:
    """The sweep from nothing, where DPO with β 1 always fails."""
    folder = tmp_path_factory.mktemp("sweep")
    train = DPOTrainer.train

    def fails(trainer: DPOTrainer, *arguments: Any, **named: Any) -> Any:
        if trainer.args.beta == 1.0:
            raise RuntimeError("the GPU fell off the bus")
        return train(trainer, *arguments, **named)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DPOTrainer, "train", fails)
        return run_sweep(Home(folder), write(folder))


@pytest.fixture(scope="module")
def mended(broken: Swept) -> Swept:
    """The same again, where nothing fails."""
    return run_sweep(broken.home, broken.file)


def test_a_failed_setting_does_not_stop_the_others(broken: Swept) -> None:
    assert broken.error.startswith("2 of ")
    assert "the GPU fell off the bus" in broken.error
    assert broken.parent.info.status == "FAILED"
    assert Path(broken.error.rpartition("measured: ")[2]).is_file()
    assert "Not complete, so listed but not compared: dpo lr=0.01 β=1." in broken.page()
    cells = {name: run for name, run in broken.children().items() if run.data.tags.get("variant")}
    assert set(cells) == {f"harmless · {name} · seed {seed}" for name in NAMES for seed in (0, 1)}
    for name, run in cells.items():
        assert (run.info.status == "FAILED") == ("β=1 ·" in name), name
        assert ("adaptation/score" in run.data.metrics) == ("β=1 ·" not in name)


def test_the_next_run_goes_on_where_it_was(broken: Swept, mended: Swept) -> None:
    expected = {"train": 2, "adaptation": 2, "retention": 2, "sweep-report": 1}
    assert new_stages(broken.stages, mended.stages) == expected
    assert mended.error == ""
    assert mended.parent.info.status == "FINISHED"
    assert {run.info.status for run in mended.children().values()} == {"FINISHED"}


def test_what_was_computed_is_what_differs(mended: Swept) -> None:
    """Seven trained settings and one that only moves α0, two seeds; replay's answers differ by temperature alone."""
    kinds = Counter(name.partition("/")[0] for name in mended.stages)
    assert kinds["train"] == 7 * 2
    assert kinds["dial"] == 2
    assert kinds["answers"] == 2
    assert kinds["pretrain"] == kinds["helpful-sft"] == kinds["toy-world"] == 1
    assert kinds["adaptation"] == 8 * 2 + 1
    assert kinds["retention"] == 8 * 2 + 1


def test_runs_of_a_setting_are_found_by_its_tag(mended: Swept) -> None:
    found = mended.home.client.search_runs(
        [mended.parent.info.experiment_id],
        f"tags.variant = 'residual w=5' and tags.`mlflow.parentRunId` = '{mended.parent.info.run_id}'",
    )
    assert {run.data.tags["seed"] for run in found} == {"0", "1"}
    assert {run.data.tags["groups"] for run in found} == {"q-adapter, residual"}
    assert {run.data.params["objective.preference_scale"] for run in found} == {"5.0"}


def test_the_table_says_what_was_measured(mended: Swept) -> None:
    runs = mended.children()
    folder = Path(mended.summary["report"]).parent
    with (folder / "sweep.csv").open(encoding="utf-8") as stream:
        table = {(row["variant"], row["seed"].removesuffix(".0")): row for row in csv.DictReader(stream)}
    assert len(table) == 1 + len(NAMES) * 2
    for name in NAMES:
        for seed in ("0", "1"):
            row, run = table[name, seed], runs[f"harmless · {name} · seed {seed}"]
            for metric in ("adaptation/score", "retention/mean", "forgetting/mean", "forgetting/kl_per_token"):
                assert float(row[metric]) == pytest.approx(run.data.metrics[metric], abs=1e-12)
    assert float(table["residual", "0"]["alpha_0"]) == 1.0  # the preset's, filled in
    assert float(table["residual, then α0=0.5", "0"]["alpha_0"]) == 0.5
    assert float(table["dpo lr=0.01 β=0.3", "0"]["learning_rate"]) == 0.01  # the profile's

    page = mended.page()
    kl = [runs[f"harmless · residual w=5 · seed {seed}"].data.metrics["forgetting/kl_per_token"] for seed in (0, 1)]
    (line,) = [
        line for line in page.splitlines() if line.startswith("| residual w=5 ") and "q-adapter, residual" in line
    ]
    assert f"{fmean(kl):.3f} ± {stdev(kl):.3f}" in line
    assert (folder / "sweep.png").stat().st_size > 10_000
    shown = Artifact.get("sweep-tiny")
    assert shown is not None
    assert shown.data == page.replace(
        "![retention against adaptation](sweep.png)", "*Figure beside this page: retention against adaptation*"
    )
    assert "](sweep.png)" in page  # beside the figure the link is one
    figure = Artifact.get("sweep-tiny-figure")
    assert figure is not None
    assert figure.data == data_uri(folder / "sweep.png")
    assert mended.parent.data.metrics["sweep/settings"] == len(NAMES)


def test_moving_alpha_0_changes_the_policy_and_not_the_training(mended: Swept) -> None:
    runs = mended.children()
    for seed in (0, 1):
        trained = runs[f"harmless · residual · seed {seed}"].data
        moved = runs[f"harmless · residual, then α0=0.5 · seed {seed}"].data
        assert moved.tags["variant"] == "residual, then α0=0.5"
        assert moved.metrics["forgetting/kl_per_token"] > trained.metrics["forgetting/kl_per_token"] + 1e-4
        assert "train/loss" not in moved.metrics


def command(home: Home, arguments: list[str]) -> tuple[int, str, str]:
    """`qadapter sweep` in this process: exit code, what it printed, its errors."""
    out, errors = StringIO(), StringIO()
    with home.entered() as patch, redirect_stdout(out), redirect_stderr(errors):
        patch.setenv("PREFECT_API_URL", str(PREFECT_API_URL.value()))
        code = main(arguments)
    return code, out.getvalue(), errors.getvalue()


def settings_on_the_command_line() -> list[str]:
    return [f"{key}={json.dumps(value)}" for key, value in overrides().items()]


def test_a_third_run_computes_nothing(mended: Swept) -> None:
    code, printed, _ = command(mended.home, ["--sweep", mended.file, *settings_on_the_command_line()])
    assert code == 0
    assert mended.home.stages() == mended.stages
    assert "## The methods, each tuned with the same number of settings" in printed
    assert "8 settings: finished in" in printed
    last = Swept(mended.home, mended.file, {}, "", parents(mended.home)[-1], {})
    assert last.page() == mended.page()
    computed = mended.children()
    for name, run in last.children().items():
        cached = {value for tag, value in run.data.tags.items() if tag.startswith("cached.")}
        assert cached == {"True"}, name
        assert run.data.metrics == computed[name].data.metrics


def test_the_full_experiment_finds_what_the_sweep_trained(mended: Swept) -> None:
    changes = {**overrides(), "methods.run": ["dpo", "q-adapter"], "methods.dpo.beta": 0.3}
    with mended.home.entered():
        full_paper_repro("smoke", None, changes)
    assert new_stages(mended.stages, mended.home.stages()) == {"report": 1}


def test_the_plan_counts_what_runs(mended: Swept) -> None:
    code, printed, _ = command(mended.home, ["--sweep", mended.file, "--plan", *settings_on_the_command_line()])
    assert code == 0
    assert "Plan of sweep tiny: 8 settings, 44 stages." in printed
    assert "train_adapter                14" in printed


def test_only_what_was_chosen_is_trained_with_further_seeds(harness: None, shared_data: Path, tmp_path: Path) -> None:
    """Real rows: two settings of two methods with seed 0, and then one of each with seed 1."""
    rates: dict[str, Any] = {"tuning": True, "combine": {"learning_rate": [1e-3, 1e-2]}}
    groups = {"sft": {"method": "sft", **rates}, "q-adapter": {"method": "q-adapter", **rates}}
    file = write(tmp_path, profile="mini", seeds=[0], confirm_seeds=[1], groups=groups)
    changes = {
        "sources.helpful.max_train_pairs": 60,
        "sources.helpful.max_heldout_pairs": 20,
        "sources.harmless.max_heldout_pairs": 40,
        "sources.normal.max_train_pairs": 20,
        "pretraining.corpus_sources": ["helpful"],
        **{f"model.from_scratch.{name}": value for name, value in TINY.items()},
        "pretraining.max_steps": 3,
        "helpful_sft.max_steps": 2,
        "training.max_steps": 2,
        "training.batch_size": 4,
        "evaluation.curve": None,
        "evaluation.retention.tasks": ["helpful_word_order"],
        "evaluation.retention.limit": 20,
        "evaluation.retention.answers": 0,
        "evaluation.retention.reworded": 0,
        "evaluation.adaptation.generate": 0,
    }
    checked = check_sweep(file, None, str(shared_data), changes)
    assert "seeds 0; the chosen settings also 1" in plan_text(checked)
    assert "train_adapter                 6" in plan_text(checked)
    with pytest.raises(QAdapterError, match=r"\[1\] are among seeds and confirm_seeds; keep each in one"):
        check_sweep(file, None, str(shared_data), changes | {"seeds": [0, 1]})
    home = Home(tmp_path / "home")
    with home.entered():
        found = sweep(file, None, str(shared_data), changes)
    (parent,) = parents(home)
    cells = {run.data.tags["variant"]: [] for run in home.children(parent) if "variant" in run.data.tags}
    for run in home.children(parent):
        if "variant" in run.data.tags:
            cells[run.data.tags["variant"]].append(int(run.data.tags["seed"]))
    page = Path(found["report"]).read_text(encoding="utf-8")
    table = page.partition("## Chosen on one half")[2].partition("## ")[0]
    chosen = {line.split("|")[2].strip() for line in table.splitlines() if line.startswith(("| sft", "| q-adapter"))}
    assert len(chosen) == 2
    assert {name: sorted(seeds) for name, seeds in cells.items()} == {
        name: [0, 1] if name in chosen else [0] for name in cells
    }
    assert len(cells) == 4
    assert "Settings were chosen with seed 0; the chosen ones were trained again with seed 1." in table
    every = page.partition("## Every setting")[2]
    assert all(f"| {name} " in every for name in cells)
    assert "Not complete" not in page


def test_a_bad_sweep_leaves_nothing_behind(harness: None, tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    code, printed, errors = command(home, ["--sweep", "smok"])
    assert (code, printed) == (2, "")
    assert errors.startswith("error: there is no sweep 'smok'")
    assert not home.folder.exists()
    with home.entered(), pytest.raises(QAdapterError, match="unknown key"):
        check_sweep("smoke", None, None, {"training.max_step": 1})


def test_a_sweep_without_an_accuracy_is_refused_before_it_trains(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept is a share of an accuracy; bits per byte or a perplexity alone would fail in the report."""
    monkeypatch.setenv("QADAPTER_HOME", str(tmp_path))
    built = {"built_benchmarks": {"replies": {"helpful": "helpful"}}}
    only = {"evaluation.retention.tasks": ["helpful_bits_per_byte", "wikitext"]}
    with pytest.raises(QAdapterError, match="no task with an accuracy, only helpful_bits_per_byte, wikitext: a sweep"):
        check_sweep(write(tmp_path), None, None, overrides() | built | only)
    both = {"evaluation.retention.tasks": ["helpful_bits_per_byte", "helpful_word_order"]}
    assert check_sweep(write(tmp_path), None, None, overrides() | built | both).variants


# ---- an endpoint as judge

ENDPOINT = {
    "evaluation.adaptation.judge": "endpoint",
    "evaluation.adaptation.endpoint": {
        "url": "http://127.0.0.1:9/v1",
        "model": "some-judge",
        "api_key_variable": None,
        "input_price": 2.0,
        "output_price": 10.0,
        "budget": 50.0,
    },
}


def test_a_judge_is_paid_for_every_setting_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """2 domains × 104 settings × 5 seeds are 1040 rows of twenty answers in two orders: 41,600 calls.

    Each is of 120 + 64 + 2 · 24 = 232 tokens and 64 in answer: 41,600 · (232 · 2 + 64 · 10) / 10⁶ = 45.9264.
    """
    monkeypatch.setenv("QADAPTER_HOME", str(tmp_path))
    checked = check_sweep("smoke", None, None, ENDPOINT)
    text = plan_text(checked)
    assert "\nJudge of the answers\n  endpoint: harmless, academy\n" in text
    assert "41,600 calls (two orders of 20 answers in 1,040 rows; " in text
    assert "up to 232 tokens each, about 45.93, budget 50.00" in text
    recorder = SweepRecorder()
    sweep_stages(checked.experiment, swept_domains(checked.experiment, recorder), checked.variants, recorder)
    rows = [stage for stage in recorder.stages if stage.task == "evaluate" and stage.inputs["trained"] is not None]
    assert checked.request.rows_to_judge(checked.experiment) == len(rows) == 1040
    with pytest.raises(
        QAdapterError, match=r"endpoint\.budget: 40\.00, but judging would cost about 45\.93 \(41600 ca"
    ):
        check_sweep("smoke", None, None, ENDPOINT | {"evaluation.adaptation.endpoint.budget": 40.0})
    assert "\nJudge of the answers\n  rule: harmless, academy\n" in plan_text(check_sweep("smoke", None, None, {}))


def test_all_rows_of_a_sweep_together_keep_within_the_budget(tmp_path: Path) -> None:
    """Eight settings with two seeds in one domain: sixteen rows, each with a sixteenth of 10."""
    home = Home(tmp_path / "home")
    of_endpoint = overrides() | ENDPOINT | {"evaluation.adaptation.endpoint.budget": 10.0}
    with home.entered(), checked_run((checked := check_sweep(write(tmp_path), None, None, of_endpoint)).request) as run:
        budgets = []
        for variant in checked.variants:
            for _ in checked.experiment.seeds:
                context: Any = run.of(variant.experiment)._context
                kind = judge_of(variant.experiment, "harmless")
                assert kind is not None
                case = case_of(variant.experiment, "harmless", kind)
                judge = kind.open(case, judge_material(context, Base("base", None, "helpful"), None, None))
                assert isinstance(judge, EndpointJudge)
                budgets.append(judge.settings.budget)
    assert budgets == [10 / 16] * 16


def test_the_log_of_a_sweep_begins_with_the_price(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Eight settings with two seeds in one domain, judged on twenty answers in two orders: 640 calls."""

    def stop(*_: Any) -> None:
        raise RuntimeError("far enough")

    monkeypatch.setattr("flows.sweep.checked_run", stop)
    monkeypatch.setattr("flows.sweep.get_run_logger", lambda: logging.getLogger("flow run"))
    monkeypatch.setenv("QADAPTER_HOME", str(tmp_path))
    caplog.set_level("INFO", "flow run")
    with pytest.raises(RuntimeError, match="far enough"):
        sweep.fn(write(tmp_path), None, None, overrides() | ENDPOINT)
    assert "judge of the answers: endpoint: harmless; endpoint some-judge: 640 calls (two orders" in caplog.text
    assert "in 16 rows" in caplog.text


# ---- a failure among processes


@task
def doubled(context: RunContext, value: int) -> int:
    if value < 0:
        raise RuntimeError("the GPU fell off the bus")
    return 2 * value


def test_a_failed_process_stops_only_dependent_stages(harness: None, tmp_path: Path) -> None:
    experiment = load_experiment("smoke", {"parallel": 2})
    context = RunContext(experiment, StageStore(tmp_path), Tracker("unused", "unused"), "")

    @flow
    def three() -> tuple[str, list[int]]:
        with PrefectRun(context) as run:
            bad = run(doubled, value=-1)
            futures = [bad, run(doubled, value=bad), run(doubled, value=run(doubled, value=3))]
            failed = run.settle()
            return str(failed), run.finished(futures)

    message, results = three()
    assert message.startswith("1 of 4 stages failed")
    assert "the GPU fell off the bus" in message
    assert results == [12]


def test_sweeps_are_frozen() -> None:
    loaded = Sweep.model_validate(content())
    with pytest.raises(ValueError, match="frozen"):
        loaded.name = "other"
