"""lm-eval's own tasks, with their official definitions, on local files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from lm_eval.tasks import TaskManager

from flows.running.run_request import RunRequest
from qadapter.config.evaluation import RetentionSettings
from qadapter.config.model import ModelSettings
from qadapter.errors import QAdapterError
from qadapter.evaluation.lm_eval.catalog import check_tasks, expand_suites, find_tasks, official_tasks
from qadapter.evaluation.lm_eval.harness import evaluate_tasks
from qadapter.evaluation.measure import measure_retention
from qadapter.files.artifacts import write_json_lines
from tests.support.made_up_benchmarks import write_papers_suite
from tests.support.tiny_chat import byte_tokenizer, tiny_llama

BBH = ["boolean_expressions", "navigate", "object_counting"]


@pytest.fixture(scope="module")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture(scope="module")
def model():
    """A random model whose context holds eight worked examples of GSM8K in bytes."""
    return tiny_llama(context=6000, layers=1)


@pytest.mark.slow
def test_bbh_on_real_rows(model, tokenizer, shared_data) -> None:
    """Three worked examples as turns, the official description, the file's own questions in order."""
    names = [f"leaderboard_bbh_{name}" for name in BBH]
    scores = evaluate_tasks(model, tokenizer, names, data=shared_data, limit=4)
    assert scores.shortened == 0
    for name in BBH:
        examples = json.loads((shared_data / "benchmarks" / "bbh" / f"{name}.json").read_text())["examples"][:4]
        items = scores.samples[f"leaderboard_bbh_{name}"]
        assert [item["target"] for item in items] == [example["target"] for example in examples]
        for item, example in zip(items, examples, strict=True):
            assert item["prompt"].count("<|user|>") == 4
            assert item["prompt"].count("<|system|>") == 1
            assert item["prompt"].endswith(f"<|user|>Q: {example['input']}\nA:<eos><|assistant|>")
        share = sum(item["scores"]["acc_norm"] for item in items) / 4
        assert scores.metrics[f"leaderboard_bbh_{name}/acc_norm"] == share


def test_gsm8k_on_real_rows(model, tokenizer, shared_data) -> None:
    scores = evaluate_tasks(model, tokenizer, ["gsm8k_cot"], data=shared_data, limit=3, max_gen_toks=8)
    rows = [json.loads(line) for line in (shared_data / "benchmarks" / "gsm8k.jsonl").read_text().splitlines()[:3]]
    items = scores.samples["gsm8k_cot"]
    assert [item["target"] for item in items] == [row["answer"].split("####")[1].strip() for row in rows]
    assert all(item["prompt"].count("<|assistant|>") == 9 for item in items)
    assert items[0]["prompt"].endswith(f"Q: {rows[0]['question']}\nA:<eos><|assistant|>")
    expected = {"gsm8k_cot/exact_match.strict-match", "gsm8k_cot/exact_match.flexible-extract"}
    assert set(scores.metrics) == expected
    assert set(scores.stderr) == expected
    assert scores.shortened == 0


@pytest.fixture(scope="module")
def made_up(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("official")
    write_papers_suite(folder)
    return folder


@pytest.mark.slow
def test_the_papers_suite_in_the_papers_settings(model, tokenizer, made_up) -> None:
    scores = evaluate_tasks(model, tokenizer, ["paper_suite"], official_data=made_up, limit=1, max_gen_toks=4)
    headline = {
        "mmlu/acc",
        "gsm8k_cot/exact_match.strict-match",
        "leaderboard_mmlu_pro/acc",
        "leaderboard_bbh/acc_norm",
        "leaderboard_ifeval/prompt_level_strict_acc",
    }
    assert headline <= set(scores.metrics)
    subjects = [name for name in scores.samples if name.startswith("mmlu_")]
    assert len(subjects) == 57
    assert len([name for name in scores.samples if name.startswith("leaderboard_bbh_")]) == 24
    mean = sum(scores.metrics[f"{name}/acc"] for name in subjects) / 57
    assert scores.metrics["mmlu/acc"] == pytest.approx(mean)
    assert "<|user|>" not in scores.samples["mmlu_anatomy"][0]["prompt"]
    assert scores.samples["leaderboard_mmlu_pro"][0]["prompt"].count("<|user|>") == 6
    assert scores.samples["leaderboard_ifeval"][0]["prompt"] == "<bos><|user|>No commas.<eos><|assistant|>"


def test_the_suite_is_known_to_the_preflight() -> None:
    names, plain = expand_suites(["toy_facts", "paper_suite", "mmlu"])
    suite = ["mmlu", "gsm8k_cot", "leaderboard_mmlu_pro", "leaderboard_bbh", "leaderboard_ifeval"]
    assert names == ["toy_facts", *suite]
    assert plain == ["mmlu"]
    assert expand_suites(["toy_facts", "paper_suite"], ["toy_facts"])[1] == ["toy_facts", "mmlu"]
    assert expand_suites(["paper_suite"], ["leaderboard_bbh"])[1] == ["mmlu", "leaderboard_bbh"]
    assert expand_suites(["toy_facts", "paper_suite"], ["paper_suite"]) == (["toy_facts", *suite], suite)


def test_official_tasks_are_found_without_indexing_everything() -> None:
    """The quick catalogue knows what lm-eval's own index knows of the folders the paper's suite needs."""
    found = find_tasks(["toy_facts", "leaderboard_bbh", "gsm8k_cot", "mmlu"])
    assert found.local == ("toy_facts",)
    assert [folder.name for folder in found.official] == ["gsm8k", "bbh_mc", "default"]
    index = TaskManager(include_path=list(found.official), include_defaults=False)
    names = {*index.all_subtasks, *index.all_groups}
    assert names <= set(official_tasks().files)
    assert {"mmlu_anatomy", "mmlu_stem", "leaderboard_bbh_navigate", "gsm8k_cot"} <= names
    assert "chain_of_thought" in official_tasks().tags


def check(tasks: list[str], official_data: Path) -> None:
    """The preflight of an experiment with these tasks."""
    changes = {"evaluation.retention.tasks": tasks, "evaluation.retention.official_data": str(official_data)}
    RunRequest("x", "smoke", None, changes).check()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("files", "task", "message"),
    [
        ({"gsm8k.jsonl": [{"question": "1 + 1?"}]}, "gsm8k_cot", "gsm8k.jsonl: line 1 has no 'answer'"),
        (
            {"mmlu_pro/test.jsonl": [{"question": "?", "options": ["a"], "answer": "A", "answer_index": 0}]},
            "leaderboard_mmlu_pro",
            "shows 5 worked examples from the split 'validation'.*mmlu_pro/validation.jsonl",
        ),
        (
            {"gsm8k/test.jsonl": [{"question": "1?", "answer": "#### 1"}], "gsm8k/train.jsonl": [{"question": "1?"}]},
            "gsm8k",
            "gsm8k/train.jsonl: line 1 has no 'answer'",
        ),
    ],
)
def test_faulty_official_files_are_refused_before_anything_runs(
    files, task, message, model, tokenizer, tmp_path
) -> None:
    for name, rows in files.items():
        write_json_lines(tmp_path / name, rows)
    with pytest.raises(QAdapterError, match=message):
        check(["toy_facts", task], tmp_path)
    with pytest.raises(QAdapterError, match=message):
        evaluate_tasks(model, tokenizer, [task], official_data=tmp_path)


def test_absent_official_files_may_be_the_hubs(model, tokenizer, tmp_path) -> None:
    check(["leaderboard_bbh_navigate"], tmp_path)
    with pytest.raises(QAdapterError, match=r"leaderboard_bbh_navigate could not be loaded: .*`official_data`"):
        evaluate_tasks(model, tokenizer, ["leaderboard_bbh_navigate"], official_data=tmp_path)


@pytest.mark.slow
def test_a_suites_files_are_looked_at_before_anything_runs(made_up, tmp_path, caplog) -> None:
    """Each of the 57 subjects of MMLU, too: one of them is faulty in a copy."""
    check(["paper_suite"], made_up)
    assert [record for record in caplog.records if record.name.startswith("lm_eval")] == []
    shutil.copytree(made_up, tmp_path / "copy")
    write_json_lines(tmp_path / "copy/cais/mmlu/virology/test.jsonl", [{"question": "?", "choices": ["a", "b"]}])
    with pytest.raises(QAdapterError, match=r"virology/test\.jsonl: line 1 has no 'answer'"):
        check(["paper_suite"], tmp_path / "copy")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "members"),
    [
        ("chain_of_thought", "gsm8k_cot, .*gsm8k_platinum_cot"),
        ("cieacova", r"cieacova_choice, cieacova_word\.$"),
        ("libra_simple_information_retrieval", "passkey, passkey_with_librusec"),
        ("score_robustness", "score_prompt_robustness_agieval, .*score_non_greedy_robustness_math"),  # of groups
    ],
)
def test_names_without_a_score_are_refused_before_a_run(name, members, tmp_path) -> None:
    """A tag or a group that is not averaged: nothing would be told to be forgotten, and it would be in no mean."""
    message = f"'{name}' contains several .*Name those tasks in its place: .*{members}"
    with pytest.raises(QAdapterError, match=message):
        check_tasks(["toy_facts", name])
    with pytest.raises(QAdapterError, match=message):
        measure_retention(
            tmp_path / "there is no base",
            None,
            None,
            model=ModelSettings(pretrained="x"),
            settings=RetentionSettings(tasks=("toy_facts", name)),
            benchmarks=None,
            old_texts=None,
            max_length=64,
            out=tmp_path,
        )


def test_a_score_of_a_whole_corpus_in_percent_is_refused() -> None:
    """A BLEU of 24 would be all of its mean with an accuracy of .6; `careqa_open` has its own BLEU, from 0 to 1."""
    with pytest.raises(QAdapterError, match=r"'wmt14-en-fr' is scored by bleu, from 0 to 100 for all answers together"):
        check_tasks(["toy_facts", "wmt14-en-fr"])
    check_tasks(["careqa_open"])


def test_groups_that_are_averaged_have_a_score() -> None:
    check_tasks(["paper_suite", "mmlu_stem", "leaderboard", "bbh"])


@pytest.mark.slow
def test_the_members_of_a_tag_are_lm_evals() -> None:
    tag = "bigbench_generate_until"
    folders = find_tasks([tag]).official
    expected = TaskManager(include_path=list(folders), include_defaults=False).task_index[tag].tags
    with pytest.raises(QAdapterError) as caught:
        check_tasks([tag])
    named = str(caught.value).partition("in its place: ")[2].removesuffix(".").split(", ")
    assert named == sorted(expected)
    assert len(named) > 100


def test_the_pipeline_reads_the_folder_that_is_named(model, tokenizer, shared_data, tmp_path) -> None:
    """GSM8K and a task of BBH with the official definitions, through the stage's own function."""
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    tasks = ["gsm8k_cot", "leaderboard_bbh_navigate"]
    measure_retention(
        tmp_path / "base",
        None,
        None,
        model=ModelSettings(pretrained=str(tmp_path / "base")),
        settings=RetentionSettings(tasks=tuple(tasks), limit=2, max_new_tokens=8, batch_size=2),
        benchmarks=None,
        old_texts=None,
        max_length=64,
        out=tmp_path,
        official_data=shared_data / "benchmarks",
    )
    items = [json.loads(line) for line in (tmp_path / "items.jsonl").read_text().splitlines()]
    assert [item["task"] for item in items] == [task for task in tasks for _ in range(2)]
    rows = [json.loads(line) for line in (shared_data / "benchmarks" / "gsm8k.jsonl").read_text().splitlines()[:2]]
    assert [item["target"] for item in items[:2]] == [row["answer"].split("####")[1].strip() for row in rows]
    assert "retention/mean" in json.loads((tmp_path / "metrics.json").read_text())


def test_a_missing_folder_is_refused_before_anything_runs(tmp_path) -> None:
    with pytest.raises(QAdapterError, match=r"evaluation\.retention\.official_data: .*nowhere.* is no folder"):
        RunRequest("x", "smoke", None, {"evaluation.retention.official_data": str(tmp_path / "nowhere")}).check()
