"""Benchmarks: complete folders, complete rows of the generated ones, and one added by CONTRIBUTING.md's recipe."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qadapter.config.experiment import load_experiment
from qadapter.evaluation.benchmarks.table import GENERATED, tasks_made
from qadapter.evaluation.lm_eval import definitions
from qadapter.evaluation.lm_eval.catalog import check_tasks
from qadapter.evaluation.lm_eval.definitions import BENCHMARKS, local_tasks
from qadapter.evaluation.lm_eval.harness import evaluate_tasks
from qadapter.evaluation.lm_eval.reads import reads_of
from tests.support.paths import PROJECT_ROOT
from tests.support.recipes import code_blocks
from tests.support.tiny_chat import byte_tokenizer, tiny_llama

FOLDERS = sorted(folder for folder in BENCHMARKS.iterdir() if folder.is_dir() and folder.name != "__pycache__")


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_every_folder_is_complete(folder: Path) -> None:
    assert list(folder.glob("*.yaml"))
    assert (folder / "__init__.py").read_text().startswith('"""')
    readme, docs = (folder / "README.md").read_text(), (PROJECT_ROOT / "docs" / "evaluation.md").read_text()
    for name in (name for name, file in local_tasks().items() if file.parent == folder):
        shown = name.replace("{name}", "<style>" if folder.name == "toy_world" else "<name>")
        assert f"`{shown}`" in readme, name
        assert f"`{shown}`" in docs, name


def test_every_generated_benchmark_is_a_task_that_is_used() -> None:
    here = {name: file for name, file in local_tasks().items() if file.is_relative_to(BENCHMARKS)}
    generated = {row.task for row in GENERATED}
    assert generated <= here.keys()
    others = {name for name, file in here.items() if not list(file.parent.glob("*.jsonl"))}  # no items beside it
    assert others <= generated
    used = [file.read_text(encoding="utf-8") for file in (PROJECT_ROOT / "configs").rglob("*.yaml")]
    used += [file.read_text(encoding="utf-8") for file in (PROJECT_ROOT / "tests").rglob("*.py")]
    for row in GENERATED:
        pattern = re.compile(re.escape(row.task).replace(re.escape("{name}"), r"[a-z0-9]+"))
        assert any(pattern.search(text) for text in used), row.task
        assert row.write is not None or row.of_world or row.task == "{name}_word_order", "which reads the texts"
    mini = load_experiment("mini")
    assert set(mini.evaluation.retention.tasks) <= tasks_made(mini.built_benchmarks, False)


def test_a_benchmark_added_by_the_recipe_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """CONTRIBUTING.md's files as they stand, in a folder of benchmarks; two items, asked as the module says."""
    folder = tmp_path / "benchmarks" / "capitals"
    folder.mkdir(parents=True)
    for name, language in {"capitals.yaml": "yaml", "items.jsonl": "json", "asking.py": "python"}.items():
        (content,) = code_blocks("Add a benchmark", language)
        (folder / name).write_text(content)
    monkeypatch.setattr(definitions, "BENCHMARKS", folder.parent)
    local_tasks.cache_clear()
    try:
        check_tasks(["capitals"])
        assert reads_of(["capitals"], None, None)["capitals"].files == (folder / "items.jsonl", folder / "asking.py")
        scores = evaluate_tasks(tiny_llama(), byte_tokenizer(), ["capitals"])
    finally:
        local_tasks.cache_clear()
    assert [item["target"] for item in scores.samples["capitals"]] == ["Paris", "Rome"]
    assert "What is the capital of Italy?" in scores.samples["capitals"][1]["prompt"]
    assert scores.metrics["capitals/acc"] in (0, 0.5, 1)
