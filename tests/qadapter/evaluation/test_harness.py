"""lm-eval over a ready module: the numbers, the tokens, the errors."""

from __future__ import annotations

import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from qadapter.errors import QAdapterError
from qadapter.evaluation.benchmarks.items import read_items
from qadapter.evaluation.lm_eval import harness
from qadapter.evaluation.lm_eval.catalog import find_tasks
from qadapter.evaluation.lm_eval.definitions import BENCHMARKS, SUITES, local_tasks, render_definitions
from qadapter.evaluation.lm_eval.harness import check_tasks, evaluate_tasks
from qadapter.evaluation.lm_eval.model import PolicyLM
from qadapter.policy import scored_states
from tests.support.paths import PROJECT_ROOT
from tests.support.tiny_chat import KINDS, byte_tokenizer, teach, tiny_llama, tiny_policy

KNOWN = [("capital of Aru?", "Bel"), ("3 + 4?", "7"), ("colour of jade?", "green"), ("2 + 2?", "4")]


def write_benchmark(folder: Path, name: str, rows: list[dict]) -> None:
    (folder / "benchmarks").mkdir(exist_ok=True)
    (folder / "benchmarks" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def knowing(tokenizer):
    """A model that knows the four answers of KNOWN by heart."""
    model = tiny_llama(hidden=64)
    teach(model, tokenizer, KNOWN, steps=150)
    return model


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Facts: the four known ones and one wrongly keyed, so 4 of 5 are right."""
    folder = tmp_path_factory.mktemp("data")
    rows = [{"question": q, "answer": a} for q, a in KNOWN]
    write_benchmark(folder, "facts", [*rows, {"question": KNOWN[0][0], "answer": "no such place"}])
    write_benchmark(folder, "sums", [{"question": q, "answer": f" {a}\n"} for q, a in KNOWN])
    matching = [{"prompt": q, "choices": [a for _, a in KNOWN], "answer": place} for place, (q, _) in enumerate(KNOWN)]
    write_benchmark(folder, "helpful_reply_matching", matching)
    write_benchmark(folder, "helpful_text", [{"text": "a text of plain words"}, {"text": "ünd nöch einer"}])
    return folder


@pytest.mark.slow
def test_exact_answers_are_counted_with_their_standard_error(knowing, tokenizer, data) -> None:
    """4 of 5 right: mean .8, variance 5/4 · .8 · .2 = .2, standard error √(.2/5) = .2. White space does not count."""
    scores = evaluate_tasks(knowing, tokenizer, ["toy_facts", "toy_sums"], data=data)
    assert scores.metrics == {"toy_facts/exact_match": 0.8, "toy_sums/exact_match": 1.0}
    assert scores.stderr["toy_facts/exact_match"] == pytest.approx(0.2)
    assert scores.higher_is_better == {"toy_facts/exact_match": True, "toy_sums/exact_match": True}
    items = scores.samples["toy_facts"]
    assert [item["doc_id"] for item in items] == [0, 1, 2, 3, 4]
    assert [item["score"] for item in items] == [1, 1, 1, 1, 0]
    assert [item["response"] for item in items] == ["Bel", "7", "green", "4", "Bel"]
    assert items[4]["target"] == "no such place"
    assert items[0]["prompt"] == "<bos><|user|>capital of Aru?<eos><|assistant|>"


def test_limit_and_repetition(knowing, tokenizer, data) -> None:
    first = evaluate_tasks(knowing, tokenizer, ["toy_facts"], data=data, limit=2)
    assert len(first.samples["toy_facts"]) == 2
    assert first.metrics == evaluate_tasks(knowing, tokenizer, ["toy_facts"], data=data, limit=2).metrics


def test_a_task_can_have_its_own_limit(knowing, tokenizer, data) -> None:
    scores = evaluate_tasks(knowing, tokenizer, ["toy_facts", "toy_sums"], data=data, limit=3, limits={"toy_sums": 1})
    assert {task: len(items) for task, items in scores.samples.items()} == {"toy_facts": 3, "toy_sums": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_a_large_vocabulary_is_scored_at_the_answers_only(kind, tokenizer, data, monkeypatch) -> None:
    """Every likelihood as from whole logits, and no forward pass of the model that makes them."""
    policy, names = tiny_policy(kind, seed=3), ["helpful_reply_matching", "helpful_bits_per_byte"]
    whole = evaluate_tasks(policy, tokenizer, names, data=data, batch_size=3)
    monkeypatch.setattr(scored_states, "LARGE_VOCABULARY", 1)
    scored_states._usable.clear()
    calls = []
    monkeypatch.setattr(PolicyLM, "_model_call", lambda *_, **__: calls.append(1))
    few = evaluate_tasks(policy, tokenizer, names, data=data, batch_size=3)
    scored_states._usable.clear()
    assert not calls
    assert few.metrics == pytest.approx(whole.metrics, rel=1e-5)
    for name in names:
        assert [item["response"] for item in few.samples[name]] == [item["response"] for item in whole.samples[name]]


def test_multiple_choice_and_bits_per_byte(knowing, tokenizer, data) -> None:
    """Bits per byte by hand: -Σ log2 p(token | tokens before, <bos> first) over the texts, over their UTF-8 bytes."""
    scores = evaluate_tasks(knowing, tokenizer, ["helpful_reply_matching", "helpful_bits_per_byte"], data=data)
    assert scores.metrics["helpful_reply_matching/acc"] == 1.0
    item = scores.samples["helpful_reply_matching"][2]
    assert (item["response"], item["target"], item["scores"]["acc_norm"]) == ("green", "green", 1.0)

    nats, size = 0.0, 0
    for text in ["a text of plain words", "ünd nöch einer"]:
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False)]])
        with torch.no_grad():
            log_probs = knowing(ids).logits.log_softmax(-1)
        nats -= log_probs[0, :-1].gather(1, ids[0, 1:, None]).sum().item()
        size += len(text.encode())
    assert scores.metrics["helpful_bits_per_byte/bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-5)
    assert scores.higher_is_better["helpful_bits_per_byte/bits_per_byte"] is False
    assert scores.samples["helpful_bits_per_byte"][0]["response"] is None


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["knowing", *KINDS])
def test_same_scores_as_lm_evals_own_hf_model(kind, knowing, tokenizer, data, tmp_path) -> None:
    model = knowing if kind == "knowing" else tiny_policy(kind, seed=3)
    names = ["toy_facts", "helpful_reply_matching", "helpful_bits_per_byte"]
    ours = evaluate_tasks(model, tokenizer, names, data=data)
    render_definitions(tmp_path, names, data)
    theirs = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3),
        tasks=names,
        task_manager=TaskManager(include_path=str(tmp_path), include_defaults=False),
        apply_chat_template=True,
        bootstrap_iters=0,
    )
    for key, value in ours.metrics.items():
        task, _, metric = key.partition("/")
        assert value == pytest.approx(theirs["results"][task][f"{metric},none"], rel=1e-5), key


def test_an_items_score_is_of_the_metric_of_its_task() -> None:
    """F1 and exact match of two answer filters: the exact match of the first filter stands for the item."""
    records = [
        {"doc_id": 0, "filter": name, "metrics": ["f1", "exact_match"], "f1": 0.9, "exact_match": match,
         "arguments": [["question"]], "resps": [["x"]], "target": "y"}
        for name, match in (("strict", 0.0), ("flexible", 1.0))
    ]  # fmt: skip
    (item,) = harness._items(SimpleNamespace(OUTPUT_TYPE="generate_until"), records)
    assert item["score"] == 0.0
    assert item["scores"] == {
        "f1.strict": 0.9, "exact_match.strict": 0.0, "f1.flexible": 0.9, "exact_match.flexible": 1.0,
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_the_tokens_of_training(kind, tokenizer, data, monkeypatch) -> None:
    """What reaches `generate` is the template's token ids, one <bos> only, and the answer is `generate`'s own."""
    model = tiny_policy(kind, seed=3)
    seen: list[list[int]] = []
    original = PolicyLM._model_generate

    def spy(self, context, *args, attention_mask, **settings):
        seen.extend(row[mask.bool()].tolist() for row, mask in zip(context, attention_mask, strict=True))
        return original(self, context, *args, attention_mask=attention_mask, **settings)

    monkeypatch.setattr(PolicyLM, "_model_generate", spy)
    scores = evaluate_tasks(model, tokenizer, ["toy_facts"], data=data, max_gen_toks=12)
    expected, answers = [], []
    for item in read_items(data / "benchmarks" / "facts.jsonl", ["question"]):
        messages = [{"role": "user", "content": item["question"]}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]
        expected.append(ids)
        output = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=12, do_sample=False, pad_token_id=0)
        answers.append(tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True))
    assert sorted(seen) == sorted(expected)
    assert all(ids.count(tokenizer.bos_token_id) == 1 for ids in seen)
    assert [item["response"] for item in scores.samples["toy_facts"]] == answers
    assert len(set(answers)) > 1, "the model answers everything alike, so this test could not fail"


def test_training_mode_and_random_state_are_left_alone(tokenizer, data) -> None:
    model = tiny_llama().train()
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    evaluate_tasks(model, tokenizer, ["toy_facts"], data=data, max_gen_toks=2)
    assert model.training
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.slow
def test_overhead_beyond_the_models_work_is_below_a_second(tokenizer, tmp_path) -> None:
    """500 items, two tokens each, so the model itself costs next to nothing. Processor time: others are at work."""
    for name in ["facts", "sums", "howtos", "advice"]:
        write_benchmark(tmp_path, name, [{"question": f"{name} {i}", "answer": "-"} for i in range(125)])
    model = tiny_llama()
    tasks = ["toy_facts", "toy_sums", "toy_howtos", "toy_advice"]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # a second thread spins while it waits, which counts as processor time
    try:
        evaluate_tasks(model, tokenizer, tasks, data=tmp_path, max_gen_toks=2)  # warm
        start = time.process_time()
        evaluate_tasks(model, tokenizer, tasks, data=tmp_path, max_gen_toks=2)
        assert time.process_time() - start < 1
    finally:
        torch.set_num_threads(threads)


def test_too_long_prompts_are_counted_and_too_long_answers_refused(tokenizer, tmp_path) -> None:
    model = tiny_llama(context=64)
    write_benchmark(tmp_path, "facts", [{"question": "x" * n, "answer": "y"} for n in (5, 100, 100)])
    assert evaluate_tasks(model, tokenizer, ["toy_facts"], data=tmp_path, max_gen_toks=4).shortened == 2
    with pytest.raises(QAdapterError, match=r"write 64 tokens.*context holds 64.*smaller max_new_tokens"):
        evaluate_tasks(model, tokenizer, ["toy_facts"], data=tmp_path)
    rows = [{"prompt": "p", "choices": ["a" * 80, "b"], "answer": 0}]
    write_benchmark(tmp_path, "helpful_reply_matching", rows)
    with pytest.raises(QAdapterError, match=r"answer of 8\d tokens is longer than the model's context of 64"):
        evaluate_tasks(model, tokenizer, ["helpful_reply_matching"], data=tmp_path)


def test_a_tokenizer_without_template_is_refused_before_work(data) -> None:
    bare = byte_tokenizer()
    bare.chat_template = None
    with pytest.raises(QAdapterError, match=r"no chat template.*evaluation\.retention\.plain_tasks"):
        evaluate_tasks(tiny_llama(), bare, ["toy_facts"], data=data)
    scores = evaluate_tasks(tiny_llama(), bare, ["toy_facts"], data=data, apply_chat_template=False, max_gen_toks=2)
    assert scores.samples["toy_facts"][0]["prompt"] == KNOWN[0][0]


def test_unknown_tasks_come_with_the_nearest_names() -> None:
    with pytest.raises(
        QAdapterError, match=r"'toy_fact' \(did you mean .*toy_facts.*'gsm8k_coot' \(did you mean gsm8k_"
    ):
        check_tasks(["toy_fact", "gsm8k_coot"])
    with pytest.raises(QAdapterError, match="No evaluation task"):
        check_tasks([])


def test_missing_data_is_refused(tokenizer, data, tmp_path) -> None:
    with pytest.raises(QAdapterError, match="toy_facts reads its items from a data folder"):
        evaluate_tasks(tiny_llama(), tokenizer, ["toy_facts"])
    with pytest.raises(QAdapterError, match=r"howtos\.jsonl does not exist"):
        check_tasks(["toy_facts", "toy_howtos"], data)
    check_tasks(["toy_facts", "toy_howtos"])  # no folder given: only the names are checked


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '{"question": "q", "answer": "a"}\n{"question": "q"}\n{"answer": ""}\n',
            r"line 2 has no 'answer' \(and 1 more faults",
        ),
        ('{"question": "q", "ans', "line 1 is not JSON"),
        ("[1]\n", "line 1 holds list"),
        ("\n\n", "has no items"),
        (
            '{"question": "q", "answer": "a"}\n{"question": "où", "answer": "a"}\n'.encode("latin-1"),
            r"line 2 is not UTF-8 \(.* at byte 16\)\. Every item must be",
        ),
        ("[" * 100_000, "line 1 is not JSON"),
    ],
)
def test_faulty_benchmark_files_are_refused(content, message, tokenizer, tmp_path) -> None:
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks" / "facts.jsonl").write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(QAdapterError, match=message):
        check_tasks(["toy_facts"], tmp_path)
    with pytest.raises(QAdapterError, match=message):
        evaluate_tasks(tiny_llama(), tokenizer, ["toy_facts"], data=tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("b.json", '[{"question": "où"}]'.encode("latin-1"), r"the file is not UTF-8 \(.*\)\. Every item must be"),
        ("b.parquet", b"PAR1 and then nothing", r"the file is not Parquet \(.*\)\. Every item must be"),
        ("b.parquet", b"", r"the file is not Parquet \(.*\)\. Every item must be"),
    ],
)
def test_files_that_are_not_what_their_names_say_are_refused(name, content, message, tmp_path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(QAdapterError, match=message):
        read_items(tmp_path / name, ["question"])


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["plain", "with a byte-order mark"])
def test_characters_that_look_like_line_ends_are_text(mark, tmp_path) -> None:
    items = [{"question": f"a{end}b", "answer": "c"} for end in ("\u2028", "\u2029", "\x85", "\n")]
    lines = "\r\n".join(json.dumps(item, ensure_ascii=False) for item in items)
    (tmp_path / "b.jsonl").write_bytes(f"{mark}{lines}\r\n \r\n".encode())
    (tmp_path / "b.json").write_bytes(f"{mark}{json.dumps(items, ensure_ascii=False)}".encode())
    for name in ("b.jsonl", "b.json"):
        assert read_items(tmp_path / name, ["question", "answer"]) == items


def test_every_file_in_configs_is_loaded_or_included() -> None:
    """A config that nothing loads is dead: each is a task, or included by one."""
    found = [*BENCHMARKS.glob("*/*.yaml"), *SUITES.glob("*.yaml")]
    files = {file.name: yaml.safe_load(file.read_text().replace("!function ", "")) for file in found}
    included = {settings.get("include") for settings in files.values()}
    tasks = {file.name for file in local_tasks().values()}
    of_users = {"_choice.yaml", "_reply.yaml"}  # a user's own benchmark is made from one of these (test_own_benchmarks)
    assert tasks | (included - {None}) | of_users == set(files)
    assert len(tasks) >= 7


def test_a_template_for_many_benchmarks_serves_any_name(knowing, tokenizer, tmp_path) -> None:
    write_benchmark(tmp_path, "anything_text", [{"text": "abc"}])
    assert find_tasks(["anything_bits_per_byte"]).local == ("anything_bits_per_byte",)
    scores = evaluate_tasks(knowing, tokenizer, ["anything_bits_per_byte"], data=tmp_path)
    assert scores.metrics["anything_bits_per_byte/bits_per_byte"] > 0
    with pytest.raises(QAdapterError, match=r"other_text\.jsonl does not exist"):
        check_tasks(["other_bits_per_byte"], tmp_path)
    with pytest.raises(QAdapterError, match="Unknown evaluation task: '_bits_per_byte'"):
        check_tasks(["_bits_per_byte"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_automatic_batch_size_gives_the_same_scores(kind, tokenizer, data) -> None:
    model = tiny_policy(kind, seed=3)
    model.config.max_position_embeddings = 72  # what is tried is as long as the context
    settings = {"tasks": ["toy_facts", "helpful_reply_matching", "helpful_bits_per_byte"], "max_gen_toks": 8}
    automatic = evaluate_tasks(model, tokenizer, data=data, batch_size="auto", **settings)
    assert automatic.metrics == pytest.approx(evaluate_tasks(model, tokenizer, data=data, **settings).metrics)


def test_the_preflight_imports_neither_torch_nor_lm_eval() -> None:
    code = (
        "import sys; from qadapter.evaluation.lm_eval.catalog import check_tasks;"
        "check_tasks(['toy_facts', 'gsm8k_cot']);"
        "print(sorted({'torch', 'lm_eval', 'datasets'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PROJECT_ROOT)
    assert done.stdout.strip() == "[]", done.stderr
