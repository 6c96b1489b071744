"""The methods on a reward model: advantages by hand, rewards on token ids, ShiQ's residuals in an enumerated world."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import read_json
from qadapter.methods.needs.reward_model import NAME, RewardModelSettings, open_rewards, reward_model
from qadapter.methods.rloo import RLOOSettings
from qadapter.methods.shiq import ShiQSettings, residuals
from qadapter.methods.table import method_named
from qadapter.policy.loading import load_base
from qadapter.preferences.pair import load_pairs
from qadapter.preferences.tokenize import encode_pair
from qadapter.training import own_replies
from qadapter.training.pair_trainer import Scores
from tests.support.tiny_toy import MODEL, NO_DROPOUT, TRAINING, TinyToy, make_tiny_toy, rows


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyToy:
    return make_tiny_toy(tmp_path_factory.mktemp("rewards"), steps=20)


def test_a_reward_model_is_one_need_for_all(world: TinyToy) -> None:
    """RLOO, GRPO and ShiQ share it, and so do the rollouts of VAS and PITA."""
    needs = {name: method_named(name).needs(method_named(name).settings()) for name in ("rloo", "grpo", "shiq")}
    assert len(set(needs.values())) == 1
    for name in ("vas", "pita"):
        (own,) = method_named(name).needs(method_named(name).settings())
        assert own.needs == needs["rloo"]
    other = RLOOSettings(reward=RewardModelSettings(max_steps=3))
    assert method_named("rloo").needs(other) != needs["rloo"]
    folder = world.needs(needs["rloo"])[NAME]
    metrics = read_json(folder / "metrics.json")
    assert metrics["train/steps"] == 6, "as long as the policies' training"
    assert 0 <= metrics["reward/accuracy"] <= 1
    assert not any(name.startswith("judge/") for name in metrics)


def test_rewards_have_mean_0_and_deviation_1(world: TinyToy) -> None:
    """Over the replies that it was trained on, read as token ids with their ends."""
    folder = world.needs([reward_model(RewardModelSettings())])[NAME]
    score = open_rewards(folder, world.base, MODEL, 4)
    _, tokenizer = load_base(world.base, MODEL)
    pairs = [encode_pair(one, tokenizer, TRAINING.max_length) for one in load_pairs(world.pairs)]
    texts = [pair.prompt_ids + ids for pair in pairs for ids in (pair.chosen_ids, pair.rejected_ids)]
    found = np.array(score(texts))
    assert found.mean() == pytest.approx(0, abs=1e-5)
    assert found.std() == pytest.approx(1, abs=1e-5)
    assert all(text[-1] == tokenizer.eos_token_id for text in texts)
    assert score([texts[0][:-1]])[0] != pytest.approx(found[0], abs=1e-4), "the end counts"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "group", "rewards", "advantages"),
    [
        ("rloo", 4, [1.0, 0.0, 0.0, 0.0], [1.0, -1 / 3, -1 / 3, -1 / 3]),
        ("rloo", 2, [1.0, 0.0], [1.0, -1.0]),
        ("grpo", 2, [1.0, 0.0], [0.70701, -0.70701]),  # ±½ / (√½ + 1e-4), the deviation with n − 1
    ],
)
def test_advantages_by_hand(
    method: str,
    group: int,
    rewards: list[float],
    advantages: list[float],
    world: TinyToy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And before the first step there is no distance from the base; RLOO's loss, a mean over replies, is 0."""
    seen: list[list[float]] = []
    read: list[list[int]] = []
    trainer_of = {"rloo": own_replies.TokenizedRLOOTrainer, "grpo": own_replies.TokenizedGRPOTrainer}[method]
    score = trainer_of._generate_and_score_completions

    def watched(trainer: Any, inputs: Any) -> Any:
        output = score(trainer, inputs)
        seen.append(output["advantages"].tolist())
        return output

    def reward(texts: Any) -> list[float]:
        read.extend(texts)
        return rewards * (len(texts) // group)

    monkeypatch.setattr(trainer_of, "_generate_and_score_completions", watched)
    record = method_named(method)
    monkeypatch.setattr("qadapter.methods.policy_gradients.rewards_of", lambda _: reward)
    training = TRAINING.model_copy(update={"max_steps": 2, "save_steps": None})
    choice = record.settings(replies_per_prompt=group)  # type: ignore[call-arg]
    out = world.train(method, tmp_path / "out", choice=choice, lora=NO_DROPOUT, training=training)
    assert seen[0] == pytest.approx(advantages * (8 // group), abs=1e-4)
    first = rows(out / "history.jsonl")[0]
    assert first["train/kl"] == pytest.approx(0, abs=1e-6)
    assert method == "grpo" or first["train/loss"] == pytest.approx(0, abs=1e-5)
    _, tokenizer = load_base(world.base, MODEL)
    prompts = [encode_pair(one, tokenizer, TRAINING.max_length).prompt_ids for one in load_pairs(world.pairs)]
    assert len(read) == 16
    assert all(any(text[: len(prompt)] == prompt for prompt in prompts) for text in read), "the same token ids"
    ended = [text for text in read if tokenizer.eos_token_id in text[-1:]]
    assert ended, "the end token is part of a reply that ended"
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["cost/train_tokens"] == sum(map(len, read))


def test_a_batch_without_whole_groups_is_refused(world: TinyToy, tmp_path: Path) -> None:
    with pytest.raises(QAdapterError, match=r"8 replies per micro-batch .* not a multiple of 3 replies per prompt"):
        world.train("rloo", tmp_path / "out", choice=RLOOSettings(replies_per_prompt=3))


# ---- ShiQ


def enumerated(beta: float) -> tuple[Scores, torch.Tensor, dict[str, Any]]:
    """Three tokens, two steps: the optimal policy of max E[R] − β KL(π‖π1), as logits ℓ1 + Q*/β, for all 9 replies."""
    torch.manual_seed(3)
    base = {(): torch.randn(3).double(), **{(a,): torch.randn(3).double() for a in range(3)}}
    worth = torch.randn(3, 3).double()
    own = {(a,): base[(a,)] + worth[a] / beta for a in range(3)}
    moved = torch.stack([own[(a,)].logsumexp(0) - base[(a,)].logsumexp(0) for a in range(3)])
    own[()] = base[()] + moved
    replies = list(itertools.product(range(3), range(3)))

    def gathered(logits: dict[Any, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        taken = torch.stack([torch.stack([logits[()][a], logits[(a,)][b]]) for a, b in replies])
        normal = torch.stack([torch.stack([logits[()].logsumexp(0), logits[(a,)].logsumexp(0)]) for a, b in replies])
        return taken, normal

    scores = Scores(torch.ones(9, 2, dtype=torch.bool), *gathered(own), *gathered(base))
    rewards = torch.stack([worth[a, b] for a, b in replies])
    return scores, rewards, {"own": own, "base": base, "worth": worth}


@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_shiqs_residuals_vanish_at_the_optimum(beta: float) -> None:
    """There the policy is π1 · e^(R/β) / Z, and β (v − v1) at the prompt is β log Z."""
    scores, rewards, made = enumerated(beta)
    assert float(residuals(scores, rewards, beta).abs().max()) < 1e-12
    log_policy = (scores.logits - scores.log_normalizers).sum(1)
    log_base = (scores.base_logits - scores.base_log_normalizers).sum(1)
    tilted = log_base + rewards / beta
    torch.testing.assert_close(log_policy, tilted - tilted.logsumexp(0), atol=1e-12, rtol=0)
    moved = made["own"][()].logsumexp(0) - made["base"][()].logsumexp(0)
    assert float(moved) == pytest.approx(float(tilted.logsumexp(0)), abs=1e-12)
    shifted = Scores(
        scores.scored, scores.logits + 1, scores.log_normalizers + 1, scores.base_logits, scores.base_log_normalizers
    )
    torch.testing.assert_close(shifted.log_ratios, scores.log_ratios)
    assert float(residuals(shifted, rewards, beta).abs().min()) == pytest.approx(beta), (
        "the loss is not shift-invariant"
    )


@pytest.mark.slow
def test_shiqs_loss_without_reward_is_0_at_the_base(
    world: TinyToy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qadapter.methods.shiq.rewards_of", lambda _: lambda texts: [0.0] * len(texts))
    out = world.train("shiq", tmp_path / "none", lora=NO_DROPOUT)
    assert [row["train/loss"] for row in rows(out / "history.jsonl")] == [0.0] * 6
    monkeypatch.setattr("qadapter.methods.shiq.rewards_of", lambda _: lambda texts: [1.0, -1.0] * (len(texts) // 2))
    out = world.train("shiq", tmp_path / "some", choice=ShiQSettings(beta=0.3), lora=NO_DROPOUT)
    history = rows(out / "history.jsonl")
    assert history[0]["train/loss"] == pytest.approx(1.0, abs=1e-6), "each token's residual is the reply's reward"
    assert history[-1]["train/loss"] < 1.0
    assert history[-1]["train/rewards/margins"] > 0
