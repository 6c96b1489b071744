"""Layouts as other tools write them: columns beside the layout's own, null columns, CSV and Parquet."""

from __future__ import annotations

import csv
import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest

from qadapter.errors import QAdapterError
from qadapter.preferences.building import Choices
from qadapter.preferences.formats import BY_NAME, FORMATS
from qadapter.preferences.pair import PreferencePair
from qadapter.preferences.reader import Accepted
from qadapter.preferences.reading import open_reader, read_pairs
from qadapter.preferences.recognition import recognise
from qadapter.preferences.records import Reason
from tests.qadapter.preferences.test_fuzz_layouts import GOOD, OTHER, TURNS

BESIDE: dict[str, Any] = {
    "example_id": "a-1",
    "createdAt": datetime(2024, 5, 1, 12),
    "annotator_name": "Anna",
    "model-name": "m",
    "Source URL": "https://example.org/a",
    "language": "en",
    "Unnamed: 0": 3,
    "when": "2024-05-01 10:00",
    "session": "3f2b1c00-1111-4222-8333-444455556666",
    "confidence": 0.8,
}
CHOSEN, REJECTED = "Because.", "No."
PLAIN = {"prompt": "Why?", "chosen": CHOSEN, "rejected": REJECTED}
WHOLE = {"chosen": TURNS, "rejected": OTHER}


def parse(record: Any, **choices: Any) -> list[Any]:
    domain = choices.pop("domain", None)
    return recognise([record], domain=domain, choices=Choices(**choices)).read(record, 1)


def found(file: Path, domain: str | None, choices: Choices) -> list[Any]:
    items = list(read_pairs(file, domain=domain, choices=choices))
    return [(item.pair, item.pair.margin) if isinstance(item, Accepted) else item.reason for item in items]


def cell(value: Any) -> Any:
    """A value as a table's cell: structures as JSON, null as nothing."""
    if value is None:
        return ""
    return json.dumps(value) if isinstance(value, list | dict) else value


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(GOOD) - {"mapping"}))
def test_every_layout_with_other_columns_and_containers(tmp_path: Path, name: str) -> None:
    """Three records, two of them with columns of a platform, as JSON lines, Parquet and CSV: the same pairs."""
    good, needs = GOOD[name]
    domain, choices = needs.get("domain"), Choices(**{k: v for k, v in needs.items() if k != "domain"})
    text = json.dumps(good)
    rows = [good, json.loads(text.replace("Why?", "When?")), json.loads(text.replace("Because", "Since"))]
    plain = tmp_path / "plain.jsonl"
    plain.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    expected = found(plain, domain, choices)
    assert len(expected) >= 3
    wide = [{**row, **(dict.fromkeys(BESIDE) if number == 1 else BESIDE)} for number, row in enumerate(rows)]
    lines = tmp_path / "wide.jsonl"
    lines.write_text("".join(json.dumps(row, default=str) + "\n" for row in wide), encoding="utf-8")
    assert found(lines, domain, choices) == expected
    if name != "distilabel-generations":  # its record has a number and a text in one list, which Arrow cannot hold
        pa.parquet.write_table(pa.Table.from_pylist(wide), tmp_path / "wide.parquet")
        assert found(tmp_path / "wide.parquet", domain, choices) == expected
    with (tmp_path / "wide.csv").open("w", newline="", encoding="utf-8") as stream:
        table = csv.DictWriter(stream, list(wide[0]))
        table.writeheader()
        table.writerows({key: cell(value) for key, value in row.items()} for row in wide)
    if name == "reply-lists":  # a list as text may be a reply
        with pytest.raises(QAdapterError, match="lists of texts written out as text"):
            open_reader(tmp_path / "wide.csv")
    else:
        assert found(tmp_path / "wide.csv", domain, choices) == expected


def test_system_texts_and_context_are_read_or_refused() -> None:
    """No layout drops a system text, earlier turns, a context, tools, weights or images beside its fields."""
    beside: dict[str, Any] = {
        **dict.fromkeys(("system", "system_prompt", "System", "systemMessage", "developer"), "Zyx"),
        **dict.fromkeys(("context", "document", "scenario", "persona"), "Zyx"),
        "history": [["Zyx", "Zyx"]],
        "tools": [{"name": "Zyx"}],
        "image_path": "Zyx.png",
        "weight": 0.3,
    }
    for name, (good, needs) in GOOD.items():
        if name == "mapping" or BY_NAME[name].group == "unpaired":
            continue
        for field, value in beside.items():
            if field in good or any(field.lower() == key.lower() for key in good):
                continue
            try:
                candidates = parse({**good, field: value}, **needs)
            except QAdapterError:
                continue
            for candidate in candidates:
                assert isinstance(candidate, Reason) or "Zyx" in candidate.prompt[0]["content"], (name, field)


# A layout as it is published, and as tables and copies spell it; each gives `Why?` with `Because.` before `No.`.
SPELT: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    (
        "openai-preference",
        {
            "input": {"messages": [{**TURNS[0], "name": None, "tool_calls": None}], "tools": None},
            "preferred_output": [{**TURNS[1], "refusal": None, "weight": None, "annotations": []}],
            "non_preferred_output": OTHER[1],
            "metadata": {"a": 1},
        },
        {},
    ),
    (
        "nova-dpo",
        {
            "schemaVersion": "bedrock-conversation-2024",
            "system": [],
            "messages": [
                {"role": "user", "content": [{"text": "Why?"}], "candidates": None},
                {
                    "role": "assistant",
                    "content": None,
                    "candidates": [
                        {"content": [{"text": CHOSEN}], "preferenceLabel": "PREFERRED"},
                        {"content": [{"text": REJECTED}], "preferenceLabel": "NON-PREFERRED"},
                    ],
                },
            ],
        },
        {},
    ),
    (
        "helpsteer2-preference",
        {"prompt": "Why?", "response_1": REJECTED, "response_2": CHOSEN, "preference_strength": "2.0"},
        {},
    ),
    (
        "pku-saferlhf",
        {
            "prompt": "Why?",
            "response_0": REJECTED,
            "response_1": CHOSEN,
            "better_response_id": 1,
            "safer_response_id": None,
        },
        {},
    ),
    (
        "shp",
        {"history": "Why?", "human_ref_A": REJECTED, "human_ref_B": CHOSEN, "labels": "0.0", "domain": "askculinary"},
        {},
    ),
    (
        "arena-55k",
        {
            "prompt": '["Why?"]',
            "response_a": json.dumps([REJECTED]),
            "response_b": json.dumps([CHOSEN]),
            "winner_model_a": "False",
            "winner_model_b": "True",
        },
        {},
    ),
    ("webgpt", {"question": "Why?", "answer_0": REJECTED, "score_0": "-0.5", "answer_1": CHOSEN, "score_1": "0.5"}, {}),
    (
        "alpaca-farm",
        {"instruction": "Why?", "input": None, "output_1": REJECTED, "output_2": CHOSEN, "preference": "2.0"},
        {},
    ),
    ("sharegpt-ranking", {"conversations": TURNS[:1], "messages": None, "chosen": CHOSEN, "rejected": REJECTED}, {}),
    (
        "alpaca-ranking",
        {"instruction": "Why?", "input": "", "history": "[]", "chosen": CHOSEN, "rejected": REJECTED},
        {},
    ),
    (
        "trl-plain",
        {**PLAIN, "labels": [], "reason": "shorter", "comments": "", "annotated_by": "x", "task_type": "qa"},
        {},
    ),
    ("trl-plain", {**PLAIN, "history": None, "context": "", "input": None, "messages": None, "tools": "[]"}, {}),
    (
        "trl-conversational",
        {**WHOLE, "prompt": "Why?", "instruction": "Why?", "generations": ["a"], "ratings": [1], "rationales": ["r"]},
        {},
    ),
]


@pytest.mark.parametrize(("name", "record", "choices"), SPELT)
def test_spellings_of_tables_and_copies(name: str, record: Any, choices: dict[str, Any]) -> None:
    reader = recognise([record], choices=Choices(**choices))
    assert reader.name == name
    assert reader.read(record) == [PreferencePair(({"role": "user", "content": "Why?"},), CHOSEN, REJECTED)]


def test_what_a_round_and_two_contexts_say() -> None:
    """MT-bench in a table: the first of two rounds was judged. Two fields for one prompt must agree."""
    rounds = [*TURNS, {"role": "user", "content": "So?"}]
    both = {
        "conversation_a": [*rounds, {"role": "assistant", "content": "x"}],
        "conversation_b": [*rounds, {"role": "assistant", "content": "y"}],
    }
    assert parse({**both, "winner": "model_a", "turn": "1"}) == [Reason.NO_PREFERENCE]
    (pair,) = parse({**both, "winner": "model_a", "turn": "2"})
    assert pair.chosen == "x"
    ranked = {"conversations": TURNS[:1], "chosen": TURNS[1], "rejected": OTHER[1]}
    assert len(parse({**ranked, "messages": TURNS[:1]})) == 1
    assert parse({**ranked, "messages": rounds[2:]}) == [Reason.WRONG_FIELDS]


def test_earlier_turns_of_unpaired_rows() -> None:
    """LLaMA-Factory's tagged rows have a history; it is part of the prompt that two rows must share."""
    row = {"instruction": "Why?", "input": "", "history": [["Hi", "Hello"]], "output": CHOSEN, "kto_tag": "True"}
    bad = {**row, "output": REJECTED, "kto_tag": "false"}
    reader = recognise([row, bad], choices=Choices(pairing="all"))
    candidates = [c for line, one in enumerate((row, bad, {**bad, "history": []}), 1) for c in reader.read(one, line)]
    turns = [("user", "Hi"), ("assistant", "Hello"), ("user", "Why?")]
    assert candidates == [
        PreferencePair(tuple({"role": role, "content": words} for role, words in turns), CHOSEN, REJECTED)  # type: ignore[misc]
    ]


def test_every_layout_is_exported() -> None:
    assert {row.name for row in FORMATS} <= set(GOOD)
