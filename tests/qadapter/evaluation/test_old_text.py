"""What is measured on text of the old distribution: of which source, and what is said where none is named."""

from __future__ import annotations

from typing import Any

import pytest

from flows.full_paper_repro import experiment_stages
from flows.running.plan import Recorder, plan_text
from qadapter.config.experiment import load_experiment
from qadapter.evaluation.old_text import unmeasured_on_old_text
from qadapter.report.build import build_report
from qadapter.report.intervals import Measured
from qadapter.report.rows import Row
from qadapter.report.summary import sentences

ONE_DOMAIN = {"domains": {"harmless": {"source": "harmless", "base": "pretrained"}}}


def without_old_text() -> dict[str, Any]:
    """`smoke` from the pre-trained base, and no helpful data."""
    sources = {"harmless": load_experiment("smoke").sources["harmless"].model_dump(exclude_none=True)}
    return {**ONE_DOMAIN, "sources": sources, "helpful_sft": None}


def with_old_text() -> dict[str, Any]:
    """`smoke` from the pre-trained base, and old text named."""
    sources = {name: load_experiment("smoke").sources[name].model_dump() for name in ("harmless", "helpful")}
    return {**ONE_DOMAIN, "sources": sources}


def test_the_plan_warns_without_a_measure_on_old_text() -> None:
    plan = plan_text("smoke", None, without_old_text())
    (said,) = [line for line in plan.splitlines() if "old text" in line]
    assert said == (
        "  Nothing is measured on old text (the KL to the base, the share of the base's own answers that stay the "
        "same), because no source of it is named: add a helpful_sft section whose source holds such conversations. It "
        "trains a base only for domains with base: helpful."
    )
    assert "old text" not in plan_text("smoke", None, with_old_text())


def test_refusals_are_reported_outside_the_toy_world() -> None:
    changes = {**without_old_text(), "evaluation.retention.tasks": ["toy_facts"]}
    (said,) = unmeasured_on_old_text(load_experiment("smoke", changes).model_dump())
    assert "stay the same, the share of harmless requests that are refused)" in said


@pytest.mark.parametrize("profile", ["smoke", "mini", "paper"])
def test_profiles_and_other_files_give_no_message(profile: str) -> None:
    assert unmeasured_on_old_text(load_experiment(profile).model_dump(mode="json", by_alias=True)) == []
    assert unmeasured_on_old_text({"shared": {"training.max_steps": 5}}) == []


def test_the_report_says_it(tmp_path) -> None:
    metrics = {"adaptation/score": 0.5, "retention/mean": 0.75, "forgetting/mean": 0.0}
    rows = [Row("harmless", "base", None, metrics), Row("harmless", "dpo", 0, metrics)]
    config = load_experiment("smoke", without_old_text()).model_dump(mode="json", by_alias=True)
    build_report(rows, title="t", data={}, config=config, out=tmp_path)
    assert "- Nothing is measured on old text (the KL" in (tmp_path / "report.md").read_text()
    assert "Nothing is measured on old text (the KL" in (tmp_path / "report.html").read_text()
    usual = load_experiment("smoke").model_dump(mode="json", by_alias=True)
    assert not [line for line in sentences(Measured(rows), usual) if "old text" in line]


def test_old_text_can_be_named_without_a_base_being_trained_on_it() -> None:
    recorder = Recorder()
    experiment_stages(load_experiment("smoke", with_old_text()), recorder)
    stages = {stage.name: stage for stage in recorder.stages}
    assert "helpful-sft" not in stages
    for name in ("retention-pretrained", "evaluate-harmless-dpo-0"):
        assert stages[name].inputs["old_texts"] is stages["prepare-helpful"]
