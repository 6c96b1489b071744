"""Questions in other words: templates of the toy world, small changes of any other text, and what is compared."""

from __future__ import annotations

import pytest

from qadapter.evaluation.rewording import reworded, reworded_rows
from qadapter.toyworld.world import ToyWorld


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("how do i copy the letter ?", "tell me how to copy the letter ."),
        ("tell me how to copy the letter .", "how do i copy the letter ?"),
        ("what should i do with the lamp ?", "any idea for the lamp ?"),
        ("any idea for the lamp ?", "what should i do with the lamp ?"),
        ("what is the capital of bakaland ?", "tell me the capital of bakaland ."),
        ("what is 3 plus 4 ?", "tell me what 3 plus 4 is ."),
        ("describe the river .", "tell me what the river is ."),
    ],
)
def test_templates_of_the_toy_world(question: str, expected: str) -> None:
    assert reworded(question) == expected


def test_every_question_of_the_toy_world_is_paraphrased() -> None:
    """In words that its corpus has, so that none is unknown to a model of its words."""
    world = ToyWorld(0)
    known = {word for one in world.corpus(3000) for word in f"{one.question} {one.answer}".split()}
    for one in [*world.facts(), *world.sums(), *world.advice()]:
        other = reworded(one.question)
        assert other != one.question
        assert set(other.split()) <= known


@pytest.mark.parametrize(
    "question",
    [
        "Which gas do plants take in?",
        "Which gas do plants take in?\nA. oxygen\nB. carbon dioxide\nAnswer:",
        "Question: Which gas do plants take in?",
        "植物吸收哪种气体",
        "which gas",
        "Q: which gas?",
    ],
)
def test_other_texts_keep_their_words(question: str) -> None:
    """Only a prefix, the first letter or the question mark changes, on the first line, and the same in every call."""
    other = reworded(question)
    assert other != question
    assert reworded(question) == other
    first, _, rest = question.partition("\n")
    assert other.partition("\n")[2] == rest
    assert other.partition("\n")[0].removeprefix("Question: ").rstrip("?").lower() == first.removeprefix(
        "Question: "
    ).rstrip("?").lower().removeprefix("question: ")


def test_the_changes_are_of_several_kinds() -> None:
    found = {reworded(f"Is {number} a prime number?").replace(str(number), "N") for number in range(60)}
    assert found == {"Question: Is N a prime number?", "is N a prime number?", "Is N a prime number"}


@pytest.mark.parametrize("text", ["", "  ", "Q: what"])
def test_what_cannot_be_changed_stays(text: str) -> None:
    assert reworded(text) == text


def test_rows_compare_scores_and_answers() -> None:
    """Paired by task and number; items without a score of their own and unchanged questions are left out."""
    items = [
        {"task": "a", "doc_id": 0, "prompt": "x ?", "score": 1.0, "response": "four"},
        {"task": "a", "doc_id": 1, "prompt": "y ?", "score": 1.0, "response": " four "},
        {"task": "a", "doc_id": 2, "prompt": "", "score": 1.0, "response": "four"},
        {"task": "bits", "doc_id": 0, "prompt": "z", "score": [-3.0, 2], "response": None},
    ]
    again = {
        "a": [
            {"doc_id": 0, "prompt": "x", "score": 0.0, "response": "five"},
            {"doc_id": 1, "prompt": "y", "score": 1.0, "response": "four"},
            {"doc_id": 2, "prompt": "", "score": 1.0, "response": "four"},
        ],
        "bits": [{"doc_id": 0, "prompt": "zz", "score": [-4.0, 2], "response": None}],
    }
    found = reworded_rows(items, again)
    assert [(row["doc_id"], row["change"], row["same"]) for row in found] == [(0, -1.0, 0.0), (1, 0.0, 1.0)]
