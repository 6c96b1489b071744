"""What a run says in its own log while it works: data that are too small, policies that cannot be used."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tasks.data
import tasks.evaluate
from qadapter.config.experiment import load_experiment
from tasks.stages.context import Cell, RunContext
from tasks.stages.stage_run import StageResult
from tasks.stages.store import StageStore


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    """The lines of a task's logger."""
    for module in (tasks.data, tasks.evaluate):
        monkeypatch.setattr(module, "get_run_logger", lambda: logging.getLogger("run"))
    return caplog


def lines(said: pytest.LogCaptureFixture) -> list[str]:
    found = [record.getMessage() for record in said.records if record.levelno == logging.WARNING]
    said.clear()
    return found


def test_few_pairs_are_said_when_they_are_read(
    tmp_path: Path, said: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """12 prompts, 2 of them held out: 10 pairs in steps of 16, which ten passes over 10 · 10 / 30 = 3 make 30."""
    pairs = [{"prompt": f"Thing {i}?", "chosen": "I do not say.", "rejected": "Red."} for i in range(12)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    changes: dict[str, Any] = {
        "sources": {"mine": {"path": str(tmp_path / "pairs.jsonl"), "heldout": 2}},
        "domains": {"own": {"source": "mine", "base": "pretrained"}},
        "training.max_steps": None,
        "training.epochs": 1,
        "training.batch_size": 16,
        "toy_world": None,
        "helpful_sft": None,
        "pretraining.corpus_sources": ["mine"],
        "evaluation.retention.tasks": ["hellaswag"],
    }
    context = RunContext(load_experiment("smoke", changes), StageStore(tmp_path / "store"), None, "")  # type: ignore[arg-type]

    def stage(context: RunContext, name: str, *, module: str, config: Any, inputs: Any, compute: Any, **_: Any) -> Any:
        output = context.store.run(name, module=module, config=config, inputs=inputs, compute=compute)
        return StageResult(output, "")

    monkeypatch.setattr(tasks.data, "run_stage", stage)
    for _ in range(2):  # where the stage is found, too
        tasks.data.prepare_data.fn(context, "mine", None)
        assert lines(said) == [
            "own: 1 step of 16 pairs hardly changes a model; give training.epochs=10 and training.batch_size=3",
            "own: only 2 held-out pairs: what was learnt shows in steps of 1/2; hold out at least 20 prompts with "
            "sources.mine.heldout=20, or give sources.mine.heldout_path",
        ]


def test_a_policy_that_cannot_be_used_is_named(tmp_path: Path, said: pytest.LogCaptureFixture) -> None:
    def warned(speaks: float, kl: float | None) -> list[str]:
        kept = {} if kl is None else {"forgetting/kl_per_token": kl}
        adaptation, retention = (
            SimpleNamespace(path=tmp_path, output=SimpleNamespace(metrics=lambda found=found: found))
            for found in ({"adaptation/speaks": speaks}, kept)
        )
        tasks.evaluate._warn(Cell("academy", "dpo", 0), adaptation, retention)  # type: ignore[arg-type]
        return lines(said)

    assert warned(1.0, 0.5) == []
    assert warned(1.0, None) == []
    assert warned(1.0, float("nan")) == []
    assert warned(1.0, 3.214) == [
        "academy · dpo · seed 0 is far from its base (KL 3.21 per token; trainings that keep the base's abilities lie "
        "below 0.2): it may have lost what the base could do"
    ]
    assert warned(0.0, 0.1) == ["academy · dpo · seed 0 does not speak: most of its replies are broken"]
    (tmp_path / "speech.jsonl").write_text('{"faults": ["repeat themselves"]}\n')
    (tmp_path / "answers.jsonl").write_text('{"reply": "====="}\n')
    assert warned(0.0, 0.1) == [
        'academy · dpo · seed 0 does not speak: of its replies 1 of 1 repeat themselves, for example "====="'
    ]
