"""The README shows only what was run: its Python block is run here, its commands and files are checked to exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qadapter.policy.dial import Dial
from tests.support.paths import PROJECT_ROOT
from tests.support.tiny_chat import byte_tokenizer
from tests.support.tiny_models import tiny_model

README = (PROJECT_ROOT / "README.md").read_text(encoding="utf-8")


def test_the_python_example_trains_saves_loads_and_generates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer()
    base = tmp_path / "base"
    tiny_model("llama", seed=0).save_pretrained(base)
    tokenizer.save_pretrained(base)
    (code,) = re.findall(r"```python\n(.*?)```", README, flags=re.S)
    code = code.replace("path/or/hub-id", str(base)).replace("max_steps=100", "max_steps=2, use_cpu=True")
    monkeypatch.chdir(tmp_path)
    pairs = [
        {
            "prompt": [{"role": "user", "content": f"question {i}"}],
            "chosen": [{"role": "assistant", "content": "a good answer"}],
            "rejected": [{"role": "assistant", "content": "a bad answer"}],
        }
        for i in range(8)
    ]
    names = {"tokenizer": tokenizer, "pairs": pairs}
    exec(code, names)  # the README's own text
    policy = names["policy"]
    assert policy.dial == Dial("scale", 0.5)
    ids = tokenizer("Hello", return_tensors="pt")["input_ids"]
    with policy.disable_adapter():
        base_log_probs = policy(input_ids=ids).logits.log_softmax(-1)

    def distance(value: float) -> float:
        log_probs = policy(input_ids=ids, dial=Dial("scale", value)).logits.log_softmax(-1)
        return float((log_probs - base_log_probs).abs().mean())

    assert distance(1.0) > distance(0.5) > distance(0.25) > distance(0.0) == 0  # as the block's comment says


def test_every_file_and_make_target_it_names_exists() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (PROJECT_ROOT / target).exists(), target
    makefile = (PROJECT_ROOT / "Makefile").read_text(encoding="utf-8")
    for command in set(re.findall(r"\bmake ([a-z-]+)", README)):
        assert re.search(rf"^{command}:", makefile, flags=re.M), command
