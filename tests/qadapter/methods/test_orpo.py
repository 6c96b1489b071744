"""ORPO: the loss is the paper's, on the same token ids, with the same adapter and budget as every method."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.experimental.orpo import ORPOTrainer

from qadapter.config.model import LoraSettings
from qadapter.methods.orpo import ORPOSettings
from qadapter.policy.loading import load_base
from qadapter.preferences.pair import load_pairs
from qadapter.preferences.tokenize import EncodedPair, encode_pair
from tests.support.tiny_toy import MODEL, PAIRS, TRAINING, TinyToy, make_tiny_toy, pair, rows, write_pairs

ONE_STEP = TRAINING.model_copy(update={"max_steps": 1, "batch_size": PAIRS})
NO_DROPOUT = LoraSettings(rank=2, alpha=4, dropout=0.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyToy:
    return make_tiny_toy(tmp_path_factory.mktemp("orpo"), steps=20)


def encoded(world: TinyToy) -> list[EncodedPair]:
    _, tokenizer = load_base(world.base, MODEL)
    return [encode_pair(one, tokenizer, TRAINING.max_length) for one in load_pairs(world.pairs)]


def log_probs(network: Any, prompt: list[int], reply: list[int]) -> torch.Tensor:
    """Of every token but the first, given those before it."""
    ids = torch.tensor([prompt + reply])
    with torch.no_grad():
        return network(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]


def test_the_odds_ratio_term_of_equal_replies_is_beta_log_2() -> None:
    """−β log σ(0) = 0.1 · log 2 = 0.069315; and by hand for mean probabilities of 1/2 and 1/4: odds 1 and 1/3."""
    trainer = ORPOTrainer.__new__(ORPOTrainer)
    trainer.beta, trainer.accelerator = 0.1, type("A", (), {"device": "cpu"})()

    def term(chosen: float, rejected: float) -> float:
        return -float(trainer.odds_ratio_loss(torch.tensor([math.log(chosen)]), torch.tensor([math.log(rejected)]))[0])

    assert term(0.3, 0.3) == pytest.approx(0.069315, abs=5e-7)
    assert term(1 / 2, 1 / 4) == pytest.approx(-0.1 * math.log(3 / 4), rel=1e-5)  # σ(log 3) = 3/4


def test_the_first_loss_is_the_papers(world: TinyToy, tmp_path: Path) -> None:
    """NLL per token of prompt and chosen reply, plus β times −log σ of the log odds ratio of mean log-probabilities.

    The adapter starts at zero, so it is the base's.
    """
    network, _ = load_base(world.base, MODEL)
    likelihoods, terms = [], []
    for one in encoded(world):
        chosen, rejected = (log_probs(network, one.prompt_ids, ids) for ids in (one.chosen_ids, one.rejected_ids))
        likelihoods.append(chosen)
        means = [side[len(one.prompt_ids) - 1 :].mean() for side in (chosen, rejected)]
        log_odds = [mean - torch.log1p(-mean.exp()) for mean in means]
        terms.append(torch.nn.functional.logsigmoid(log_odds[0] - log_odds[1]))
    nll, ratio = -torch.cat(likelihoods).mean(), torch.stack(terms).mean()
    for beta in (0.1, 1.0):
        choice = ORPOSettings(beta=beta)
        out = world.train("orpo", tmp_path / str(beta), choice=choice, training=ONE_STEP, lora=NO_DROPOUT)
        first = rows(out / "history.jsonl")[0]
        assert first["train/loss"] == pytest.approx(float(nll - beta * ratio), rel=1e-5)
        assert first["train/nll_loss"] == pytest.approx(float(nll), rel=1e-5)
        assert first["train/log_odds_ratio"] == pytest.approx(float(ratio), rel=1e-4)


def test_it_reads_the_token_ids_that_all_methods_read(
    world: TinyToy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[list[int], list[int]]] = []
    compute, parts = ORPOTrainer.concatenated_forward, ("input_ids", "attention_mask", "labels")

    def watched(trainer: ORPOTrainer, model: Any, batch: dict[str, Any]) -> Any:
        for side in ("chosen", "rejected"):
            for ids, mask, labels in zip(*(batch[f"{side}_{n}"] for n in parts), strict=True):
                seen.append((ids[mask == 1].tolist(), ids[labels != -100].tolist()))
        dropout = {
            module.p for name, module in model.named_modules() if "lora_dropout" in name and hasattr(module, "p")
        }
        assert dropout == {0.1}, "the adapter's dropout acts, as in SFT and the Q-Adapter"
        return compute(trainer, model, batch)

    monkeypatch.setattr(ORPOTrainer, "concatenated_forward", watched)
    world.train("orpo", tmp_path / "out", training=ONE_STEP)
    expected = [
        (one.prompt_ids + reply, reply) for one in encoded(world) for reply in (one.chosen_ids, one.rejected_ids)
    ]
    assert sorted(seen) == sorted(expected)


def test_micro_batches_of_equal_pairs_give_the_same_step(world: TinyToy, tmp_path: Path) -> None:
    """Transformers divides the loss by the number of micro-batches only where the trainer does not say it did."""
    pairs = write_pairs(tmp_path / "pairs.jsonl", [pair("what is 2 plus 2 ?", "2 plus 2 is 4 .", "no , sorry .")] * 4)
    curves = []
    for micro in (4, 1):
        training = TRAINING.model_copy(update={"max_steps": 2, "batch_size": 4, "micro_batch_size": micro})
        out = world.train("orpo", tmp_path / str(micro), pairs_file=pairs, training=training, lora=NO_DROPOUT)
        curves.append([(row["train/loss"], row["train/grad_norm"]) for row in rows(out / "history.jsonl")])
    for one, other in zip(*curves, strict=True):
        assert one == pytest.approx(other, rel=1e-4)


@pytest.mark.slow
def test_it_learns_to_prefer_the_chosen_replies(world: TinyToy, tmp_path: Path) -> None:
    training = TRAINING.model_copy(update={"max_steps": 30, "learning_rate": 5e-2})
    lora = LoraSettings(rank=8, alpha=16, dropout=0.0)
    history = rows(world.train("orpo", tmp_path / "out", training=training, lora=lora) / "history.jsonl")
    assert history[0]["train/log_odds_chosen"] < 0 < history[-1]["train/log_odds_chosen"]
    assert history[0]["train/rewards/accuracies"] == 0
    assert history[-1]["train/rewards/accuracies"] == 1
    assert json.loads((tmp_path / "out/metrics.json").read_text())["train/steps"] == 30
