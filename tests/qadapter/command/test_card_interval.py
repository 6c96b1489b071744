"""The interval on the card of `qadapter train`: prompts are drawn, with all their pairs."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from qadapter.command import train
from qadapter.evaluation.preference import PairScores
from qadapter.preferences.pair import PreferencePair


@pytest.mark.parametrize("each", [1, 4])
def test_four_pairs_of_a_prompt_make_the_card_no_surer(each: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """70 of 100 prompts won with all their pairs: ± 1.96 · √(.7 · .3/100); the first pair could not be scored."""
    pairs = [
        PreferencePair(({"role": "user", "content": f"question {i}"},), f"good {j}", "bad")
        for i in range(-1, 100)
        for j in range(each if i >= 0 else 1)
    ]
    n = 100 * each

    def scores(chosen: np.ndarray) -> PairScores:
        ones = np.ones(n, dtype=np.int64)
        return PairScores(chosen, np.zeros(n), ones, ones, np.arange(1, n + 1), 1)

    won = np.where(np.arange(n) < 70 * each, 1.0, -1.0)
    monkeypatch.setattr(train, "score_both", lambda *_, **__: (scores(won), scores(np.zeros(n))))
    monkeypatch.setattr(train, "look_at_answers", lambda *_, **__: {})
    trainer: Any = SimpleNamespace(evaluate=lambda _: {"eval_loss": 1.0}, processing_class=None, policy=None)
    options: Any = SimpleNamespace(max_length=64, micro_batch=4, answers=0)
    found = train._evaluate(trainer, pairs, None, options)
    low, high = (found[f"adaptation/implied_reward_accuracy/{end}"] for end in ("low", "high"))
    assert found["adaptation/implied_reward_accuracy"] == pytest.approx(0.7)
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(0.7 * 0.3 / 100), rel=0.1)
