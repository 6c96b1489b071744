"""Files for lm-eval's own tasks with items that nobody wrote for people, a few of each."""

from __future__ import annotations

from pathlib import Path

from lm_eval.tasks import TaskManager

from qadapter.evaluation.lm_eval.catalog import find_tasks
from qadapter.evaluation.lm_eval.official_files import leaves
from qadapter.files.artifacts import write_json_lines

MMLU_PRO = {"category": "law", "src": "s", "cot_content": "A: Let's think step by step. The answer is (B)."}


def write_papers_suite(folder: Path) -> None:
    """Two items of each subject of MMLU, of each task of BBH, of MMLU-Pro, IFEval and GSM8K."""
    index = TaskManager(include_path=list(find_tasks(["mmlu", "leaderboard_bbh"]).official), include_defaults=False)
    for task in leaves("mmlu", index.task_index):
        rows = [{"question": f"{task}?", "choices": ["a", "b", "c", "d"], "answer": i, "subject": task} for i in (1, 3)]
        write_json_lines(folder / "cais" / "mmlu" / index.task_index[task].cfg["dataset_name"] / "test.jsonl", rows)
    for task in leaves("leaderboard_bbh", index.task_index):
        settings = index.task_index[task].cfg
        choices = settings["doc_to_choice"]
        target = choices[0] if isinstance(choices, list) else "(A)"
        rows = [{"input": "Which? Options: (A) a (B) b", "target": target}] * 2
        write_json_lines(folder / "bbh" / f"{settings['dataset_name']}.jsonl", rows)
    question = {**MMLU_PRO, "question": "Why?", "options": ["a", "b", "c"], "answer": "B", "answer_index": 1}
    write_json_lines(folder / "mmlu_pro" / "test.jsonl", [question] * 2)
    write_json_lines(folder / "mmlu_pro" / "validation.jsonl", [question] * 5)
    rule = {"key": 1, "prompt": "No commas.", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{"n": None}]}
    write_json_lines(folder / "ifeval.jsonl", [rule] * 2)
    write_json_lines(folder / "gsm8k.jsonl", [{"question": "1 + 1?", "answer": "One and one. #### 2"}] * 2)
