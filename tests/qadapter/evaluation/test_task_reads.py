"""All that a task reads is in the retention stage's key, and nothing that a user names becomes code."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from lm_eval.tasks import TaskManager

import tasks.evaluate
from qadapter.config.experiment import load_experiment
from qadapter.errors import QAdapterError
from qadapter.evaluation.lm_eval import definitions
from qadapter.evaluation.lm_eval.catalog import check_tasks, expand_suites
from qadapter.evaluation.lm_eval.harness import evaluate_tasks
from qadapter.evaluation.lm_eval.official_files import local_files
from qadapter.evaluation.lm_eval.reads import reads_of
from qadapter.files.artifacts import digest_tree
from qadapter.policy.loading import load_base
from qadapter.report.items import refuse_other_items
from qadapter.report.rows import Row
from tasks.stages.context import RunContext
from tasks.stages.stage_run import StageResult
from tasks.stages.store import StageStore
from tasks.stages.task_reads import task_reads
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


@pytest.mark.slow
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


@pytest.fixture
def forgotten() -> Iterator[None]:
    """The names of tasks that were read from other folders are forgotten afterwards."""
    yield
    definitions.local_tasks.cache_clear()


def key(names: list[str], own: dict[str, Path] | None = None, official: Path | None = None) -> str:
    """What of a stage's key depends on its tasks: the content of the files that they read, and their definitions."""
    files, definitions = task_reads(names, None, official, own or {})
    return json.dumps([{name: digest_tree(file) for name, file in files.items()}, definitions])


@pytest.mark.usefixtures("forgotten")
def test_what_a_definition_reads_is_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each case: files (with what a change makes of one of them), and what the definition says of its items."""
    rows = '{"question": "is 1 even ?", "choices": ["yes", "no"], "answer": 1}\n'
    other = rows.replace('"answer": 1', '"answer": 0')
    table, turned = "question,answer\nis 1 even ?,1\n", "question,answer\nis 1 even ?,0\n"
    source = 'test_split: test\noutput_type: generate_until\ndoc_to_text: "{{question}}"\ndoc_to_target: answer\n'
    code = "def text(doc):\n    return doc['question']\n"
    ask = "from ask_more import text as more\n\ndef text(doc):\n    return more(doc)\n"
    within = "from helpers.words import text as more\n\ndef text(doc):\n    return more(doc)\n"
    cases: dict[str, tuple[str, dict[str, str], str, str]] = {
        "a file beside it": ("json\ndataset_kwargs: {data_files: {test: items.jsonl}}", {}, "items.jsonl", other),
        "a path with dots": ("json\ndataset_kwargs: {data_files: {test: ../up/q.jsonl}}", {}, "../up/q.jsonl", other),
        "the second of several": (
            "json\ndataset_kwargs: {data_files: {test: [one.jsonl, sub/two.jsonl]}}",
            {"one.jsonl": rows},
            "sub/two.jsonl",
            other,
        ),
        "a pattern": ("json\ndataset_kwargs: {data_files: {test: 'part-*.jsonl'}}", {}, "part-1.jsonl", other),
        "a new file of a pattern": (
            "json\ndataset_kwargs: {data_files: {test: 'part-*.jsonl'}}",
            {"part-1.jsonl": rows},
            "part-2.jsonl",
            other,
        ),
        "a folder": ("json\ndataset_kwargs: {data_dir: items}", {}, "items/test.jsonl", other),
        "a folder as the data set": ("./items", {}, "items/test.jsonl", other),
        "a table": ("csv\ndataset_kwargs: {data_files: {test: items.csv}}", {}, "items.csv", turned),
    }
    for name, (dataset, files, changed, after) in cases.items():
        quiz = Benchmark(tmp_path / name, monkeypatch)
        for file, text in {**files, changed: table if changed.endswith("csv") else rows}.items():
            if name != "a new file of a pattern" or file in files:
                quiz.write(file, text)
        quiz.write("quiz.yaml", f"task: quiz\ndataset_path: {dataset}\n{source}")
        before = quiz.key()
        assert quiz.items() > 0, name  # lm-eval reads them from there, not from the current folder
        quiz.write(changed, after)
        assert quiz.key() != before, name

    quiz = Benchmark(tmp_path / "code", monkeypatch)
    reading = "task: quiz\ndataset_path: json\ndataset_kwargs: {data_files: {test: items.jsonl}}\n" + source
    quiz.write("items.jsonl", rows)
    quiz.write("../far.py", "text = str\n")
    monkeypatch.syspath_prepend(str(tmp_path / "code" / "benchmarks"))  # where far.py lies
    helpers = {"helpers/__init__.py": "", "helpers/words.py": code, "../far.py": "text = str\n"}
    for module, files, changed, after in (
        ("ask", {"ask.py": ask, "ask_more.py": code}, "ask_more.py", code.replace("question", "answer")),
        ("deep", {"deep.py": within}, "helpers/words.py", "text = str\n"),
        ("alone", {"alone.py": "import helpers\ntext = str\n"}, "helpers/__init__.py", "WORD = 1\n"),
        ("far", {}, "../far.py", "text = repr\n"),
        ("near", {"near.py": "from .ask_more import text\n"}, "ask_more.py", "text = len\n"),
    ):
        for file, text in {**helpers, **files}.items():
            quiz.write(file, text)
        quiz.write("quiz.yaml", reading.replace('"{{question}}"', f"!function {module}.text"))
        before = quiz.key()
        quiz.write(changed, after)
        assert quiz.key() != before, changed
    # A module of this project that the benchmark's own module imports: its digest, with what it imports in turn.
    quiz.write("ask.py", "from qadapter.evaluation.statistics import mean_interval\n" + code)
    quiz.write("quiz.yaml", reading.replace('"{{question}}"', "!function ask.text"))
    assert reads_of(["quiz"], None, None)["quiz"].modules == ("qadapter.evaluation.statistics",)
    quiz.write("ask.py", "def text(:\n")
    with pytest.raises(QAdapterError, match=r"ask\.py, line 1: "):
        quiz.key()


@pytest.mark.usefixtures("forgotten")
def test_includes_groups_and_links_are_in_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = '{"question": "is 1 even ?", "answer": 1}\n'
    quiz = Benchmark(tmp_path / "chain", monkeypatch)
    quiz.write("items.jsonl", rows)
    quiz.write("last.yaml", "test_split: test\noutput_type: generate_until\ndoc_to_text: question\n")
    quiz.write("between.yaml", "include: last.yaml\ndataset_path: json\ndataset_kwargs: {data_files: items.jsonl}\n")
    quiz.write("quiz.yaml", "include: between.yaml\ntask: quiz\ndoc_to_target: answer\n")
    keys = [quiz.key()]
    quiz.write("last.yaml", "test_split: test\noutput_type: generate_until\ndoc_to_text: answer\n")
    keys.append(quiz.key())
    (outside := tmp_path / "outside.jsonl").write_text(rows)
    (quiz.folder / "items.jsonl").unlink()
    (quiz.folder / "items.jsonl").symlink_to(outside)
    assert quiz.key() == keys[1]  # the same content, elsewhere
    outside.write_text(rows.replace("even", "odd"))
    keys.append(quiz.key())
    (folder := tmp_path / "elsewhere").mkdir()
    (folder / "test.jsonl").write_text(rows)
    (quiz.folder / "linked").symlink_to(folder)
    quiz.write("between.yaml", "include: last.yaml\ndataset_path: json\ndataset_kwargs: {data_dir: linked}\n")
    keys.append(quiz.key())
    (folder / "test.jsonl").write_text(rows * 2)
    keys.append(quiz.key())
    assert len(set(keys)) == 5

    for name in ("one", "two", "three"):
        quiz.write(f"{name}.yaml", f"include: between.yaml\ntask: {name}\ndoc_to_target: answer\n")
    quiz.write("inner.yaml", "group: inner\ntask: [two]\n")
    quiz.write("outer.yaml", "group: outer\ntask: [one, inner]\nmetadata: {without_chat_template: [inner]}\n")
    assert expand_suites(["outer"]) == (["one", "two"], ["two"])
    before = key(["outer"])
    quiz.write("inner.yaml", "group: inner\ntask: [two, three]\n")
    assert key(["outer"]) != before
    quiz.write("inner.yaml", "group: inner\ntask: three\n")
    with pytest.raises(
        QAdapterError, match=r"Group inner has `task: three`, and expected is a list: `task: \[three\]`"
    ):
        key(["outer"])
    quiz.write("inner.yaml", "group: inner\ntask: [outer]\n")
    with pytest.raises(QAdapterError, match=r"Group outer contains itself \(outer > inner > outer\)"):
        key(["outer"])
    quiz.write("inner.yaml", "group: inner\ntask: [{task: two, num_fewshot: 1}]\n")
    with pytest.raises(QAdapterError, match=r"Group inner lists .*expected is the name of a task"):
        key(["outer"])


def test_own_questions_in_every_container_are_in_the_key(tmp_path: Path) -> None:
    for name, first, second in (
        ("q.jsonl", '{"question": "1 + 1?", "answer": "2"}\n', '{"question": "1 + 1?", "answer": "3"}\n'),
        ("q.json", '[{"question": "1 + 1?", "answer": "2"}]', '[{"question": "1 + 1?", "answer": "3"}]'),
        ("q.csv", "question,answer\n1 + 1?,2\n", "question,answer\n1 + 1?,3\n"),
    ):
        (file := tmp_path / name).write_text(first)
        before = key([], {"quiz": file})
        (moved := tmp_path / "elsewhere" / name).parent.mkdir(exist_ok=True)
        moved.write_text(first)
        assert key([], {"quiz": moved}) == before  # not where it lies
        file.write_text(second)
        assert key([], {"quiz": file}) != before


class Benchmark:
    """A benchmark `quiz` in a folder of its own, in place of the project's."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = root / "benchmarks" / "quiz"
        self.folder.mkdir(parents=True)
        monkeypatch.setattr(definitions, "BENCHMARKS", root / "benchmarks")
        monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", root / "cache")
        definitions.local_tasks.cache_clear()

    def write(self, name: str, text: str) -> None:
        file = self.folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        definitions.local_tasks.cache_clear()

    def key(self) -> str:
        return key(["quiz"])

    def items(self) -> int:
        """How many lm-eval reads."""
        with tempfile.TemporaryDirectory() as rendered:
            definitions.render_definitions(Path(rendered), ["quiz"], None)
            loaded = TaskManager(include_path=[rendered], include_defaults=False).load(["quiz"])
            return len(list(loaded["tasks"]["quiz"].test_docs()))


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
