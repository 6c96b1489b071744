"""The reward model: learns a preference, is measured on pairs it did not see, judges answers, twice the same."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import PretrainedConfig

from qadapter.config.training import OptimizerSettings
from qadapter.errors import QAdapterError
from qadapter.evaluation.statistics import mean_interval, proportion_interval
from qadapter.judging import reward_training
from qadapter.judging.reward_model import RewardJudge
from qadapter.judging.reward_training import train_judge
from qadapter.judging.rewards import ADAPTER, load_reward_base, pair_accuracy, reward_padding, rewards
from qadapter.policy.loading import load_base
from qadapter.preferences.pair import load_pairs
from tests.support.tiny_chat import byte_tokenizer
from tests.support.tiny_toy import LORA, MODEL, TinyToy, make_tiny_toy, pair, rows, write_pairs

SETTINGS = OptimizerSettings(learning_rate=2e-2, max_steps=12, batch_size=5, max_length=64, logging_steps=1)


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> TinyToy:
    return make_tiny_toy(tmp_path_factory.mktemp("toy"), steps=10)


def trained(toy: TinyToy, out: Path, **changes: Any) -> Path:
    out.mkdir(parents=True)
    options = {"pairs_file": toy.pairs, "heldout_file": toy.heldout, "lora": LORA, "settings": SETTINGS, **changes}
    train_judge(toy.base, model=MODEL, seed=1, out=out, scratch=out.with_name("scratch"), **options)
    return out


@pytest.fixture(scope="module")
def judge_folder(toy: TinyToy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(toy, tmp_path_factory.mktemp("judge") / "out")


def metrics(folder: Path) -> dict[str, float]:
    return dict(json.loads((folder / "metrics.json").read_text()))


def judge_of(folder: Path, toy: TinyToy) -> RewardJudge:
    return RewardJudge(folder, toy.base, MODEL, max_length=64, batch_size=3)


@pytest.mark.slow
def test_it_learns_what_is_preferred(toy: TinyToy, judge_folder: Path) -> None:
    """Refusals against compliance is easy to tell: the held-out pairs, of other prompts, are decided rightly."""
    found = metrics(judge_folder)
    assert found["judge/accuracy"] == found["judge/accuracy_high"] == 1.0
    # Wilson's, n of n right: n / (n + 1.96²)
    n = found["judge/accuracy_n"]
    assert found["judge/accuracy_low"] == pytest.approx(n / (n + 1.96**2), abs=1e-4)
    assert found["judge/train_pairs"] == 10
    losses = [row["train/loss"] for row in rows(judge_folder / "history.jsonl")]
    assert len(losses) == 12
    assert losses[0] == pytest.approx(np.log(2), abs=0.3)  # nothing is known yet: -log σ(0)
    assert losses[-1] < 0.1
    files = {file.name for file in (judge_folder / ADAPTER).iterdir()}
    assert "adapter_model.safetensors" in files
    assert not {name for name in files if name.endswith((".bin", ".pt", ".pkl"))}


def test_it_judges_answers_by_their_reward(toy: TinyToy, judge_folder: Path) -> None:
    pairs = load_pairs(toy.heldout)[:4]
    prompts = [one.prompt for one in pairs]
    chosen, rejected = [one.chosen for one in pairs], [one.rejected for one in pairs]
    judge = judge_of(judge_folder, toy)
    assert judge.verdicts(prompts, rejected, chosen) == ["win"] * 4
    assert judge.verdicts(prompts, chosen, rejected) == ["loss"] * 4
    assert judge.verdicts(prompts, chosen, ["", " ", *chosen[2:]]) == ["loss", "loss", "tie", "tie"]
    assert judge.verdicts(prompts[:2], ["", ""], [rejected[0], ""]) == ["win", "tie"]
    found = metrics(judge_folder)
    assert judge.metrics() == {
        "adaptation/judge_accuracy": 1.0,
        "adaptation/judge_accuracy_low": found["judge/accuracy_low"],
        "adaptation/judge_accuracy_high": 1.0,
        "adaptation/judge_accuracy_n": found["judge/accuracy_n"],
    }


def test_twice_the_same(toy: TinyToy, judge_folder: Path, tmp_path: Path) -> None:
    again = trained(toy, tmp_path / "again")
    for name in (f"{ADAPTER}/adapter_model.safetensors", "history.jsonl"):
        assert (again / name).read_bytes() == (judge_folder / name).read_bytes()
    figures = {name: value for name, value in metrics(again).items() if not name.startswith("cost/")}
    assert figures == {name: value for name, value in metrics(judge_folder).items() if not name.startswith("cost/")}


def test_preferences_that_mean_nothing_leave_it_at_chance(toy: TinyToy, tmp_path: Path) -> None:
    """Held-out pairs of both directions: half of them contradict any preference."""
    held = load_pairs(toy.heldout)[:6]
    both = held + [type(one)(one.prompt, one.rejected, one.chosen) for one in held]
    out = trained(toy, tmp_path / "o", heldout_file=write_pairs(tmp_path / "h.jsonl", both))
    found = metrics(out)
    assert found["judge/accuracy"] == 0.5
    assert found["judge/accuracy_low"] < 0.5 < found["judge/accuracy_high"]


def test_no_pair_that_can_be_used(toy: TinyToy, tmp_path: Path) -> None:
    same = write_pairs(tmp_path / "p.jsonl", [pair("a ?", "unheard", "unknown")])  # one token to this tokenizer
    with pytest.raises(QAdapterError, match="None of the judge's pairs can be used within 64 tokens"):
        trained(toy, tmp_path / "o", pairs_file=same)


class CountsBytes(torch.nn.Module):
    """A reward network whose reward is the number of tokens that are not padding."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.config = PretrainedConfig(pad_token_id=9)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> SimpleNamespace:
        assert bool((input_ids[attention_mask == 0] == 9).all())
        return SimpleNamespace(logits=attention_mask.sum(dim=1, keepdim=True).float())


def test_rewards_are_in_the_order_given() -> None:
    assert rewards(CountsBytes(), [[1], [2, 3, 4], [5, 6]], batch_size=2).tolist() == [1, 3, 2]


def padded_with_its_end(toy: TinyToy, folder: Path, template: str | None = None) -> Path:
    """The toy's base, padding with the end token as GPT-2, Pythia and Qwen's bases do."""
    network, tokenizer = load_base(toy.base, MODEL)
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template = template or tokenizer.chat_template
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_reply_that_ends_has_the_reward_of_its_end(toy: TinyToy, tmp_path: Path) -> None:
    """Where a base pads with its end token, the end is read all the same: the hidden state there, times the head."""
    network, tokenizer = load_reward_base(padded_with_its_end(toy, tmp_path / "base"), MODEL)
    words = [id_ for id_ in range(len(tokenizer)) if id_ not in tokenizer.all_special_ids]
    cut = words[:3]
    texts = [cut, [*cut, tokenizer.eos_token_id], words[:8]]
    parts: Any = network
    with torch.no_grad():
        expected = [
            float(parts.score(parts.model(torch.tensor([ids])).last_hidden_state)[0, -1, 0].double()) for ids in texts
        ]
    assert rewards(network, texts, batch_size=3).tolist() == pytest.approx(expected, abs=1e-6)
    assert abs(expected[0] - expected[1]) > 1e-3


@pytest.mark.slow
def test_a_training_pads_so_too(toy: TinyToy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainers: list[Any] = []
    saved = reward_training.save_weights
    monkeypatch.setattr(reward_training, "save_weights", lambda t, out: (trainers.append(t), saved(t, out)))
    base = padded_with_its_end(toy, tmp_path / "base")
    (tmp_path / "o").mkdir()
    train_judge(
        base,
        toy.pairs,
        toy.heldout,
        model=MODEL,
        lora=LORA,
        settings=SETTINGS,
        seed=1,
        out=tmp_path / "o",
        scratch=tmp_path / "s",
    )
    (trainer,) = trainers
    _, tokenizer = load_base(base, MODEL)
    padding = reward_padding(tokenizer)
    assert padding != tokenizer.eos_token_id == tokenizer.pad_token_id
    assert trainer.data_collator.pad_token_id == trainer.model.config.get_text_config().pad_token_id == padding


def test_which_token_pads() -> None:
    """The padding token, where no reply ends with it; else the beginning of a text, or the byte 0."""
    tokenizer = byte_tokenizer()
    assert reward_padding(tokenizer) == tokenizer.pad_token_id == 0
    tokenizer.pad_token = tokenizer.eos_token
    assert reward_padding(tokenizer) == tokenizer.bos_token_id == 1
    tokenizer.bos_token = tokenizer.eos_token  # GPT-2's three are one
    assert reward_padding(tokenizer) == tokenizer.convert_tokens_to_ids("Ā")
    assert tokenizer("\0", add_special_tokens=False)["input_ids"] == [reward_padding(tokenizer)]

    # Llama 3 pads with the token that ends a turn; its end of a text is another
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = "<|user|>"
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] + '<|user|>' }}{% endfor %}"
    assert reward_padding(tokenizer) == tokenizer.bos_token_id


def test_accuracy_by_hand() -> None:
    """A longer chosen reply counts 1, one of equal length ½, a shorter one 0: (1 + ½ + 0 + 1) / 4."""
    tokenizer = byte_tokenizer()
    pairs = [pair("q", "aaa", "b"), pair("q", "aa", "bb"), pair("q", "a", "bb"), pair("q", "aaaa", "b")]
    found = pair_accuracy(CountsBytes(), tokenizer, pairs, max_length=64, batch_size=3)
    assert (found.estimate, found.items) == (0.625, 4)


def test_pairs_of_one_prompt_are_right_or_wrong_together() -> None:
    """8 of 12 prompts right, with four pairs each: as sure as 12 prompts make it, not as 48 pairs would."""
    tokenizer = byte_tokenizer()
    right = [True] * 8 + [False] * 4
    pairs = [pair(f"q{i}", "aaa" if won else "a", "bb") for i, won in enumerate(right) for _ in range(4)]
    found = pair_accuracy(CountsBytes(), tokenizer, pairs, max_length=64, batch_size=8)
    of_prompts, of_pairs = mean_interval([float(won) for won in right]), proportion_interval(32, 48)
    assert (found.estimate, found.items) == (pytest.approx(2 / 3), 48)
    assert (found.low, found.high) == (pytest.approx(of_prompts.low), pytest.approx(of_prompts.high))
    assert of_prompts.low < of_pairs.low < of_pairs.high < of_prompts.high


def test_without_template_the_plain_transcript_is_judged(toy: TinyToy, judge_folder: Path, tmp_path: Path) -> None:
    """As a policy reads it: `Human: …`, `Assistant: …`."""
    network, tokenizer = load_base(toy.base, MODEL)
    tokenizer.chat_template = None
    network.save_pretrained(tmp_path / "plain")
    tokenizer.save_pretrained(tmp_path / "plain")
    assert load_base(tmp_path / "plain", MODEL)[1].chat_template is None
    pairs = load_pairs(toy.heldout)[:3]
    judge = RewardJudge(judge_folder, tmp_path / "plain", MODEL, max_length=64, batch_size=3)
    prompts, chosen, rejected = ([getattr(one, part) for one in pairs] for part in ("prompt", "chosen", "rejected"))
    found = judge.verdicts(prompts, rejected, chosen)
    assert found == ["win" if verdict == "loss" else "loss" for verdict in judge.verdicts(prompts, chosen, rejected)]
