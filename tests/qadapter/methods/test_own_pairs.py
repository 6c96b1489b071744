"""DPOP and SPIN: losses by hand, the opponent's replies and weights, and what each was trained on."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qadapter.config.model import LoraSettings
from qadapter.errors import QAdapterError
from qadapter.methods.dpo import DPOSettings
from qadapter.methods.dpop import DPOPSettings, pair_losses
from qadapter.methods.spin import SPINSettings
from qadapter.policy.loading import load_base
from qadapter.preferences.pair import load_pairs
from qadapter.preferences.tokenize import encode_pair
from qadapter.training.pair_trainer import PairTrainer
from qadapter.training.self_play import SelfPlayTrainer
from tests.support.tiny_toy import MODEL, PAIRS, TRAINING, TinyToy, make_tiny_toy, pair, rows, write_pairs

NO_DROPOUT = LoraSettings(rank=2, alpha=4, dropout=0.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyToy:
    return make_tiny_toy(tmp_path_factory.mktemp("own"), steps=20)


def test_dpop_by_hand() -> None:
    """log 2 at the start; log-ratios (1, −1) are DPO's; (−1, −3) at β = .5, λ = 2: −log σ(.5 · (2 − 2)) = log 2."""
    chosen, rejected = torch.tensor([0.0, 1.0, -1.0]), torch.tensor([0.0, -1.0, -3.0])
    found = pair_losses(chosen, rejected, beta=0.5, penalty=2.0).tolist()
    assert found == pytest.approx([math.log(2), math.log(1 + math.exp(-1)), math.log(2)], abs=1e-6)


def test_logged_margins_are_of_all_processes() -> None:
    """Two pairs here, with margins 1 and −2, and three elsewhere, with 5, 3 and 0."""
    trainer = PairTrainer.__new__(PairTrainer)
    trainer._margins = {True: [torch.tensor([1.0]), torch.tensor([-2.0])], False: [torch.tensor([4.0])]}
    elsewhere = torch.tensor([8.0, 2.0, 3.0])
    trainer.accelerator = SimpleNamespace(reduce=lambda own, reduction: own + elsewhere)
    found = trainer._taken(training=True)
    assert found == {"rewards/margins": pytest.approx(7 / 5), "rewards/accuracies": pytest.approx(3 / 5)}
    assert trainer._taken(training=True) == {}
    assert trainer._taken(training=False) == {"rewards/margins": 4.0, "rewards/accuracies": 1.0}


@pytest.mark.slow
def test_dpop_without_the_penalty_is_dpo(world: TinyToy, tmp_path: Path) -> None:
    """TRL's DPO, step by step; with the penalty the chosen replies end higher."""
    curves: dict[str, list[dict[str, Any]]] = {}
    for name, method, choice in (
        ("dpo", "dpo", DPOSettings(beta=0.3)),
        ("none", "dpop", DPOPSettings(beta=0.3, penalty=0.0)),
        ("some", "dpop", DPOPSettings(beta=0.3, penalty=5.0)),
    ):
        out = world.train(method, tmp_path / name, choice=choice, lora=NO_DROPOUT)
        curves[name] = rows(out / "history.jsonl")
    for one, other in zip(curves["dpo"], curves["none"], strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-4)
        assert one["train/rewards/margins"] == pytest.approx(0.3 * other["train/rewards/margins"], abs=1e-4)
    assert curves["some"][0]["train/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert curves["some"][-1]["train/loss"] != pytest.approx(curves["none"][-1]["train/loss"], rel=1e-3)


def test_micro_batches_give_the_same_step(world: TinyToy, tmp_path: Path) -> None:
    curves = []
    for micro in (4, 1):
        training = TRAINING.model_copy(update={"max_steps": 3, "micro_batch_size": micro})
        out = world.train("dpop", tmp_path / str(micro), training=training, lora=NO_DROPOUT)
        curves.append([row["train/loss"] for row in rows(out / "history.jsonl")])
    assert curves[0] == pytest.approx(curves[1], rel=1e-4)


def test_spin_plays_against_itself(world: TinyToy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two iterations of three steps: each begins with log 2 and the policy of that step as its opponent."""
    seen: list[dict[str, Any]] = []
    compute = SelfPlayTrainer.compute_loss

    def watched(trainer: SelfPlayTrainer, model: Any, inputs: dict[str, Any], *rest: Any, **options: Any) -> Any:
        loss = compute(trainer, model, inputs, *rest, **options)
        weights = {name: value.detach().clone() for name, value in trainer._adapter(model).items()}
        seen.append({"weights": weights, "opponent": trainer.opponent, "loss": float(loss), "inputs": inputs})
        return loss

    monkeypatch.setattr(SelfPlayTrainer, "compute_loss", watched)
    choice = SPINSettings(beta=0.5)
    out = world.train("spin", tmp_path / "out", choice=choice, lora=NO_DROPOUT)
    assert [entry["loss"] == pytest.approx(math.log(2), abs=1e-5) for entry in seen] == [
        True,
        False,
        False,
        True,
        False,
        False,
    ]
    for start in (0, 3):
        for step in seen[start : start + 3]:
            assert all(torch.equal(step["opponent"][name], w) for name, w in seen[start]["weights"].items())
    assert float(max(w.abs().max() for n, w in seen[0]["opponent"].items() if "lora_B" in n)) == 0, "first the base"
    replies = [json.loads((tmp_path / f"out-scratch/opponent-{k}.json").read_text()) for k in (0, 1)]
    assert len(replies[0]) == len(replies[1]) == PAIRS
    _, tokenizer = load_base(world.base, MODEL)
    pairs = [encode_pair(one, tokenizer, TRAINING.max_length) for one in load_pairs(world.pairs)]
    longest = max(len(one.chosen_ids) for one in pairs)
    assert all(0 < len(reply) <= longest for both in replies for reply in both)
    # the first half of a batch are chosen replies, the other the opponent's: from the fourth step on of both iterations
    own: list[set[int]] = []
    for step in seen:
        ids, mask, reply = (step["inputs"][name] for name in ("input_ids", "attention_mask", "response_mask"))
        texts = [(row[m == 1].tolist(), row[r].tolist()) for row, m, r in zip(ids, mask, reply, strict=True)]
        half, found = len(texts) // 2, set()
        for (whole, chosen), (_, generated) in zip(texts[:half], texts[half:], strict=True):
            place = next(i for i, one in enumerate(pairs) if one.prompt_ids + one.chosen_ids == whole)
            assert chosen == pairs[place].chosen_ids
            found |= {k for k in (0, 1) if replies[k][place] == generated}
            assert any(replies[k][place] == generated for k in (0, 1))
        own.append(found)
    assert all(0 in found for found in own[:3])
    assert all(1 in found for found in own[3:])
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["cost/generated_tokens"] == sum(len(reply) for both in replies for reply in both)
    assert metrics["cost/train_tokens"] == sum(int(step["inputs"]["attention_mask"].sum()) for step in seen)


def test_one_long_prompt_shortens_no_reply(world: TinyToy, tmp_path: Path) -> None:
    """Its pair's replies have two words each: the room beside this prompt was that of every opponent's reply."""
    pairs = load_pairs(world.pairs)
    long = " ".join(["tell me how to change the permit ."] * 20)
    odd = pair(long, "no .", "yes .")
    mixed = replace(world, pairs=write_pairs(tmp_path / "pairs.jsonl", [odd, *pairs[1:]]))
    out = mixed.train("spin", tmp_path / "out", choice=SPINSettings(max_new_tokens=12), lora=NO_DROPOUT)
    replies = json.loads((tmp_path / "out-scratch/opponent-0.json").read_text())
    _, tokenizer = load_base(world.base, MODEL)
    left = TRAINING.max_length - len(encode_pair(odd, tokenizer, TRAINING.max_length).prompt_ids)
    assert left < 6
    assert max(map(len, replies)) == 12
    read = json.loads((out / "metrics.json").read_text())["cost/train_tokens"]
    assert read <= 6 * 8 * TRAINING.max_length


def test_more_iterations_than_steps_are_refused(world: TinyToy, tmp_path: Path) -> None:
    with pytest.raises(QAdapterError, match="spin has 7 iterations and the training only 6 steps"):
        world.train("spin", tmp_path / "out", choice=SPINSettings(iterations=7))
