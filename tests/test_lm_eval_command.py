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


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--official_data", "--data"])
def test_an_official_task_on_local_rows(tmp_path, capsys, flag: str) -> None:
    """BBH's own definition on the items of a folder, one task with chat template and one without."""
    tokenizer = byte_tokenizer()
    tiny_llama(context=6000, layers=1).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    policy = QAdapterForCausalLM.from_base(base, LORA, Objective.preset("residual"))
    policy.save_pretrained(tmp_path / "adapter")
    folder = tmp_path / "local" / ("benchmarks" if flag == "--data" else "")
    (folder / "bbh").mkdir(parents=True)
    rows = [{"input": f"Is {n} odd?", "target": "Yes" if n % 2 else "No"} for n in range(4)]
    for name in ("navigate", "sports_understanding"):
        (folder / "bbh" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tasks = ["leaderboard_bbh_navigate", "leaderboard_bbh_sports_understanding"]
    plain = ["--plain_tasks", tasks[1]]
    expected = evaluate_tasks(
        policy, tokenizer, tasks, official_data=folder, plain_tasks=[tasks[1]], batch_size=1, limit=4
    )
    adapter = f"pretrained={tmp_path / 'adapter'}"
    command = ["run", "--model", "qadapter", "--model_args", adapter, "--tasks", *tasks, *plain]
    outputs = ["--output_path", str(tmp_path / "out"), "--log_samples"]
    template = ["--apply_chat_template", "--fewshot_as_multiturn"]
    assert main([*command, flag, str(tmp_path / "local"), *template, *outputs]) == 0
    assert capsys.readouterr().out.count("|acc_norm") == 2
    for name in tasks:
        (file,) = (tmp_path / "out").rglob(f"samples_{name}_*.jsonl")
        samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda one: one["doc_id"])
        assert [one["acc_norm"] for one in samples] == [item["score"] for item in expected.samples[name]]
        prompts = [one["arguments"]["gen_args_0"]["arg_0"] for one in samples]
        assert prompts == [item["prompt"] for item in expected.samples[name]]
        assert ["<|user|>" in one for one in prompts] == [name != tasks[1]] * 4


def test_the_papers_suite_is_two_commands(capsys, monkeypatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr("qadapter.evaluation.__main__.cli_evaluate", lambda: given.append(list(sys.argv)))
    model = ["run", "--model", "qadapter", "--model_args", "pretrained=x"]
    assert (
        main([*model, "--apply_chat_template", "a", "--limit", "2", "--fewshot_as_multiturn", "--tasks=paper_suite"])
        == 0
    )
    plain, templated = given
    assert plain[:9] == ["lm_eval", *model, "--limit", "2", "--include_path"]
    assert plain[10:] == ["--tasks", "mmlu"]
    assert templated[6:11] == ["--apply_chat_template", "a", "--limit", "2", "--fewshot_as_multiturn"]
    assert templated[13:] == ["--tasks", "gsm8k_cot,leaderboard_mmlu_pro,leaderboard_bbh,leaderboard_ifeval"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "gsm8k_cott"], "gsm8k_cot"),
        (["--tasks", "toy_facts"], "Give --data"),
        (["--tasks", "gsm8k_cot", "--data", "nowhere"], "--data: there is no folder nowhere"),
        (["--tasks", "gsm8k_cot", "--data", ".", "--include_path", "x"], "--data and --include_path were both given"),
    ],
)
def test_what_cannot_work_is_refused_before_a_model_is_loaded(arguments, message, capsys, monkeypatch) -> None:
    monkeypatch.setattr("qadapter.evaluation.__main__.cli_evaluate", lambda: pytest.fail("lm-eval was called"))
    assert main(["run", "--model", "qadapter", *arguments]) == 1
    assert message in capsys.readouterr().err


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
    assert given[0][:3] == ["lm_eval", "run", "--include_path"]
    assert given[0][4:] == ["--tasks", "toy_facts,toy_sums,x_bits_per_byte"]
