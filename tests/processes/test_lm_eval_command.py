"""lm-eval's command line with a Q-Adapter's folder in place of a model's name."""

from __future__ import annotations

import inspect
import json
import logging
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval._cli.utils import key_val_to_dict
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from peft import LoraConfig
from transformers import AutoModelForCausalLM

from qadapter.config.model import ModelSettings
from qadapter.errors import QAdapterError
from qadapter.evaluation.lm_eval.catalog import expand_suites, find_tasks
from qadapter.evaluation.lm_eval.command import main
from qadapter.evaluation.lm_eval.harness import evaluate_tasks
from qadapter.evaluation.lm_eval.model import PolicyLM
from qadapter.files.artifacts import write_json_lines
from qadapter.policy.loading import load_base
from qadapter.policy.model import QAdapterForCausalLM
from qadapter.policy.objective import Objective
from tests.processes.test_served_model import hub_with
from tests.support.made_up_benchmarks import write_papers_suite
from tests.support.tiny_chat import TEMPLATE, byte_tokenizer, tiny_llama

LORA = LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)


@pytest.fixture
def small_index(monkeypatch) -> None:
    """lm-eval indexes the folders that the paper's suite needs and the one it is given, not all of its 14,000 files."""
    names, _ = expand_suites(["paper_suite"])

    def manager(include_path: Any, include_defaults: bool = True, **options: Any) -> TaskManager:
        if include_defaults:
            include_path = [*find_tasks(names).official, include_path]
        return TaskManager(include_path=include_path, include_defaults=False, **options)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", manager)


def save_policy(folder: Path, **size: int) -> QAdapterForCausalLM:
    """Write `base` and `adapter` into a folder."""
    tiny_llama(**size).save_pretrained(folder / "base")
    byte_tokenizer().save_pretrained(folder / "base")
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    policy = QAdapterForCausalLM.from_base(base, LORA, Objective.preset("residual"))
    policy.save_pretrained(folder / "adapter")
    return policy


def require_bitsandbytes() -> None:
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is an extra: pip install qadapter-pipeline[quantized]")


def in_8_bits(folder: Path) -> QAdapterForCausalLM:
    """What `save_policy` wrote, loaded as the pipeline loads it."""
    require_bitsandbytes()
    base, _ = load_base(folder / "base", ModelSettings(pretrained="x", quantization="int8"))
    return QAdapterForCausalLM.from_pretrained(folder / "adapter", base)


def bits_per_byte(folder: Path, model: QAdapterForCausalLM) -> float:
    scores = evaluate_tasks(model, byte_tokenizer(), ["some_bits_per_byte"], data=folder)
    return scores.metrics["some_bits_per_byte/bits_per_byte"]


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [[], ["load_in_8bit=True", "dtype=float32"]])
def test_a_saved_adapter_on_the_command_line_scores_as_in_memory(tmp_path, capsys, small_index, arguments) -> None:
    """In the precision that is asked for, with the batch size that lm-eval finds itself."""
    policy = save_policy(tmp_path, hidden=64)
    write_json_lines(tmp_path / "benchmarks" / "some_text.jsonl", [{"text": "a few words"}, {"text": "and a few more"}])
    whole, halved = bits_per_byte(tmp_path, policy), bits_per_byte(tmp_path, in_8_bits(tmp_path))
    assert abs(whole - halved) > 1e-3
    adapter = ["--model_args", f"pretrained={tmp_path / 'adapter'}", *arguments]
    task = ["--tasks", "some_bits_per_byte", "--data", str(tmp_path), "--batch_size", "auto", "--max_batch_size", "4"]
    assert main(["run", "--model", "qadapter", *adapter, *task]) == 0
    printed = re.search(r"bits_per_byte\|[^|]*\|\s*([\d.]+)", capsys.readouterr().out)
    assert printed is not None
    assert float(printed[1]) == pytest.approx(halved if arguments else whole, abs=1e-4)


def test_the_dial_is_a_model_argument(tmp_path) -> None:
    """As the command line hands it over, for a Q-Adapter and for a plain adapter beside it."""
    policy = save_policy(tmp_path)
    policy.peft_model.save_pretrained(str(tmp_path / "plain"))
    ids = torch.arange(8, 16)[None]
    arguments = key_val_to_dict(f"pretrained={tmp_path / 'adapter'},dial=scale=0.5")
    dialled = PolicyLM(**arguments, tokenizer=byte_tokenizer()).model
    with torch.no_grad():
        expected = policy(input_ids=ids, dial="scale=0.5").logits
        torch.testing.assert_close(dialled(input_ids=ids).logits, expected)
        assert not torch.allclose(policy(input_ids=ids).logits, expected, atol=1e-3)
        plain = PolicyLM(str(tmp_path / "plain"), dial="q-weight=0.5", tokenizer=byte_tokenizer()).model
        expected = policy(input_ids=ids, dial="q-weight=0.5").logits.log_softmax(-1)
        torch.testing.assert_close(plain(input_ids=ids).logits.log_softmax(-1), expected)
    with pytest.raises(QAdapterError, match="expected scale=VALUE or q-weight=VALUE"):
        PolicyLM(str(tmp_path / "adapter"), dial="half", tokenizer=byte_tokenizer())


@pytest.mark.slow
def test_an_official_task_on_local_rows(tmp_path, capsys, small_index) -> None:
    """BBH's own definition on the items of a folder, one task with chat template and one without."""
    policy = save_policy(tmp_path, context=6000, layers=1)
    folders = {"--official_data": tmp_path / "official", "--data": tmp_path / "local" / "benchmarks"}
    rows = [{"input": f"Is {n} odd?", "target": "Yes" if n % 2 else "No"} for n in range(4)]
    for folder in folders.values():
        for name in ("navigate", "sports_understanding"):
            write_json_lines(folder / "bbh" / f"{name}.jsonl", rows)
    tasks = ["leaderboard_bbh_navigate", "leaderboard_bbh_sports_understanding"]
    plain = ["--plain_tasks", tasks[1]]
    official = folders["--official_data"]
    expected = evaluate_tasks(
        policy, byte_tokenizer(), tasks, official_data=official, plain_tasks=[tasks[1]], batch_size=1, limit=4
    )
    adapter = f"pretrained={tmp_path / 'adapter'}"
    command = ["run", "--model", "qadapter", "--model_args", adapter, "--tasks", *tasks, *plain]
    template = ["--apply_chat_template", "--fewshot_as_multiturn"]
    for flag, given in (("--official_data", official), ("--data", tmp_path / "local")):
        out = tmp_path / f"out{flag}"
        outputs = ["--output_path", str(out), "--log_samples"]
        assert main([*command, flag, str(given), *template, *outputs]) == 0
        assert capsys.readouterr().out.count("|acc_norm") == 2
        for name in tasks:
            (file,) = out.rglob(f"samples_{name}_*.jsonl")
            samples = sorted(map(json.loads, file.read_text().splitlines()), key=lambda one: one["doc_id"])
            assert [one["acc_norm"] for one in samples] == [item["score"] for item in expected.samples[name]]
            prompts = [one["arguments"]["gen_args_0"]["arg_0"] for one in samples]
            assert prompts == [item["prompt"] for item in expected.samples[name]]
            assert ["<|user|>" in one for one in prompts] == [name != tasks[1]] * 4


def test_the_papers_suite_is_two_commands(capsys, monkeypatch) -> None:
    given: list[list[str]] = []
    monkeypatch.setattr("qadapter.evaluation.lm_eval.command.cli_evaluate", lambda: given.append(list(sys.argv)))
    model = ["run", "--model", "qadapter", "--model_args", "pretrained=x"]
    assert (
        main([*model, "--apply_chat_template", "a", "--limit", "2", "--fewshot_as_multiturn", "--tasks=paper_suite"])
        == 0
    )
    templated, plain = given
    assert plain[:9] == ["lm_eval", *model, "--limit", "2", "--include_path"]
    assert plain[10:] == ["--tasks", "mmlu"]
    assert templated[6:11] == ["--apply_chat_template", "a", "--limit", "2", "--fewshot_as_multiturn"]
    assert templated[13:] == ["--tasks", "gsm8k_cot,leaderboard_mmlu_pro,leaderboard_bbh,leaderboard_ifeval"]


@pytest.mark.slow
def test_the_papers_suite_on_the_command_line(tmp_path, small_index) -> None:
    """Both of its commands through lm-eval's own parser, the base in 8 bits: the prompts and scores of the pipeline."""
    save_policy(tmp_path, hidden=64, context=6000, layers=1)
    write_papers_suite(tmp_path / "official")
    expected = evaluate_tasks(
        in_8_bits(tmp_path),
        byte_tokenizer(),
        ["paper_suite"],
        official_data=tmp_path / "official",
        limit=1,
        max_gen_toks=4,
        batch_size=8,
    )
    model = ["--model", "qadapter", "--model_args", f"pretrained={tmp_path / 'adapter'}", "load_in_8bit=True"]
    suite = ["--tasks", "paper_suite", "--apply_chat_template", "--fewshot_as_multiturn"]
    short = ["--official_data", str(tmp_path / "official"), "--limit", "1", "--gen_kwargs", "max_gen_toks=4"]
    written = ["--output_path", str(tmp_path / "out"), "--log_samples", "--batch_size", "8"]
    assert main(["run", *model, *suite, *short, *written]) == 0
    templated, plain = (json.loads(file.read_text()) for file in sorted((tmp_path / "out").rglob("results_*.json")))
    assert (templated["chat_template"], plain["chat_template"]) == (TEMPLATE, None)
    assert (templated["fewshot_as_multiturn"], plain["fewshot_as_multiturn"]) == (True, None)
    assert {*templated["configs"], *plain["configs"]} == set(expected.samples)
    assert len(plain["configs"]) == 57
    assert templated["n-shot"]["gsm8k_cot"] == 8
    assert templated["n-shot"]["leaderboard_mmlu_pro"] == 5
    assert {templated["n-shot"][name] for name in templated["configs"] if "_bbh_" in name} == {3}
    for results, name, metric, key in [
        (plain, "mmlu", "acc,none", "mmlu/acc"),
        (templated, "gsm8k_cot", "exact_match,strict-match", "gsm8k_cot/exact_match.strict-match"),
        (templated, "leaderboard_mmlu_pro", "acc,none", "leaderboard_mmlu_pro/acc"),
        (templated, "leaderboard_bbh", "acc_norm,none", "leaderboard_bbh/acc_norm"),
        (templated, "leaderboard_ifeval", "prompt_level_strict_acc,none", "leaderboard_ifeval/prompt_level_strict_acc"),
    ]:
        assert results["results"][name][metric] == pytest.approx(expected.metrics[key], abs=1e-9)
    for name, items in expected.samples.items():
        (file,) = (tmp_path / "out").rglob(f"samples_{name}_2*.jsonl")
        sample = json.loads(file.read_text().splitlines()[0])
        assert sample["arguments"]["gen_args_0"]["arg_0"] == items[0]["prompt"]


@pytest.mark.slow
def test_a_tokenizer_without_template_is_refused_before_scoring(tmp_path, capsys, small_index, monkeypatch) -> None:
    """In a sentence, and before the part of the suite that is asked without one."""
    monkeypatch.setattr(logging, "raiseExceptions", False)  # an earlier test's handler may have lost its stream
    save_policy(tmp_path)
    (tmp_path / "base" / "chat_template.jinja").unlink()
    write_papers_suite(tmp_path / "official")
    model = ["--model", "qadapter", "--model_args", f"pretrained={tmp_path / 'adapter'}"]
    suite = ["--tasks", "paper_suite", "--apply_chat_template", "--official_data", str(tmp_path / "official")]
    assert main(["run", *model, *suite, "--output_path", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    refusal = printed.err.splitlines()[-1].removeprefix("error: ")
    assert refusal.startswith("The model's tokenizer has no chat template, and the evaluation asks")
    assert "`--plain_tasks`" in printed.err
    assert "Traceback" not in printed.err
    assert "|" not in printed.out  # no table of scores
    assert not (tmp_path / "out").exists()


def test_templated_prompts_get_no_special_tokens_by_command(tmp_path) -> None:
    """As in the pipeline, whose `apply_chat_template` says so when the model is made."""
    save_policy(tmp_path)
    commanded, piped = PolicyLM(str(tmp_path / "adapter")), PolicyLM(tiny_llama(), tokenizer=byte_tokenizer())
    assert commanded.add_bos_token is None
    assert piped.add_bos_token is None
    assert commanded.chat_template(True) == TEMPLATE
    assert commanded.add_bos_token is False
    in_pipeline = PolicyLM(tiny_llama(), tokenizer=byte_tokenizer(), apply_chat_template=True)
    assert in_pipeline.add_bos_token is False
    asked_for = PolicyLM(str(tmp_path / "adapter"), add_bos_token=True)
    asked_for.chat_template(True)
    assert asked_for.add_bos_token is True


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, {"torch.float32"}),
        ({"dtype": "bfloat16"}, {"torch.bfloat16"}),
        ({"load_in_8bit": True}, {"torch.float32", "torch.int8"}),
        ({"quantization": "int8", "dtype": "bfloat16"}, {"torch.bfloat16", "torch.int8"}),
        ({"load_in_4bit": True, "quantization": "nf4"}, {"torch.float32", "torch.uint8"}),
        ({"load_in_8bit": False, "quantization": "none"}, {"torch.float32"}),
    ],
)
def test_the_base_is_held_as_asked_for(tmp_path, arguments, expected) -> None:
    if len(expected) > 1:
        require_bitsandbytes()
    save_policy(tmp_path, hidden=64)
    policy = PolicyLM(str(tmp_path / "adapter"), **arguments).model
    frozen = [value for name, value in policy.peft_model.named_parameters() if "lora_" not in name]
    assert {str(value.dtype) for value in frozen} == expected


def test_base_and_tokenizer_have_the_given_revision(tmp_path, monkeypatch) -> None:
    policy = save_policy(tmp_path)
    first, second = hub_with(tmp_path / "hub", tmp_path / "base")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    other = tmp_path / "hub" / "models--owner--model" / "snapshots" / second
    tiny_llama(seed=1).save_pretrained(other)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "the second's"
    tokenizer.save_pretrained(other)
    found = {}
    for revision in (None, first, second):
        arguments = {} if revision is None else {"revision": revision, "allow_base_mismatch": revision == second}
        model = PolicyLM(str(tmp_path / "adapter"), base="owner/model", **arguments)
        embedding = model.model.get_input_embeddings().weight
        found[revision] = (torch.equal(embedding, policy.get_input_embeddings().weight), model.tokenizer.chat_template)
    assert found == {None: (True, TEMPLATE), first: (True, TEMPLATE), second: (False, "the second's")}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"load_in_8bits": True}, r"does not take 'load_in_8bits' \(did you mean 'load_in_8bit'\?\).*load_in_4bit"),
        ({"peft": "x", "parallelize": True}, "does not take 'peft', 'parallelize': it would make no difference"),
        ({"dtype": "half"}, "dtype is 'half'. Give auto, float32, bfloat16 or float16"),
        ({"quantization": "int4"}, "quantization is 'int4'. Give none, int8 or nf4"),
        ({"load_in_8bit": True, "load_in_4bit": True}, "cannot be both int8 and nf4"),
        ({"load_in_8bit": True, "quantization": "none"}, "cannot be both int8 and none"),
    ],
)
def test_arguments_that_would_be_ignored_are_refused_by_name(tmp_path, arguments, message) -> None:
    with pytest.raises(QAdapterError, match=message):
        PolicyLM(str(tmp_path / "nowhere"), **arguments)


def test_every_argument_of_lm_evals_model_is_used_or_refused(tmp_path) -> None:
    """What `hf` does only while it loads a model itself is refused here; for a model in memory loading is, too."""
    own = set(inspect.signature(HFLM.__init__).parameters) - {"self", "kwargs"}
    taken = {"pretrained", "device", "tokenizer", "batch_size", "max_batch_size", "max_length", "truncation"}
    taken |= {"logits_cache", "softmax_dtype", "mixed_precision_dtype", "add_bos_token", "prefix_token_id"}
    taken |= {"enable_thinking", "think_end_token", "chat_template_args", "dtype", "revision", "trust_remote_code"}
    assert taken < own
    for name in own - taken:
        with pytest.raises(QAdapterError, match=f"does not take '{name}'"):
            PolicyLM(str(tmp_path), **{name: True})
    for name in taken - {"pretrained", "dtype"}:
        with pytest.raises(QAdapterError, match="is no adapter"):
            PolicyLM(str(tmp_path), **{name: None})
    for name in ("base", "dtype", "load_in_8bit", "revision"):
        with pytest.raises(QAdapterError, match=f"does not take '{name}'"):
            PolicyLM(tiny_llama(), tokenizer=byte_tokenizer(), **{name: "x"})
    with pytest.raises(QAdapterError, match="--model_args pretrained=FOLDER"):
        PolicyLM(batch_size=1)


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
    monkeypatch.setattr("qadapter.evaluation.lm_eval.command.cli_evaluate", lambda: pytest.fail("lm-eval was called"))
    assert main(["run", "--model", "qadapter", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_folder_that_is_no_adapter_is_refused_in_one_sentence(tmp_path, capsys, monkeypatch) -> None:
    given: list[list[str]] = []

    def command() -> None:
        given.append(sys.argv)
        PolicyLM(str(tmp_path))

    monkeypatch.setattr("qadapter.evaluation.lm_eval.command.cli_evaluate", command)
    before = list(sys.argv)
    assert main(["run", "--tasks", "toy_facts,toy_sums", "x_bits_per_byte", "--data", str(tmp_path)]) == 2
    assert "is no adapter" in capsys.readouterr().err
    assert sys.argv == before
    assert given[0][:3] == ["lm_eval", "run", "--include_path"]
    assert given[0][4:] == ["--tasks", "toy_facts,toy_sums,x_bits_per_byte"]
