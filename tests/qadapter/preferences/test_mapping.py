"""`fields`: its three forms, what it refuses, and what is proposed where nothing is recognised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qadapter.errors import QAdapterError
from qadapter.preferences.building import Choices
from qadapter.preferences.pair import Message, PreferencePair
from qadapter.preferences.reader import Accepted
from qadapter.preferences.reading import detect_format, read_pairs
from qadapter.preferences.recognition import recognise
from qadapter.preferences.records import Reason

PROMPT = (Message(role="user", content="Why?"),)
PAIR = PreferencePair(PROMPT, "Because.", "No.")


def mapped(fields: Any, *records: Any) -> list[Any]:
    reader = recognise(records, where="votes", choices=Choices(fields=fields))
    assert reader.name == "mapping"
    return [candidate for record in records for candidate in reader.read(record)]


def refused(fields: Any, *records: Any) -> str:
    with pytest.raises(QAdapterError) as caught:
        mapped(fields, *records)
    return str(caught.value)


VOTE = {"q": "Why?", "a": "Because.", "b": "No.", "vote": "A", "better answer": "Because."}
JUDGEMENT = {"prompt": "q", "responses": {"A": "a", "B": "b"}, "preferred": "vote"}


def test_a_decision() -> None:
    fields = {"prompt": "q", "chosen": "a", "rejected": "b"}
    assert mapped(fields, VOTE) == [PAIR]
    assert mapped({**fields, "chosen": '"better answer"'}, VOTE) == [PAIR]
    record = {**VOTE, "s": "Be kind.", "h": [["Hi", "Hello"]], "m": "1.5"}
    (pair,) = mapped({**fields, "system": "s", "history": "h", "margin": "m"}, record)
    assert [turn["content"] for turn in pair.prompt] == ["Be kind.", "Hi", "Hello", "Why?"]
    assert pair.margin == 1.5
    whole = {"x": [{"who": "customer", "content": "Why?"}, {"role": "assistant", "content": "Because."}]}
    assert mapped(fields, {**VOTE, "q": None}, VOTE) == [Reason.WRONG_FIELDS, PAIR]
    dialogues = {
        side: [{"role": "customer", "content": "Why?"}, {"role": "agent", "content": end}]
        for side, end in (("x", "Because."), ("y", "No."))
    }
    roles = {"customer": "user", "agent": "assistant"}
    assert mapped({"chosen": "x", "rejected": "y", "roles": roles}, dialogues) == [PAIR]
    assert mapped({"chosen": "x", "rejected": "y"}, {**dialogues, **whole}) == [Reason.WRONG_FIELDS]


@pytest.mark.parametrize(
    ("label", "expected"),
    [
        ("A", PAIR),
        ("B", PreferencePair(PROMPT, "No.", "Because.")),
        ("tie", Reason.NO_PREFERENCE),
        (None, Reason.NO_PREFERENCE),
        (["A", "A"], PAIR),
        (["A", "B"], Reason.NO_PREFERENCE),
        ([], Reason.NO_PREFERENCE),
    ],
)
def test_a_judgement(label: Any, expected: Any) -> None:
    """Any other label is a tie, and several annotators must agree; their number is kept."""
    found = mapped(JUDGEMENT, VOTE, {**VOTE, "vote": label})
    assert found == [PAIR, expected]
    if isinstance(label, list) and isinstance(expected, PreferencePair):
        assert found[1].votes == 2


def test_labels_are_numbers_or_comparisons() -> None:
    record = {"q": "Why?", "a": "Because.", "b": "No.", "score": -2}
    fields = {"prompt": "q", "responses": {"<0": "a", ">0": "b"}, "preferred": "score", "margin": "abs(score)"}
    (pair,) = mapped(fields, record)
    assert (pair, pair.margin) == (PAIR, 2.0)
    for label in (1, 1.0, "1", True):
        labels = {True: "a", False: "b"} if label is True else {1: "a", 0: "b"}
        assert mapped({"prompt": "q", "responses": labels, "preferred": "l"}, {**record, "l": label}) == [PAIR]


def test_scored_candidates() -> None:
    """Three replies give 3·2/2 pairs, neighbours 2; nulls stay in step with their replies."""
    record = {"q": "Why?", "c": [{"t": "No.", "s": 1}, {"t": "Because.", "s": 3}, {"t": "So.", "s": None}]}
    fields = {"prompt": "q", "candidates": "c[*].[t, s]"}
    assert mapped(fields, record) == [PAIR, Reason.NO_PREFERENCE, Reason.NO_PREFERENCE]
    assert mapped(fields, record)[0].margin == 2.0
    lowest = mapped({**fields, "best": "lowest"}, record)
    assert lowest[0] == PreferencePair(PROMPT, "No.", "Because.")
    assert lowest[0].margin is None  # ranks have no distance
    lists = {"q": "Why?", "texts": ["No.", "Because."], "scores": ["1", "3"]}
    assert mapped({"prompt": "q", "texts": "texts", "scores": "scores"}, lists, {**lists, "scores": [1]}) == [
        PAIR,
        Reason.WRONG_FIELDS,
    ]


def test_records_inside_an_object(tmp_path: Path) -> None:
    """Of one file, whose records are streamed, and inside each record."""
    fields = {**JUDGEMENT, "records": "data"}
    file = tmp_path / "votes.json"
    file.write_text(json.dumps({"version": 1, "data": [VOTE, VOTE]}, indent=1))
    found = list(read_pairs(file, choices=Choices(fields=fields)))
    assert [item.pair for item in found if isinstance(item, Accepted)] == [PAIR, PAIR]
    nested = {**JUDGEMENT, "records": "result.items"}
    assert mapped(nested, {"result": {"items": [VOTE, 3, VOTE]}}) == [PAIR, Reason.NOT_AN_OBJECT, PAIR]


def test_the_list_of_an_object_is_recognised_by_itself(tmp_path: Path) -> None:
    """`records` alone names the list; its records are in a layout as those of any other file."""
    file = tmp_path / "pairs.json"
    row = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
    file.write_text(json.dumps({"version": 1, "data": [row, row]}))
    choices = Choices(fields={"records": "data"})
    assert detect_format(file, choices=choices) == "trl-plain"
    found = list(read_pairs(file, choices=choices))
    assert [item.pair for item in found if isinstance(item, Accepted)] == [PAIR, PAIR]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "must be a mapping"),
        ({"promt": "q"}, "no key 'promt', did you mean 'prompt'"),
        ({"prompt": "q"}, "names no replies; exactly one form"),
        ({"chosen": "a"}, "without `rejected`; set it"),
        ({**JUDGEMENT, "chosen": "a", "rejected": "b"}, "exactly one form was expected"),
        ({"prompt": "q", "chosen": "better-answer", "rejected": "b"}, "needs quotes inside the quotes"),
        ({"prompt": "q", "chosen": "a[", "rejected": "b"}, "is no JMESPath expression"),
        ({"prompt": "q", "chosen": 3, "rejected": "b"}, "must be a field's name or a JMESPath expression"),
        (
            {"prompt": "q", "chosen": "aa", "rejected": "b"},
            "in the first 1 records of votes. Did you mean",
        ),
        ({**JUDGEMENT, "responses": {"A": "a"}}, "at least two replies"),
        ({**JUDGEMENT, "responses": {"left": "a", "right": "b"}}, "none of the labels left, right in votes, but A"),
        ({"prompt": "q", "candidates": "a[*].[x, y]"}, "gives nothing"),
        ({**JUDGEMENT, "best": "most"}, "must be highest or lowest"),
        ({**JUDGEMENT, "best": "lowest"}, "`fields.best` has no effect on a judgement: it is for scored candidates"),
        ({"prompt": "q", "candidates": "c", "margin": "m"}, "`fields.margin` has no effect on scored candidates"),
        ({**JUDGEMENT, "roles": {"x": "judge"}}, "must give user, assistant or system"),
        ({**JUDGEMENT, "records": "data"}, "gives no list of objects"),
    ],
)
def test_a_wrong_mapping_is_refused_before_anything_runs(fields: Any, words: str) -> None:
    message = refused(fields, VOTE)
    assert words in message
    assert "?." not in message


@pytest.mark.parametrize(
    ("record", "proposed"),
    [
        (
            {"scenario": "Why?", "better_text": "Because.", "worse_text": "No."},
            "{prompt: scenario, chosen: better_text, rejected: worse_text}",
        ),
        (
            {"question": "Why?", "answer_a": "Because.", "answer_b": "No.", "vote": "a"},
            "{prompt: question, responses: {'a': answer_a, 'b': answer_b}, preferred: vote}",
        ),
        (
            {"query": "Why?", "options": [{"text": "No.", "my-score": 1}, {"text": "Because.", "my-score": 2}]},
            "{prompt: query, candidates: 'options[*].[text, \"my-score\"]'}",
        ),
    ],
)
def test_a_proposed_mapping_reads_the_records(record: dict[str, Any], proposed: str) -> None:
    """The refusal shows it, and what it shows works when it is set."""
    import yaml

    with pytest.raises(QAdapterError) as caught:
        recognise([record])
    assert proposed in str(caught.value)
    assert mapped(yaml.safe_load(proposed), record) == [PAIR]
