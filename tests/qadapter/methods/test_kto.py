"""KTO: the loss is the paper's on our rows, single or split from pairs, in mixed batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from trl import KTOTrainer

from qadapter.config.experiment import load_experiment
from qadapter.config.model import LoraSettings
from qadapter.config.training import AdapterTraining
from qadapter.errors import QAdapterError
from qadapter.methods.kto import KTOSettings, balanced, mismatched
from qadapter.policy.loading import load_base
from qadapter.preferences.pair import SINGLE, LabelledReply, load_pairs
from qadapter.preferences.tokenize import encode_pair
from tests.support.tiny_toy import MODEL, TRAINING, TinyToy, make_tiny_toy, rows

NO_DROPOUT = LoraSettings(rank=4, alpha=8, dropout=0.0)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> TinyToy:
    return make_tiny_toy(tmp_path_factory.mktemp("kto"), steps=20)


def test_each_reply_of_a_batch_meets_the_prompt_of_the_next() -> None:
    assert mismatched([[1], [2], [3]]) == [[3], [1], [2]]


def test_the_labels_weigh_the_same() -> None:
    """n_D w_D = n_U w_U where nothing is set; one weight that is set fixes the other (the paper's equation 8)."""
    assert balanced(10, 10, KTOSettings()) == (1, 1)
    assert balanced(10, 30, KTOSettings()) == (3, 1)
    assert balanced(30, 10, KTOSettings()) == (1, 3)
    assert balanced(10, 30, KTOSettings(undesirable_weight=0.5)) == (1.5, 0.5)
    assert balanced(10, 30, KTOSettings(desirable_weight=6)) == (6, 2)
    assert balanced(10, 30, KTOSettings(desirable_weight=2, undesirable_weight=2)) == (2, 2)
    assert balanced(4, 0, KTOSettings()) == (1, 1)


class Watch:
    """The batches that TRL's loss got, its value, and the same by hand from plain forward passes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.batches: list[dict[str, torch.Tensor]] = []
        self.losses: list[tuple[float, float]] = []
        compute = KTOTrainer._compute_loss

        def watched(trainer: KTOTrainer, model: Any, inputs: Any, return_outputs: bool) -> Any:
            loss = compute(trainer, model, inputs, return_outputs)
            self.batches.append({name: value.clone() for name, value in inputs.items()})
            self.losses.append((float(loss), self.by_hand(trainer, model, inputs)))
            return loss

        monkeypatch.setattr(KTOTrainer, "_compute_loss", watched)

    @staticmethod
    def by_hand(trainer: KTOTrainer, model: Any, batch: dict[str, torch.Tensor]) -> float:
        def log_ratios(prefix: str) -> torch.Tensor:
            ids, mask = batch[f"{prefix}input_ids"], batch[f"{prefix}completion_mask"][:, 1:]

            def summed() -> torch.Tensor:
                with torch.no_grad():
                    logits = model(input_ids=ids, attention_mask=batch[f"{prefix}attention_mask"]).logits[:, :-1]
                return (logits.log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0] * mask).sum(1)

            adapted = summed()
            with model.disable_adapter():
                return adapted - summed()

        beta, z0 = trainer.beta, log_ratios("KL_").mean().clamp(min=0)
        ratios, good = log_ratios(""), batch["label"].bool()
        value = torch.where(
            good,
            trainer.desirable_weight * (1 - torch.sigmoid(beta * (ratios - z0))),
            trainer.undesirable_weight * (1 - torch.sigmoid(beta * (z0 - ratios))),
        )
        return float(value.mean())


@pytest.mark.slow
def test_pairs_are_good_and_bad_rows_of_one_loss(
    world: TinyToy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every batch's loss is the paper's; the first is 0.5 a row. All methods' token ids, both labels in a batch."""
    watch = Watch(monkeypatch)
    training = TRAINING.model_copy(update={"max_steps": 9, "learning_rate": 3e-2})
    out = world.train("kto", tmp_path / "out", choice=KTOSettings(beta=0.3), training=training, lora=NO_DROPOUT)
    assert [found for found, _ in watch.losses] == pytest.approx([expected for _, expected in watch.losses], rel=1e-4)
    assert watch.losses[0][0] == pytest.approx(0.5, abs=1e-6)
    history = rows(out / "history.jsonl")
    assert history[0]["train/kl"] == 0
    assert history[-1]["train/loss"] < 0.45
    assert history[-1]["train/rewards/margins"] > 0

    _, tokenizer = load_base(world.base, MODEL)
    pairs = [encode_pair(one, tokenizer, TRAINING.max_length) for one in load_pairs(world.pairs)]
    expected = [
        (p.prompt_ids + ids, good) for p in pairs for ids, good in ((p.chosen_ids, True), (p.rejected_ids, False))
    ]
    replies = {tuple(ids) for p in pairs for ids in (p.chosen_ids, p.rejected_ids)}
    epochs: list[tuple[list[int], bool]] = []
    mixed = 0
    for batch in watch.batches:
        labels = batch["label"].tolist()
        mixed += len(set(labels)) == 2
        kept = [ids[mask == 1].tolist() for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
        epochs += [(ids, bool(label)) for ids, label in zip(kept, labels, strict=True)]
        own = [
            tuple(ids[mask == 1].tolist())
            for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
        ]
        other = [
            tuple(ids[mask == 1].tolist())
            for ids, mask in zip(batch["KL_input_ids"], batch["KL_completion_mask"], strict=True)
        ]
        assert other == mismatched(own)
        assert set(own) <= replies
    assert sorted(epochs[:20]) == sorted(epochs[20:40]) == sorted(expected), "an epoch is every row once"
    assert epochs[:20] != epochs[20:40], "in another order"
    assert mixed >= len(watch.batches) - 1


@pytest.mark.slow
def test_single_replies_are_taken_as_they_are(world: TinyToy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two good and five bad rows, no pair at all; the last odd row is left out, and the good ones weigh more."""
    watch = Watch(monkeypatch)
    folder = tmp_path / "prepared"
    folder.mkdir()
    (folder / "train.jsonl").touch()
    pairs = load_pairs(world.pairs)
    replies = [LabelledReply(one.prompt, one.rejected, False) for one in pairs[:4]]
    replies += [LabelledReply(one.prompt, one.chosen, True) for one in pairs[4:6]]
    replies.append(LabelledReply(pairs[7].prompt, pairs[7].rejected, False))
    (folder / SINGLE).write_text("".join(json.dumps(one.to_row()) + "\n" for one in replies), encoding="utf-8")
    training = TRAINING.model_copy(update={"max_steps": 4})
    out = world.train("kto", tmp_path / "out", pairs_file=folder / "train.jsonl", training=training, lora=NO_DROPOUT)
    assert [len(batch["label"]) for batch in watch.batches] == [6] * 4
    assert watch.losses[0][0] == pytest.approx((2 * 2 * 0.5 + 4 * 0.5) / 6, abs=1e-6), "weights 2 and 1"
    assert [found for found, _ in watch.losses] == pytest.approx([expected for _, expected in watch.losses], rel=1e-4)
    metrics = json.loads((out / "metrics.json").read_text())
    tokens = sum(int(batch["attention_mask"].sum()) for batch in watch.batches)
    assert metrics["cost/train_tokens"] == tokens
    cut = training.model_copy(update={"max_length": 4})
    with pytest.raises(QAdapterError, match="max_length 4 cuts a reply of 7 of 7 training replies"):
        world.train("kto", tmp_path / "cut", pairs_file=folder / "train.jsonl", training=cut)
    cut = cut.model_copy(update={"allow_truncation": True, "max_steps": 1})
    out = world.train("kto", tmp_path / "allowed", pairs_file=folder / "train.jsonl", training=cut)
    metrics = json.loads((out / "metrics.json").read_text())
    assert [metrics[f"train/truncated_{what}"] for what in ("prompts", "replies")] == [7, 7]
    (folder / SINGLE).unlink()
    with pytest.raises(QAdapterError, match="none of 0 training pairs"):
        world.train("dpo", tmp_path / "dpo", pairs_file=folder / "train.jsonl")


def test_single_replies_need_a_method_that_takes_them() -> None:
    """`pairing: none` is refused before a run for methods that need pairs, and without held-out pairs."""
    source = {"path": "{data}/hh-rlhf/harmless.jsonl", "pairing": "none"}
    changes = {"methods.run": ["kto", "dpo"], "sources.harmless": source}
    with pytest.raises(QAdapterError) as caught:
        load_experiment("smoke", changes)
    assert "no pair to hold out: give heldout_path" in str(caught.value)
    assert "dpo cannot train on single replies" in str(caught.value)
    with pytest.raises(QAdapterError, match="it has no pair to limit: remove max_train_pairs"):
        load_experiment("smoke", {**changes, "sources.harmless.max_train_pairs": 9})
    held = {**source, "heldout_path": "{data}/hh-rlhf/harmless-heldout.jsonl"}
    assert load_experiment("smoke", {"methods.run": ["kto"], "sources.harmless": held}).methods.run == ("kto",)


def test_single_replies_and_pairs_set_aside_exclude_each_other(world: TinyToy, tmp_path: Path) -> None:
    """The rows beside paired ones have the prompts that are set aside too; a method of pairs does not read them."""
    source = {"path": "{data}/hh-rlhf/harmless.jsonl", "pairing": "all"}
    changes = {"methods.run": ["dpo", "kto"], "sources.harmless": source, "training.eval_steps": 2}
    with pytest.raises(
        QAdapterError, match=r"training\.eval_steps sets pairs aside, and kto trains on the single repl"
    ):
        load_experiment("smoke", changes)
    load_experiment("smoke", {**changes, "methods.run": ["dpo"]})

    single = [
        LabelledReply(one.prompt, reply, good)
        for one in load_pairs(world.pairs)
        for reply, good in ((one.chosen, True), (one.rejected, False))
    ]
    (tmp_path / "train.jsonl").write_bytes(world.pairs.read_bytes())
    (tmp_path / SINGLE).write_text("".join(json.dumps(one.to_row()) + "\n" for one in single), encoding="utf-8")
    training = AdapterTraining.model_validate({**TRAINING.model_dump(), "eval_steps": 2, "eval_pairs": 2})
    with pytest.raises(QAdapterError, match="single replies to the same prompts"):
        world.train("kto", tmp_path / "out", pairs_file=tmp_path / "train.jsonl", training=training)
