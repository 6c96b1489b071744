"""The quality stage on the toy world, with a store and without servers."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

from prefect.logging import disable_run_logger

from qadapter.config.experiment import load_experiment
from qadapter.files.artifacts import read_json
from tasks.data import generate_toy_world, prepare_data
from tasks.quality import QUALITY, measure_quality
from tasks.stages.context import RunContext
from tasks.stages.store import StageStore


def value_of(result: Any) -> Any:
    return getattr(result, "data", result)


def test_a_source_is_measured_once_and_shown_in_both_runs(tmp_path: Path) -> None:
    """80 harmful requests of two pairs to train on, 48 held out: 256 pairs; the base's questions are not among them."""
    tracker = MagicMock()
    tracker.start_child.return_value = "child"
    context = RunContext(load_experiment("smoke", {}), StageStore(tmp_path), tracker, "parent")
    with disable_run_logger():
        world = value_of(generate_toy_world.fn(context))
        data = value_of(prepare_data.fn(context, source="harmless", world=world))
        found = [
            value_of(measure_quality.fn(context, source="harmless", data=data, benchmarks=world)).output
            for _ in range(2)
        ]
    assert [output.cached for output in found] == [False, True]
    report = read_json(found[0].path / QUALITY)
    assert (report["pairs"], report["train_pairs"]) == (256, 160)
    assert report["benchmarks_not_looked_at"] == []
    assert {name: counts["shared"] for name, counts in report["contamination"].items()} == {
        "toy_facts": 0,
        "toy_sums": 0,
        "toy_howtos": 0,
        "toy_advice": 0,
    }
    shown = [call.args for call in tracker.log_metrics.call_args_list if "data/harmless/longer_chosen" in call.args[1]]
    assert {run for run, _ in shown} == {"child", "parent"}
    assert shown[0][1]["data/harmless/contamination/toy_facts/items"] == 64
