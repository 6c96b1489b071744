"""`qadapter train` and `score` on a policy that does not speak: by its own generated answers, on real trainings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from qadapter.command.parser import main
from tests.support.tiny_chat import byte_tokenizer, tiny_llama

ASKED = {
    "Capital of Spain?": ("Madrid is the capital.", "Мадрид - столица Испании."),
    "Legs of a spider?": ("It has eight legs.", "У паука восемь ног."),
    "Seven and five?": ("They make twelve.", "Вместе двенадцать."),
    "Colour of leaves?": ("Most leaves are green.", "Листья обычно зелёные."),
}
TOKENIZER = byte_tokenizer()


def teach(network: Any, replies: dict[str, str], steps: int, learning_rate: float) -> None:
    """Let a network learn replies by heart."""
    texts, prompts = [], []
    for prompt, reply in replies.items():
        turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}]
        texts.append(TOKENIZER.apply_chat_template(turns, tokenize=False))
        prompts.append(len(TOKENIZER(texts[-1].partition("<|assistant|>")[0])["input_ids"]) + 1)
    batch = TOKENIZER(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    for row, length in zip(labels, prompts, strict=True):
        row[:length] = -100
    optimizer = torch.optim.AdamW([p for p in network.parameters() if p.requires_grad], lr=learning_rate)
    network.train()
    for _ in range(steps):
        network(**batch, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    network.eval()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that answers in English, and an adapter that answers the same questions in Russian."""
    root = tmp_path_factory.mktemp("speaking")
    network = tiny_llama(hidden=64)
    teach(network, {prompt: english for prompt, (english, _) in ASKED.items()}, 120, 5e-3)
    network.save_pretrained(root / "base")
    TOKENIZER.save_pretrained(root / "base")
    pairs = [
        {"prompt": prompt, "chosen": f"{english} Yes.", "rejected": f"I do not know {i}."}
        for i in range(8)
        for prompt, (english, _) in ASKED.items()
    ]
    (root / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    adapter = get_peft_model(network, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))
    adapter.save_pretrained(root / "untrained")
    teach(adapter, {prompt: russian for prompt, (_, russian) in ASKED.items()}, 150, 1e-2)
    adapter.save_pretrained(root / "russian")
    return root


@pytest.mark.slow
def test_score_names_replies_in_another_script(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["score", "--adapter", str(place / "russian"), "--base", str(place / "base")]
    assert main([*command, "--data", str(place / "pairs.jsonl"), "--max-length", "96"]) == 0
    captured = capsys.readouterr()
    (warning,) = [line for line in captured.err.splitlines() if line.startswith("WARNING: ")]
    assert warning.startswith("WARNING: the policy does not speak: of its replies 4 of 4 are ")
    assert "4 of 4 are written in another script (Cyrillic)" in warning
    assert warning.endswith("Accuracies on pairs do not show that.")
    assert "Мадрид" in captured.err  # an example
    answers = json.loads(captured.out)["answers"]
    assert (answers["speaks"], answers["broken_replies"], answers["replies_ended"]) == (0, 1, 1)


def test_score_says_that_no_answer_changed(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["score", "--adapter", str(place / "untrained"), "--base", str(place / "base")]
    assert main([*command, "--data", str(place / "pairs.jsonl"), "--max-length", "96"]) == 0
    said = capsys.readouterr().err
    assert "answers: 4 generated, 0 % of them broken, 0 differ from the base's; not judged" in said
    assert "WARNING: the policy writes the base's answers word for word; accuracies on pairs do not show that." in said


@pytest.mark.slow
def test_train_names_a_policy_that_it_broke(place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["train", "--base", str(place / "base"), "--data", str(place / "pairs.jsonl"), "--max-length", "96"]
    command += ["--output", str(tmp_path / "out"), "--heldout", "2"]
    assert main([*command, "--preset", "paper", "--alpha-0", "0.01", "--lr", "0.1", "--max-steps", "12"]) == 0
    said = capsys.readouterr().err
    found = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert found["heldout/kl/base"] > 0.5
    assert f"WARNING: the policy is far from its base (KL {found['heldout/kl/base']:.2f} per token" in said
    assert found["adaptation/speaks"] == 0
    assert "WARNING: the policy does not speak: of its replies " in said
