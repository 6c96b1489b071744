"""The scripts of `examples/`, run as a reader would."""

from __future__ import annotations

import json
import re
import runpy
from pathlib import Path
from typing import Any

import pytest

import qadapter
from qadapter.report.build import build_report
from qadapter.report.rows import Row
from tests.support.paths import PROJECT_ROOT
from tests.support.tiny_chat import byte_tokenizer, tiny_llama

EXAMPLES = PROJECT_ROOT / "examples"


def example(name: str, *arguments: str) -> None:
    runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"](list(arguments))


def test_there_are_three_and_each_is_run_here() -> None:
    names = {file.stem for file in EXAMPLES.glob("*.py")}
    assert names == {"own_pairs", "one_adapter", "read_report"}
    here = Path(__file__).read_text(encoding="utf-8")
    assert all(f'example("{name}"' in here for name in names)


@pytest.mark.slow
def test_own_pairs_then_one_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, out, file = tmp_path / "base", tmp_path / "out", tmp_path / "pairs.jsonl"
    tiny_llama().save_pretrained(base)
    byte_tokenizer().save_pretrained(base)
    pairs = [{"prompt": f"Thing {i}?", "chosen": "Look and see.", "rejected": "It is green."} for i in range(10)]
    file.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    example("own_pairs", "--base", str(base), "--pairs", str(file), "--output", str(out), "--epochs", "8")
    printed = capsys.readouterr().out
    shares = re.findall(r"^(before|after): ([\d.]+) of 2 held-out pairs", printed, flags=re.M)
    assert [when for when, _ in shares] == ["before", "after"]
    assert float(shares[1][1]) == 1.0  # the same two replies as in training

    policy: Any = qadapter.QAdapterForCausalLM.from_pretrained(out)
    assert any(weights.abs().max() > 0 for name, weights in policy.named_parameters() if "lora_B" in name)
    example("one_adapter", str(out), "Thing 3?", "--max-new-tokens", "8", "--dials", "scale=1", "q-weight=1", "scale=0")
    lines = dict(re.findall(r"^(scale=1|q-weight=1|scale=0): ?(.*)$", capsys.readouterr().out, flags=re.M))
    assert lines["scale=1"] == lines["q-weight=1"] != lines["scale=0"]
    with policy.disable_adapter():
        (of_base,) = qadapter.generate_replies(
            policy, byte_tokenizer(), [[{"role": "user", "content": "Thing 3?"}]], max_new_tokens=8, batch_size=1
        )
    assert lines["scale=0"] == " ".join(of_base.splitlines()) or of_base.startswith(lines["scale=0"])


@pytest.mark.slow
def test_read_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """By hand: base .2 and .9 in the mean; SFT .65 and .4 over two domains and two seeds, Q-Adapter .5 and .95."""
    numbers = [
        ("harmless", "base", None, 0.1, 1.0),
        ("harmless", "sft", 0, 0.8, 0.5),
        ("harmless", "sft", 1, 1.0, 0.7),
        ("harmless", "q-adapter", 0, 0.75, 1.0),
        ("academy", "base", None, 0.3, 0.8),
        ("academy", "sft", 0, 0.5, 0.1),
        ("academy", "sft", 1, 0.3, 0.3),
        ("academy", "q-adapter", 0, 0.25, 0.9),
    ]
    rows = [
        Row(domain, method, seed, {"adaptation/score": learnt, "retention/mean": kept})
        for domain, method, seed, learnt, kept in numbers
    ]
    build_report(rows, title="Test", data={}, config={}, out=tmp_path)
    example("read_report", str(tmp_path))
    table = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines()[2:]}
    assert list(table) == ["q-adapter", "sft"]
    assert table == {"q-adapter": ["+0.300", "-0.050", "+0.300"], "sft": ["+0.450", "+0.500", "-0.050"]}
