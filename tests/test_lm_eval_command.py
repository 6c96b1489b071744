"""lm-eval's command line with a Q-Adapter's folder in place of a model's name."""

from __future__ import annotations

import json
import re
import sys

import pytest
from peft import LoraConfig
from tiny_chat import byte_tokenizer, tiny_llama
from transformers import AutoModelForCausalLM

from qadapter.evaluation.__main__ import main
from qadapter.evaluation.harness import evaluate_tasks
from qadapter.evaluation.lm_eval_model import PolicyLM
from qadapter.objective import Objective
from qadapter.policy import QAdapterForCausalLM

LORA = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)


@pytest.mark.slow
def test_a_saved_adapter_on_the_command_line_scores_as_in_memory(tmp_path, capsys) -> None:
    tokenizer = byte_tokenizer()
    tiny_llama().save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    policy = QAdapterForCausalLM.from_base(base, LORA, Objective.preset("residual"))
    policy.save_pretrained(tmp_path / "adapter")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "some_text.jsonl").write_text(json.dumps({"text": "a few words"}) + "\n")
    expected = evaluate_tasks(policy, tokenizer, ["some_bits_per_byte"], data=tmp_path).metrics
    adapter = f"pretrained={tmp_path / 'adapter'}"
    task = ["--tasks", "some_bits_per_byte", "--data", str(tmp_path), "--batch_size", "2"]
    assert main(["run", "--model", "qadapter", "--model_args", adapter, *task]) == 0
    printed = re.search(r"bits_per_byte\|[^|]*\|\s*([\d.]+)", capsys.readouterr().out)
    assert printed is not None
    assert float(printed[1]) == pytest.approx(expected["some_bits_per_byte/bits_per_byte"], abs=1e-4)


def test_a_folder_that_is_no_adapter_is_refused_in_one_sentence(tmp_path, capsys, monkeypatch) -> None:
    given: list[list[str]] = []

    def command() -> None:
        given.append(sys.argv)
        PolicyLM(str(tmp_path))

    monkeypatch.setattr("qadapter.evaluation.__main__.cli_evaluate", command)
    before = list(sys.argv)
    assert main(["run", "--tasks", "toy_facts,toy_sums", "x_bits_per_byte", "--data", str(tmp_path)]) == 1
    assert "is no Q-Adapter" in capsys.readouterr().err
    assert sys.argv == before
    assert given[0][:4] == ["lm_eval", "run", "--tasks", "toy_facts,toy_sums,x_bits_per_byte"]
    assert given[0][4] == "--include_path"
