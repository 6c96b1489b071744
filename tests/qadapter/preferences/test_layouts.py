"""The published layouts: each shared sample with its expected outcome, and records of the layouts without a sample."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from qadapter.errors import QAdapterError
from qadapter.preferences import formats, recognition
from qadapter.preferences.building import Choices
from qadapter.preferences.formats import BY_NAME, FORMATS
from qadapter.preferences.pair import Message, PreferencePair
from qadapter.preferences.reader import Accepted, ParsedRecord
from qadapter.preferences.reading import open_reader, read_pairs
from qadapter.preferences.recognition import recognise
from qadapter.preferences.records import Reason
from tests.support.paths import PROJECT_ROOT
from tests.support.recipes import code_blocks


def user(content: str) -> Message:
    return Message(role="user", content=content)


def assistant(content: str) -> Message:
    return Message(role="assistant", content=content)


def system(content: str) -> Message:
    return Message(role="system", content=content)


def shown(item: ParsedRecord) -> tuple[Any, ...]:
    if isinstance(item, Accepted):
        pair = item.pair
        return item.line, [dict(turn) for turn in pair.prompt], pair.chosen, pair.rejected, pair.margin
    return item.line, item.reason.name


def read(*records: Any, **choices: Any) -> list[Any]:
    """All candidates of some records, read as one source."""
    domain = choices.pop("domain", None)
    reader = recognise(records, domain=domain, choices=Choices(**choices))
    found = [candidate for line, record in enumerate(records, 1) for candidate in reader.read(record, line)]
    return found + [left.candidate for left in reader.finish()]


def refusal(*records: Any, **choices: Any) -> str:
    with pytest.raises(QAdapterError) as caught:
        read(*records, **choices)
    return str(caught.value)


def test_each_sample_gives_what_it_must(shared_formats: Path) -> None:
    """Counts, pairs, reasons, margins and names of all files of the shared folder, and the refusals."""
    expected = json.loads((shared_formats / "EXPECTED.json").read_text(encoding="utf-8"))["files"]
    assert len(expected) >= 45
    for name, entry in expected.items():
        file, needs = shared_formats / name, entry.get("needs", {})
        if needs or entry["outcome"] == "refused":
            with pytest.raises(QAdapterError, match=r"(?i)\b(set|use|give|map)\b"):
                open_reader(file)
        if entry["outcome"] == "refused":
            continue
        choices = Choices(**needs)
        items = list(read_pairs(file, choices=choices))
        if file.suffix == ".csv":  # line 1 holds the names; the sample's cells have no line ends
            items = [replace(item, line=item.line - 1) for item in items]
        pairs = [
            (pair["record"], pair["prompt"], pair["chosen"], pair["rejected"], pair.get("margin"))
            for pair in entry["pairs"]
        ]
        reasons = [(q["record"], q["reason"]) for q in entry["quarantined"] for _ in range(q["candidates"])]
        assert sorted(map(str, map(shown, items))) == sorted(map(str, [*pairs, *reasons])), name
        assert open_reader(file, choices=choices).name == entry["format"], name
        assert len(items) == entry["read"] == len(pairs) + len(reasons), name


PROMPT = (user("Why?"),)
PAIR = PreferencePair(PROMPT, "Because.", "No.")
LONGER = PreferencePair((user("Hi"), assistant("Hello"), user("Why?")), "Because.", "No.")
WITH_SYSTEM = PreferencePair((system("Be kind."), user("Why?")), "Because.", "No.")
GOOD, BAD = [user("Why?"), assistant("Because.")], [user("Why?"), assistant("No.")]
NOVA = [
    {"role": "user", "content": [{"text": "Why?"}]},
    {
        "role": "assistant",
        "candidates": [
            {"content": [{"text": "No."}], "preferenceLabel": "non-preferred"},
            {"content": [{"text": "Because."}], "preferenceLabel": "preferred"},
        ],
    },
]
GEMINI = {
    "contents": [{"role": "user", "parts": [{"text": "Why?"}]}],
    "completions": [
        {"score": 1, "completion": {"role": "model", "parts": [{"text": "Because."}]}},
        {"score": 0, "completion": {"role": "model", "parts": [{"text": "No."}]}},
    ],
}
TREE = {
    "message_tree_id": "r",
    "tree_state": "ready_for_export",
    "prompt": {
        "role": "prompter",
        "text": "Why?",
        "replies": [
            {"role": "assistant", "text": "No.", "rank": 1, "replies": []},
            {"role": "assistant", "text": "Because.", "rank": 0, "replies": []},
            {"role": "assistant", "text": "Deleted.", "rank": 2, "deleted": True, "replies": []},
            {"role": "assistant", "text": "Spam.", "rank": 3, "review_result": False, "replies": []},
        ],
    },
}

# name, record, what it gives, choices
FURTHER: list[tuple[str, dict[str, Any], list[Any], dict[str, Any]]] = [
    (
        "openai-preference",
        {"input": [user("Why?")], "preferred_output": GOOD[1:], "non_preferred_output": BAD[1:]},
        [PAIR],
        {},
    ),
    (
        "openai-preference",
        {
            "input": {"messages": PROMPT, "tools": [{"x": 1}]},
            "preferred_output": GOOD[1:],
            "non_preferred_output": BAD[1:],
        },
        [Reason.NOT_TEXT],
        {},
    ),
    ("nova-dpo", {"messages": NOVA}, [PAIR], {}),
    ("nova-dpo", {"system": [{"text": "Be kind."}], "messages": NOVA}, [WITH_SYSTEM], {}),
    ("gemini-preference", GEMINI, [PAIR], {}),
    ("gemini-preference", {**GEMINI, "system_instruction": {"parts": [{"text": "Be kind."}]}}, [WITH_SYSTEM], {}),
    ("gemini-preference", {**GEMINI, "systemInstruction": {"parts": [{"text": "Be kind."}]}}, [WITH_SYSTEM], {}),
    (
        "arena-55k",
        {
            "id": 1,
            "model_a": "x",
            "model_b": "y",
            "prompt": '["Hi","Why?"]',
            "response_a": '["Hello","No."]',
            "response_b": '["Hello","Because."]',
            "winner_model_a": 0,
            "winner_model_b": 1,
            "winner_tie": 0,
        },
        [LONGER],
        {},
    ),
    (
        "arena-55k",
        {
            "prompt": '["Why?"]',
            "response_a": "[null]",
            "response_b": '["No."]',
            "winner_model_a": "1",
            "winner_model_b": "0",
        },
        [Reason.WRONG_FIELDS],
        {},
    ),
    (
        "shp",
        {
            "history": "Why?",
            "human_ref_A": "No.",
            "human_ref_B": "Because.",
            "labels": 0,
            "score_A": 5,
            "score_B": 10,
            "domain": "askculinary_train",
        },
        [PAIR],
        {},
    ),
    (
        "prometheus-preference",
        {
            "orig_instruction": "Why?",
            "orig_response_A": "Because.",
            "orig_response_B": "No.",
            "orig_preference": "A",
            "instruction": "###Task Description",
            "output": "Feedback [RESULT] A",
        },
        [PAIR],
        {},
    ),
    (
        "unified-feedback",
        {"conv_A": BAD, "conv_B": GOOD, "conv_A_rating": 1.0, "conv_B_rating": 5.0, "source": "x"},
        [PAIR],
        {},
    ),
    (
        "unified-feedback",
        {"conv_A": BAD, "conv_B": GOOD, "conv_A_rating": 1.0, "conv_B_rating": 1.0},
        [Reason.NO_PREFERENCE],
        {},
    ),
    (
        "alpaca-farm",
        {"instruction": "Why?", "input": "", "output_1": "No.", "output_2": "Because.", "preference": 2},
        [PAIR],
        {},
    ),
    (
        "alpaca-farm",
        {"instruction": "Why?", "input": "", "output_1": "No.", "output_2": "Because.", "preference": 1.5},
        [Reason.NO_PREFERENCE],
        {},
    ),
    (
        "stack-exchange-paired",
        {"qid": 1, "question": "Why?", "response_j": "Because.", "response_k": "No.", "metadata": ["u"], "date": "d"},
        [PAIR],
        {},
    ),
    ("oasst-tree", TREE, [PAIR], {}),
    (
        "reply-lists",
        {"prompt": "Why?", "chosen": ["Because.", "So."], "rejected": ["No."], "subset": "Ties"},
        [PAIR, PreferencePair(PROMPT, "So.", "No.")],
        {},
    ),
    ("ms-swift", {"messages": GOOD, "rejected_messages": BAD}, [PAIR], {}),
    ("trl-conversational", {"prompt": list(PROMPT), "chosen": "Because.", "rejected": "No."}, [PAIR], {}),
    ("trl-conversational", {"prompt": "Why?", "chosen": GOOD[1], "rejected": BAD[1]}, [PAIR], {}),
    ("sharegpt-ranking", {"messages": list(PROMPT), "chosen": GOOD[1:], "rejected": BAD[1:]}, [PAIR], {}),
    ("kto", {"prompt": "Why?", "completion": "Because.", "label": True}, [Reason.NO_PARTNER], {"pairing": "all"}),
    ("kto-messages", {"messages": GOOD, "label": True}, [Reason.NO_PARTNER], {"pairing": "first"}),
    ("kto-messages", {"conversations": GOOD, "kto_tag": False}, [Reason.NO_PARTNER], {"pairing": "first"}),
    (
        "kto-instruction",
        {"instruction": "Why?", "input": "", "output": "No.", "kto_tag": False},
        [Reason.NO_PARTNER],
        {"pairing": "all"},
    ),
    (
        "beavertails",
        {"prompt": "Why?", "response": "No.", "category": {}, "is_safe": True},
        [Reason.NO_PARTNER],
        {"pairing": "all"},
    ),
    # RewardBench 1, full-hh-rlhf
    ("trl-plain", {"prompt": "Why?", "response": "Because.", "chosen": "Because.", "rejected": "No."}, [PAIR], {}),
    ("trl-plain", {"prompt": "Why?", "chosen": "Because.</s>", "rejected": "No.<|im_end|>"}, [PAIR], {}),
    # a struct of lists, as older Parquet exports have it
    (
        "trl-conversational-implicit",
        {
            side: {"role": ["user", "assistant"], "content": ["Why?", end]}
            for side, end in (("chosen", "Because."), ("rejected", "No."))
        },
        [PAIR],
        {},
    ),
    (
        "nectar",
        {"prompt": "\n\nHuman: Why?\n\nAssistant: ", "answers": {"answer": ["No.", "Because."], "rank": [2.0, 1.0]}},
        [PAIR],
        {},
    ),
]


@pytest.mark.parametrize(("name", "record", "expected", "choices"), FURTHER)
def test_layouts_without_a_sample(name: str, record: Any, expected: list[Any], choices: dict[str, Any]) -> None:
    assert recognise([record], choices=Choices(**choices)).name == name
    assert read(record, **choices) == expected


def test_every_row_of_the_table_has_a_record(shared_formats: Path) -> None:
    samples = json.loads((shared_formats / "EXPECTED.json").read_text(encoding="utf-8"))["files"]
    tried = {str(entry["format"]).split(":")[0] for entry in samples.values()} | {name for name, *_ in FURTHER}
    assert len(BY_NAME) == len(FORMATS)
    assert set(BY_NAME) - tried == {"dsp", "hh-dialogues", "trl-plain-implicit"}  # of test_formats.py
    assert all(row.example.startswith("{") for row in FORMATS)


def test_docs_and_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/data.md lists each layout with the table's example, and CONTRIBUTING.md's recipe reads its record."""
    docs = (PROJECT_ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    for row in FORMATS:
        example = row.example.partition("  (needs")[0].replace("|", r"\|")
        assert f"| `{row.name}` | `{example}`" in docs, row.name
    for reason in Reason:
        assert f"| `{reason.value}` |" in docs, reason
    (code,) = code_blocks("Add a format", "python")
    added = eval(code.strip(), vars(formats))
    monkeypatch.setattr(recognition, "FORMATS", (*FORMATS, added))
    monkeypatch.setitem(BY_NAME, added.name, added)
    record = {"ask": "Why?", "left": "Because.", "right": "No.", "picked": "left"}
    assert recognise([record]).name == "side-by-side"
    assert read(record, {**record, "picked": "both"}) == [PAIR, Reason.NO_PREFERENCE]
