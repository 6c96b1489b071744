"""TRL's trainers with the head on replies only learn what they learn with TRL's own."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qadapter.training import reply_log_probs
from tests.support.tiny_toy import STEPS, TinyToy, make_tiny_toy, rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyToy:
    return make_tiny_toy(tmp_path_factory.mktemp("reply-log-probs"))


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_the_same_training(method: str, world: TinyToy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced = []
    replace = reply_log_probs.score_replies_only
    monkeypatch.setattr(reply_log_probs, "score_replies_only", lambda model: replaced.append(replace(model)))
    scored = []
    score = reply_log_probs.token_terms
    monkeypatch.setattr(reply_log_probs, "token_terms", lambda *given: scored.append(len(given[0])) or score(*given))
    curves, weights = [], []
    for large in (10**9, 1):
        monkeypatch.setattr(reply_log_probs, "LARGE_VOCABULARY", large)
        out = world.train(method, tmp_path / str(large))
        curves.append(rows(out / "history.jsonl"))
        weights.append(load_file(next((out / "adapter").glob("*.safetensors"))))
    assert replaced == [False, True]
    assert len(scored) >= STEPS  # once for each step, and once more where the reference is asked
    theirs, ours = curves
    assert len(theirs) == len(ours) > 1
    for before, after in zip(theirs, ours, strict=True):
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert after[name] == pytest.approx(value, abs=2e-4, rel=1e-3), name
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, atol=2e-4, rtol=1e-3)
        assert value.abs().max() > 0
