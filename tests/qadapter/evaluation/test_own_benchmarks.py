"""Benchmarks of the user's own: what is read, what is refused with its line, what is right, what a stage key has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qadapter.config.evaluation import RetentionSettings
from qadapter.config.experiment import load_experiment
from qadapter.errors import QAdapterError
from qadapter.evaluation.benchmarks.own.answers import contains, score_reply
from qadapter.evaluation.benchmarks.own.items import read_own
from qadapter.evaluation.lm_eval.catalog import check_own
from qadapter.evaluation.lm_eval.harness import evaluate_tasks
from qadapter.evaluation.lm_eval.texts import benchmark_items
from qadapter.evaluation.measure import measure_retention
from qadapter.planning.estimate import benchmark_items as planned_items
from tasks.stages.task_reads import task_reads
from tests.support.tiny_chat import byte_tokenizer, teach, tiny_llama
from tests.support.tiny_toy import MODEL, make_tiny_toy, rows

KNOWN = [("capital of Aru?", "It is Bel."), ("3 + 4?", "7"), ("colour of jade?", "green"), ("2 + 2?", "4")]


XY = ["x", "y"]
FREE = [("3 + 4?", r"^\d$"), ("2 + 2?", "four")]


def write(file: Path, *lines: Any) -> Path:
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    file.write_text(text + "\n", encoding="utf-8")
    return file


CHOICES = ({"question": "1+1?", "choices": ["1", "2"], "answer": "2"}, {"question": "Sky?", "a": "red", "b": "blue"})


@pytest.mark.parametrize(
    ("ending", "lines", "expected"),
    [
        # The text wins over the letter and the number; a letter may stand in brackets.
        (".jsonl", [CHOICES[0], {**CHOICES[1], "answer": "(B)"}], [(["1", "2"], 1), (["red", "blue"], 1)]),
        (".csv", ["Question,A,B,C,Answer", '"a, or b?",x,y,z,C', "c?,p,q,,a"], [(["x", "y", "z"], 2), (["p", "q"], 0)]),
        (".csv", ["prompt;options;answer", 'q;["x, y", "z"];z', "r;no | a;a"], [(["x, y", "z"], 1), (["no", "a"], 1)]),
        (".tsv", ["question\tchoice_1\tchoice_2\tanswer", "q\tx\ty\tx"], [(["x", "y"], 0)]),
        # One place of 0, or one as large as the number of choices, says where numbers count from.
        (".json", [[{"question": "q", "options": XY, "answer": n} for n in (1, 0)]], [(XY, 1), (XY, 0)]),
        (".csv", ["question,choice1,choice2,answer", "q,x,y,1", "r,x,y,2"], [(["x", "y"], 0), (["x", "y"], 1)]),
    ],
)  # fmt: skip
def test_choices_are_read_in_every_layout(tmp_path: Path, ending: str, lines: list[Any], expected: Any) -> None:
    own = read_own(write(tmp_path / f"quiz{ending}", *lines))
    assert own.kind == "multiple choice"
    assert [(item["choices"], item["answer"]) for item in own.items] == expected


def test_answers_and_expressions_are_read(tmp_path: Path) -> None:
    short = read_own(
        write(tmp_path / "a.jsonl", {"question": "q", "answers": ["x", 4]}, "", {"prompt": "r", "answer": "y"})
    )
    assert (short.kind, [item["answers"] for item in short.items]) == ("short answer", [["x", "4"], ["y"]])
    found = read_own(write(tmp_path / "b.csv", "question,regex", 'date?,"\\d{4}"', '"two\nlines",x+'))
    assert (found.kind, [item["regex"] for item in found.items]) == ("regular expression", ["\\d{4}", "x+"])
    assert found.items[1]["prompt"] == "two\nlines"


@pytest.mark.parametrize(
    ("name", "lines", "expected"),
    [
        ("q.jsonl", [CHOICES[0], "{broken"], "line 2 is not JSON"),
        ("q.jsonl", ["", {"answer": "x"}], "line 2 has no 'question'"),
        ("q.jsonl", [{"question": "q"}], "line 1 has no 'answer'"),
        ("q.jsonl", [{"question": "q", "prompt": "q", "answer": "x"}], "has 'question' and 'prompt'; keep one"),
        ("q.jsonl", [{"question": ["q"], "answer": "x"}], "a 'question' that is list, not a text"),
        ("q.jsonl", [CHOICES[0], {"question": "q", "answer": "x"}], "line 2 is of the kind 'short answer' and line 1"),
        ("q.jsonl", [{**CHOICES[0], "answer": "3"}], "no row of the file shows whether choices are counted from 0 or"),
        ("q.jsonl", [{**CHOICES[0], "answer": "D"}], "the answer 'D', which is none of its 2 choices"),
        ("q.jsonl", [{**CHOICES[0], "choices": ["2", "2"]}], "has the choice '2' twice"),
        ("q.jsonl", [{"question": "q", "a": "x", "answer": "x"}], "has one choice, 'x'"),
        ("q.jsonl", [{"question": "q", "answer": True}], "an answer that is true, not a text"),
        ("q.jsonl", [{"question": "q", "regex": "("}], "line 1 has a 'regex' that Python cannot read (missing )"),
        ("q.jsonl", [{"question": "q", "regex": "x*"}], "a 'regex' that every reply matches"),
        ("q.csv", ["question,answer", "q,x", "r,x,y", "s,"], "line 3 has 3 cells, and the header has 2: put a cell"),
        ("q.csv", ["question,answer", '"two', 'lines",', "s,x"], "line 2 has no 'answer'"),
        ("q.csv", ["question,answer"], "has no questions"),
        ("q.xlsx", ["x"], "its name ends in '.xlsx'; expected .jsonl"),
        ("https://example.org/q.jsonl", None, "is not on this machine; download it"),
        ("hub:owner/quiz", None, "is not on this machine; download it"),
        ("away.jsonl", None, "there is no such file"),
    ],
)  # fmt: skip
def test_a_faulty_file_is_refused_with_the_line(
    tmp_path: Path, name: str, lines: list[Any] | None, expected: str
) -> None:
    file = Path(name) if ":" in name else tmp_path / name
    if lines is not None:
        write(Path(file), *lines)
    with pytest.raises(QAdapterError) as refused:
        read_own(file, "quiz")
    assert expected in str(refused.value)
    assert "quiz" in str(refused.value)


@pytest.mark.parametrize(
    ("reply", "answer", "right"),
    [
        ("It is PARIS, of course.", "Paris", True),
        ("Parisian", "paris", False),
        ("The answer is 4.", "4", True),
        ("4.5", "4", False),
        ("14 or -4", "4", False),
        ("1,000 items", "1,000", True),
        ("costs $5", "$5", True),
        ("首都は東京です。", "東京", True),
        ("C++ is", "C++", True),
        ("new\n york", "New York", True),
    ],
)
def test_an_answer_is_found_as_whole_words(reply: str, answer: str, right: bool) -> None:
    assert contains(reply, answer) is right


def test_a_thought_is_no_answer() -> None:
    doc = {"regex": None, "answers": ["Paris"]}
    assert score_reply(doc, ["<think>Paris? No.</think> Rome"]) == {"acc": 0.0}
    assert score_reply(doc, ["<think>Rome? No.</think> Paris"]) == {"acc": 1.0}
    assert score_reply({"regex": r"^\w+ 20\d\d$", "answers": []}, [" May 2026 "]) == {"acc": 1.0}


@pytest.mark.slow
def test_a_model_is_asked_each_kind(tmp_path: Path) -> None:
    """It knows four answers by heart: of the first kind 2 of 2, of the second 3 of 4, of the third 1 of 2."""
    tokenizer, model = byte_tokenizer(), tiny_llama(hidden=64)
    teach(model, tokenizer, KNOWN, steps=150)
    capital, two = "capital of Aru?", "2 + 2?"
    choice = [{"question": q, "choices": ["no such place", a], "answer": "B"} for q, a in KNOWN[1:3]]
    short = [{"question": q, "answer": a} for q, a in (*KNOWN[1:3], (capital, "bel"), (two, "5"))]
    own = {
        "choice": write(tmp_path / "choice.jsonl", *choice),
        "short": write(tmp_path / "short.csv", "question,answer", *(f"{q['question']},{q['answer']}" for q in short)),
        "free": write(tmp_path / "free.jsonl", *({"question": q, "regex": r} for q, r in FREE)),
    }
    scores = evaluate_tasks(model, tokenizer, (), own=own)
    assert scores.metrics == {"choice/acc": 1.0, "short/acc": 0.75, "free/acc": 0.5}
    assert [item["response"] for item in scores.samples["short"]] == ["7", "green", "It is Bel.", "4"]
    assert [item["target"] for item in scores.samples["free"]] == [r"/^\d$/", "/four/"]
    assert check_own(own) == [
        "choice: 2 questions, multiple choice",
        "short: 4 questions, short answer",
        "free: 2 questions, regular expression",
    ]
    assert benchmark_items((), None, None, own)[0]["free"] == [["3 + 4?"], ["2 + 2?"]]  # looked for in training data


def test_a_name_of_another_task_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "q.jsonl", CHOICES[0])
    for name in ("toy_facts", "mmlu", "x_word_order"):
        with pytest.raises(QAdapterError, match=f"There is a task '{name}' already"):
            check_own({name: file})


def test_settings_name_what_is_measured(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to measure"):
        RetentionSettings()
    with pytest.raises(ValueError, match=r"own\.quiz has the name of one of `tasks`"):
        RetentionSettings(tasks=("quiz",), own={"quiz": "q.jsonl"})
    settings = RetentionSettings(own={"quiz": "{data}/q.jsonl"}, plain_tasks=("quiz",))
    assert settings.own_files(tmp_path) == {"quiz": tmp_path / "q.jsonl"}
    with pytest.raises(QAdapterError, match="needs a data folder"):
        settings.own_files(None)
    experiment = load_experiment("smoke", {"evaluation.retention.own": {"quiz": "q.jsonl"}})
    assert experiment.evaluation.retention.own == {"quiz": "q.jsonl"}
    assert planned_items(("gsm8k_cot",), 10, [30, 4]) == 10 + 10 + 4


def test_retention_has_it_like_any_other_task(tmp_path: Path) -> None:
    toy = make_tiny_toy(tmp_path / "toy")
    quiz = write(
        tmp_path / "quiz.jsonl",
        *({"question": f"is {n} even ?", "choices": ["yes", "no"], "answer": n % 2} for n in range(4)),
    )
    settings = RetentionSettings(tasks=("toy_sums",), own={"quiz": str(quiz)}, limit=3, max_new_tokens=8, answers=0)
    folders = [tmp_path / name for name in ("base", "again")]
    for folder in folders:
        folder.mkdir()
        measure_retention(
            toy.base,
            None,
            folders[0] if folder is folders[1] else None,
            model=MODEL,
            settings=settings,
            benchmarks=toy.world,
            old_texts=None,
            max_length=64,
            out=folder,
            own={"quiz": quiz},
        )
    found = json.loads((folders[0] / "metrics.json").read_text())
    assert {name for name in found if "quiz" in name} == {"retention/quiz/acc", "forgetting/quiz/acc"}
    parts = [found["retention/toy_sums/exact_match"], found["retention/quiz/acc"]]
    assert found["retention/mean"] == pytest.approx(sum(parts) / 2)
    assert [row["target"] for row in rows(folders[0] / "items.jsonl") if row["task"] == "quiz"] == ["yes", "no", "yes"]
    # The file's content is in the key, its place is not; so are the task's definition and the code that scores it.
    inputs, digest = task_reads((), None, None, {"quiz": quiz})
    assert inputs == {"quiz reads 0": quiz}
    moved = write(tmp_path / "moved.jsonl", *rows(quiz))
    assert task_reads((), None, None, {"quiz": moved})[1] == digest
    write(moved, {"question": "2 + 2?", "answer": "4"})
    assert task_reads((), None, None, {"quiz": moved})[1] != digest  # another kind, asked otherwise
