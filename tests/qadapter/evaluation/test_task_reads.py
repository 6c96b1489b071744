"""All that a task reads is in the retention stage's key, and nothing that a user names becomes code."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import tasks.evaluate
from qadapter.config.experiment import load_experiment
from qadapter.errors import QAdapterError
from qadapter.evaluation.lm_eval import definitions
from qadapter.evaluation.lm_eval.catalog import check_tasks
from qadapter.evaluation.lm_eval.harness import evaluate_tasks
from qadapter.evaluation.lm_eval.official_files import local_files
from qadapter.evaluation.lm_eval.reads import reads_of
from qadapter.policy.loading import load_base
from qadapter.report.items import refuse_other_items
from qadapter.report.rows import Row
from tasks.stages.context import RunContext
from tasks.stages.stage_run import StageResult
from tasks.stages.store import StageStore
from tasks.train import Base
from tests.support.tiny_toy import MODEL, TinyToy, make_tiny_toy

QUIZ = """
task: quiz
output_type: multiple_choice
dataset_path: json
dataset_kwargs:
  data_files: {test: QUIZ_FILE}
test_split: test
doc_to_text: !function ask.text
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
metadata: {version: 1.0}
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> TinyToy:
    return make_tiny_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def quiz(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An own benchmark whose thirty questions lie outside; yields their file."""
    folder, questions = tmp_path / "benchmarks" / "quiz", tmp_path / "outside" / "quiz.jsonl"
    folder.mkdir(parents=True)
    questions.parent.mkdir()
    (folder / "quiz.yaml").write_text(QUIZ.replace("QUIZ_FILE", str(questions)))
    (folder / "ask.py").write_text("def text(doc):\n    return doc['question']\n")
    write_questions(questions, 0)
    monkeypatch.setattr(definitions, "BENCHMARKS", folder.parent)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    definitions.local_tasks.cache_clear()
    yield questions
    definitions.local_tasks.cache_clear()


def write_questions(file: Path, turned: int) -> None:
    """Thirty questions; the answers of the first `turned` are the other one."""
    rows = [
        {"question": f"is {n} even ?", "choices": ["yes", "no"], "answer": (n + (n < turned)) % 2} for n in range(30)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Stages:
    """The retention stage of a tiny base through a real store, without MLflow."""

    def __init__(self, toy: TinyToy, root: Path, monkeypatch: pytest.MonkeyPatch, names: list[str]) -> None:
        experiment = load_experiment("smoke", {"evaluation.retention.tasks": names})
        experiment = experiment.model_copy(update={"model": MODEL})
        self.context = RunContext(experiment, StageStore(root / "store"), None, "")  # type: ignore[arg-type]
        self.base = Base(str(toy.base), None, "tiny")
        self.computed = 0

        def stage(context: RunContext, name: str, *, module: str, config: Any, inputs: Any, compute: Any, **_: Any):
            output = context.store.run(name, module=module, config=config, inputs=inputs, compute=compute)
            self.computed += not output.cached
            return StageResult(output, "")

        monkeypatch.setattr(tasks.evaluate, "run_stage", stage)

    def run(self, trained: Any = None, base_retention: StageResult | None = None) -> StageResult:
        return tasks.evaluate._retention(self.context, self.base, trained, base_retention, None, None)


def test_a_changed_answer_in_an_outside_file_is_measured_anew(
    toy: TinyToy, quiz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten of thirty answers turned: the score moves by what the turned ones are worth, and is not the old one."""
    stages = Stages(toy, tmp_path, monkeypatch, ["quiz"])
    first = stages.run()
    assert (stages.run().output.key, stages.computed) == (first.output.key, 1)
    write_questions(quiz, 10)
    second = stages.run()
    assert stages.computed == 2
    items = [[json.loads(line) for line in (s.path / "items.jsonl").open()] for s in (first, second)]
    assert [a["target"] != b["target"] for a, b in zip(*items, strict=True)] == [True] * 10 + [False] * 20
    (tmp_path / "benchmarks/quiz/ask.py").write_text("def text(doc):\n    return 'tell me , ' + doc['question']\n")
    third = stages.run()
    assert stages.computed == 3
    assert json.loads((third.path / "items.jsonl").open().readline())["prompt"].count("tell me ,") == 1
    definition = tmp_path / "benchmarks/quiz/quiz.yaml"
    definition.write_text(definition.read_text() + "num_fewshot: 1\n")
    assert len({stages.run().output.key, first.output.key, second.output.key, third.output.key}) == 4
    # A policy cannot be held against a base that was asked other questions.
    adapter = toy.train("sft", tmp_path / "sft")
    trained = SimpleNamespace(path=tmp_path / "sft", output=tmp_path / "outside", run_id="")
    assert adapter
    with pytest.raises(QAdapterError, match="other items of quiz than the policy"):
        stages.run(trained, first)


def test_a_report_refuses_rows_measured_on_other_items(tmp_path: Path) -> None:
    def row(method: str, name: str, target: str) -> Row:
        folder = tmp_path / name
        folder.mkdir()
        item = {"task": "quiz", "doc_id": 0, "prompt": "?", "target": target, "response": name, "scores": {"acc": 1}}
        (folder / "items.jsonl").write_text(json.dumps(item) + "\n")
        return Row("harmless", method, None, {}, retention=folder)

    base, same, other = row("base", "a", "yes"), row("dpo", "b", "yes"), row("sft", "c", "no")
    refuse_other_items([base, same])
    with pytest.raises(QAdapterError, match="harmless, sft: quiz was measured on other items"):
        refuse_other_items([base, same, other])
    refuse_other_items([base, row("sft (second run)", "d", "no"), row("base (second run)", "e", "no")])


def test_reads_name_files_modules_and_data_sets(quiz: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (found,) = reads_of(["quiz"], None, None).values()
    assert found.files == (quiz, tmp_path / "benchmarks/quiz/ask.py")
    assert found.settings["doc_to_text"] == "!function ask.text"
    definition = tmp_path / "benchmarks/quiz/quiz.yaml"
    text = definition.read_text()
    definition.write_text(text.replace(str(quiz), "https://example.org/quiz.jsonl"))
    with pytest.raises(QAdapterError, match=r"reads its items from https://example\.org/quiz\.jsonl"):
        reads_of(["quiz"], None, None)
    definition.write_text(text.replace("dataset_path: json", "dataset_path: owner/quiz").replace(str(quiz), "x.json"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", offline)
    reads_of.__globals__["_commit"].cache_clear()
    assert reads_of(["quiz"], None, None)["quiz"].datasets == {"owner/quiz": "unknown"}
    reference = tmp_path / "hub/datasets--owner--quiz/refs/main"
    reference.parent.mkdir(parents=True)
    reference.write_text("c" * 40)
    reads_of.__globals__["_commit"].cache_clear()
    assert reads_of(["quiz"], None, None)["quiz"].datasets == {"owner/quiz": "c" * 40}


def offline(*_: Any, **__: Any) -> None:
    raise OSError("no network in tests")


@pytest.mark.parametrize(
    "name",
    [
        'a"\n\ncustom_dataset: !function hubconf.run\nx: "',
        "a'\ncustom_dataset: !function hubconf.run\n",
        "{name} {data} # *a &b !!python/name:os.system",
    ],
)
def test_a_folders_name_is_never_a_definition(name: str, toy: TinyToy, tmp_path: Path, monkeypatch) -> None:
    """The name was pasted into YAML, and the module beside it ran."""
    ran = tmp_path / "ran"
    (tmp_path / "hubconf.py").write_text(f"open({str(ran)!r}, 'w')\ndef run(**_): pass\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    data = tmp_path / name
    (data / "benchmarks").mkdir(parents=True)
    (data / "benchmarks" / "facts.jsonl").write_text('{"question": "what ?", "answer": "that"}\n')
    network, tokenizer = load_base(toy.base, MODEL)
    scores = evaluate_tasks(network, tokenizer, ["toy_facts"], data=data, limit=1, max_gen_toks=4)
    assert [item["target"] for item in scores.samples["toy_facts"]] == ["that"]
    assert not ran.exists()


def test_links_out_of_a_benchmark_folder_are_refused(tmp_path: Path) -> None:
    secret, data = tmp_path / "secret.jsonl", tmp_path / "data"
    secret.write_text('{"question": "key ?", "answer": "sk-1"}\n')
    (data / "benchmarks").mkdir(parents=True)
    (data / "benchmarks" / "facts.jsonl").symlink_to(secret)
    with pytest.raises(QAdapterError, match="link that leads out of the folder"):
        check_tasks(["toy_facts"], data)
    official = tmp_path / "official"
    (official / "gsm8k").mkdir(parents=True)
    (official / "gsm8k" / "test.jsonl").symlink_to(secret)
    settings = {"task": "gsm8k", "dataset_path": "openai/gsm8k", "test_split": "test"}
    with pytest.raises(QAdapterError, match="link that leads out of the folder"):
        local_files(settings, official)
    (official / "gsm8k" / "test.jsonl").unlink()
    (official / "gsm8k").rmdir()
    (official / "gsm8k").symlink_to(tmp_path)
    (tmp_path / "test.jsonl").write_text(secret.read_text())
    with pytest.raises(QAdapterError, match="link that leads out of the folder"):
        local_files(settings, official)
    inside = tmp_path / "inside"
    (inside / "blobs").mkdir(parents=True)
    (inside / "blobs" / "1").write_text(secret.read_text())
    (inside / "gsm8k").mkdir()
    (inside / "gsm8k" / "test.jsonl").symlink_to(inside / "blobs" / "1")
    assert local_files(settings, inside) == {"test": [inside / "gsm8k" / "test.jsonl"]}
