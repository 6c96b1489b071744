"""Records in all layouts, damaged at random: none ends the reading, and each candidate is counted once.

In CI some thousand records of fixed seeds. `python -m tests.qadapter.preferences.test_fuzz_layouts 100000` reads as
many as asked and prints the sums; hypothesis shrinks what fails in the property below.
"""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qadapter.errors import QAdapterError
from qadapter.preferences.building import Choices
from qadapter.preferences.formats import BY_NAME
from qadapter.preferences.pair import PreferencePair
from qadapter.preferences.reader import Accepted
from qadapter.preferences.reading import read_pairs
from qadapter.preferences.recognition import recognise
from qadapter.preferences.records import Reason

SEEDS = (1, 2, 3, 20261129)
"""A run of the fuzzer that found a fault adds its seed here."""

TURNS = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}]
OTHER = [TURNS[0], {"role": "assistant", "content": "No."}]
HH = ("\n\nHuman: Why?\n\nAssistant: Because.", "\n\nHuman: Why?\n\nAssistant: No.")
CHATML = tuple(
    f"<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n{reply}<|im_end|>\n" for reply in ("Because.", "No.")
)
TWO = {"chosen": "Because.", "rejected": "No."}
SCORED = [
    {"response": "Because.", "score": 3, "rank": 0, "answer": "a"},
    {"response": "No.", "score": 1, "rank": 1, "answer": "b"},
]

# one good record of each layout, and the choices that it needs
GOOD: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "openai-preference": (
        {"input": {"messages": TURNS[:1]}, "preferred_output": TURNS[1:], "non_preferred_output": OTHER[1:]},
        {},
    ),
    "nova-dpo": (
        {
            "messages": [
                TURNS[0],
                {
                    "role": "assistant",
                    "candidates": [
                        {"content": [{"text": "Because."}], "preferenceLabel": "preferred"},
                        {"content": [{"text": "No."}], "preferenceLabel": "non-preferred"},
                    ],
                },
            ]
        },
        {},
    ),
    "gemini-preference": (
        {
            "contents": [{"role": "user", "parts": [{"text": "Why?"}]}],
            "completions": [
                {"score": score, "completion": {"role": "model", "parts": [{"text": words}]}}
                for score, words in ((1, "Because."), (0, "No."))
            ],
        },
        {},
    ),
    "nemo-ranked": (
        {
            "context": TURNS[:1],
            "completions": [{"rank": 0, "completion": TURNS[1:]}, {"rank": 1, "completion": OTHER[1:]}],
        },
        {},
    ),
    "helpsteer3-preference": (
        {"context": TURNS[:1], "response1": "Because.", "response2": "No.", "overall_preference": -2},
        {},
    ),
    "helpsteer2-preference": (
        {
            "prompt": "Why?\n\n<extra_id_1>Assistant\nSo.\n\n<extra_id_1>User\nWhy?",
            "response_1": "No.",
            "response_2": "Because.",
            "preference_strength": 2,
        },
        {},
    ),
    "pku-saferlhf": (
        {
            "prompt": "Why?",
            "response_0": "Because.",
            "response_1": "No.",
            "better_response_id": 0,
            "safer_response_id": 1,
        },
        {"preferred": "better_response_id"},
    ),
    "chatbot-arena": ({"conversation_a": TURNS, "conversation_b": OTHER, "winner": "model_a", "turn": 1}, {}),
    "arena-55k": (
        {
            "prompt": '["Why?"]',
            "response_a": '["Because."]',
            "response_b": '["No."]',
            "winner_model_a": 1,
            "winner_model_b": 0,
        },
        {},
    ),
    "shp": ({"history": "Why?", "human_ref_A": "Because.", "human_ref_B": "No.", "labels": 1}, {}),
    "summarize-comparisons": (
        {
            "info": {"post": "Rain.", "title": "t", "subreddit": "s"},
            "summaries": [{"text": "Because."}, {"text": "No."}],
            "choice": 0,
        },
        {},
    ),
    "webgpt": (
        {"question": {"full_text": "Why?"}, "answer_0": "Because.", "answer_1": "No.", "score_0": 1, "score_1": -1},
        {},
    ),
    "prometheus-preference": (
        {"orig_instruction": "Why?", "orig_response_A": "Because.", "orig_response_B": "No.", "orig_preference": "A"},
        {},
    ),
    "unified-feedback": ({"conv_A": TURNS, "conv_B": OTHER, "conv_A_rating": 5, "conv_B_rating": 1}, {}),
    "alpaca-farm": (
        {"instruction": "Why?", "input": "x", "output_1": "Because.", "output_2": "No.", "preference": 1},
        {},
    ),
    "stack-exchange-paired": ({"question": "Why?", "response_j": "Because.", "response_k": "No."}, {}),
    "cvalues": ({"prompt": "Why?", "pos_resp": "Because.", "neg_resp": "No."}, {}),
    "gpt4llm-comparison": ({"user_input": "Why?", "responses_and_scores": SCORED}, {}),
    "oasst-tree": (
        {
            "message_tree_id": "r",
            "prompt": {
                "role": "prompter",
                "text": "Why?",
                "replies": [
                    {"role": "assistant", "text": words, "rank": rank, "replies": []}
                    for rank, words in enumerate(("Because.", "No."))
                ],
            },
        },
        {},
    ),
    "dsp": (
        {"query": "Why?", "responses": {"academy": "Because.", "normal": "No.", "business": "So."}},
        {"domain": "academy"},
    ),
    "text-score": ({"text": list(HH), "score": [1, 0]}, {}),
    "messages-objects": ({"chosen": {"messages": TURNS}, "rejected": {"messages": OTHER}}, {}),
    "ms-swift": ({"messages": TURNS, "rejected_response": "No.", "margin": 0.5}, {}),
    "argilla-responses": (
        {
            "instruction": "Why?",
            "chosen_response": "Because.",
            "rejected_response": "No.",
            "chosen_rating": 8,
            "rejected_rating": 2,
        },
        {},
    ),
    "sharegpt-ranking": (
        {
            "conversations": [{"from": "human", "value": "Why?"}],
            "chosen": {"from": "gpt", "value": "Because."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        {},
    ),
    "trl-conversational": (
        {"prompt": "Why?", "chosen": TURNS, "rejected": OTHER, "score_chosen": 2, "score_rejected": 1},
        {},
    ),
    "trl-conversational-implicit": ({"chosen": TURNS, "rejected": OTHER}, {}),
    "reply-lists": ({"prompt": "Why?", "chosen": ["Because.", "So."], "rejected": ["No."]}, {}),
    "hh-dialogues": ({"chosen": HH[0], "rejected": HH[1]}, {}),
    "transcript": ({"chosen": CHATML[0], "rejected": CHATML[1]}, {}),
    "trl-plain": ({"prompt": "Why?", "system": "Be kind.", **TWO}, {}),
    "alpaca-ranking": ({"instruction": "Why?", "input": "x", "history": [["Hi", "Hello"]], **TWO}, {}),
    "orca": ({"system": "Be kind.", "question": "Why?", **TWO}, {}),
    "icr": ({"input": "Why?", **TWO, "status": "swapped"}, {}),
    "trl-plain-implicit": ({"chosen": "Why? Because.", "rejected": "Why? No."}, {}),
    "ultrafeedback-raw": (
        {
            "instruction": "Why?",
            "completions": [{"response": "Because.", "overall_score": 5}, {"response": "No.", "overall_score": 2}],
        },
        {"score": "overall_score"},
    ),
    "nectar": ({"prompt": "\n\nHuman: Why?\n\nAssistant: ", "answers": SCORED}, {}),
    "distilabel-generations": ({"instruction": "Why?", "generations": ["Because.", "No."], "ratings": [5, "1"]}, {}),
    "kto": ({"prompt": "Why?", "completion": "Because.", "label": True}, {"pairing": "all"}),
    "kto-messages": ({"messages": TURNS, "label": True}, {"pairing": "first"}),
    "kto-instruction": ({"instruction": "Why?", "input": "", "output": "No.", "kto_tag": False}, {"pairing": "all"}),
    "beavertails": ({"prompt": "Why?", "response": "No.", "is_safe": False}, {"pairing": "all"}),
    "mapping": (
        {"q": "Why?", "a": "Because.", "b": "No.", "v": ["A"], "s": -1},
        {"fields": {"prompt": "q", "responses": {"A": "a", "B": "b"}, "preferred": "v", "margin": "abs(s)"}},
    ),
}
ODD: list[Any] = [
    *(None, "", " ", 0, -1, 3.5, True, float("nan"), float("inf"), 10**400, [], {}, [[]], [None], {"": None}, "\ud800"),
    *(
        "N/A",
        "[INST]",
        "</s>",
        "\n\nHuman:",
        "<|im_start|>",
        "### Response:",
        "\x00",
        "a" * 3000,
        "天空",
        [TURNS],
        TURNS,
    ),
    *(
        {"role": "tool", "content": "x"},
        [{"role": "user", "content": [{"type": "image", "url": "x"}]}],
        [1, 2, 3],
        "[{'role':",
    ),
    *(
        {"role": ["user"], "content": ["x"]},
        [{"role": "user"}],
        {"messages": None},
        [["a", "b"]],
        [{"from": "gpt", "value": 1}],
    ),
]
NAMES = (
    "prompt chosen rejected system history context tools weight messages margin score label completions input status "
    "turn"
).split()


def damaged(record: Any, chance: random.Random) -> Any:
    """A copy with some of its values, keys or items replaced, added or taken away."""
    copy = json.loads(json.dumps(record))
    for _ in range(chance.choice((0, 1, 1, 2, 3))):
        place, key = copy, chance.choice(list(copy) or [""])
        while (
            isinstance(place.get(key) if isinstance(place, dict) else place[key], dict | list) and chance.random() < 0.7
        ):
            inner = place[key]
            if not inner:
                break
            place, key = (
                inner,
                (chance.choice(list(inner)) if isinstance(inner, dict) else chance.randrange(len(inner))),
            )
        action = chance.random()
        if action < 0.6:
            place[key] = deepcopy(chance.choice(ODD))
        elif action < 0.75 and isinstance(place, dict):
            place.pop(key)
        elif action < 0.9 and isinstance(place, list):
            place.insert(key, deepcopy(chance.choice(ODD)))
        elif isinstance(place, dict):
            place[chance.choice(NAMES)] = deepcopy(chance.choice(ODD))
        if not copy:
            break
    return copy


def run(seed: int, records: int) -> Counter[str]:
    """Reads so many damaged records of every layout in turn; counts what became of them."""
    chance = random.Random(seed)
    counts: Counter[str] = Counter()
    names = list(GOOD)
    while counts["records"] < records:
        name = names[counts["files"] % len(names)]
        good, needs = GOOD[name]
        domain, choices = (
            needs.get("domain"),
            Choices(**{key: value for key, value in needs.items() if key != "domain"}),
        )
        rows = [good if chance.random() < 0.5 else damaged(good, chance) for _ in range(40)]
        counts["files"] += 1
        try:
            reader = recognise(rows, domain=domain, choices=choices)
        except QAdapterError:
            counts["refused files"] += 1
            continue
        for line, row in enumerate(rows, 1):
            candidates = reader.read(row, line)
            assert candidates or reader.across_records, (name, row)
            counts["records"] += 1
            counts["read"] += len(candidates)
            for candidate in candidates:
                counts["used" if isinstance(candidate, PreferencePair) else "quarantined"] += 1
                if isinstance(candidate, PreferencePair):
                    check(candidate)
        for left in reader.finish():
            assert left.candidate is Reason.NO_PARTNER
            counts["read"] += 1
            counts["quarantined"] += 1
    assert counts["used"] + counts["quarantined"] == counts["read"]
    return counts


def check(pair: PreferencePair) -> None:
    """What every pair must be: text that a file and a chat template take, two different replies."""
    json.dumps(pair.to_row(), ensure_ascii=False, allow_nan=False).encode()
    roles = [turn["role"] for turn in pair.prompt]
    start = roles[:1] == ["system"]
    assert roles[start:] == (["user", "assistant"] * len(roles))[: len(roles) - start]
    assert roles[-1] == "user"
    assert pair.chosen
    assert pair.rejected
    assert pair.chosen != pair.rejected


def test_every_layout_is_fuzzed() -> None:
    assert set(GOOD) == {*BY_NAME, "mapping"}


@pytest.mark.parametrize("seed", SEEDS)
def test_damaged_records_are_used_or_quarantined(seed: int) -> None:
    counts = run(seed, 1500)
    assert counts["used"] > 500
    assert counts["quarantined"] > 100


def files(count: int) -> Iterator[list[Any]]:
    chance = random.Random(count)
    for good, _ in GOOD.values():
        yield [damaged(good, chance) for _ in range(count)]


def test_damaged_files_add_up(tmp_path: Path) -> None:
    """The same through files: a candidate comes out used or rejected, in any layout that the file was taken for."""
    for number, rows in enumerate(files(12)):
        file = tmp_path / f"{number}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        try:
            items = list(read_pairs(file))
        except QAdapterError:
            continue
        assert {item.line for item in items} <= set(range(1, 13))
        assert len({item.line for item in items}) == 12
        assert any(isinstance(item, Accepted) for item in items) or items


values = st.recursive(
    st.sampled_from([value for value in ODD if value == value]) | st.text(max_size=8) | st.integers() | st.booleans(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*NAMES, "role", "content"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(name=st.sampled_from(sorted(GOOD)), key=st.integers(0, 9), value=values, extra=st.sampled_from(NAMES))
def test_any_value_in_any_field(name: str, key: int, value: Any, extra: str) -> None:
    good, needs = GOOD[name]
    field = list(good)[key % len(good)]
    choices = Choices(**{key: value for key, value in needs.items() if key != "domain"})
    reader = recognise([good], domain=needs.get("domain"), choices=choices)
    for record in ({**good, field: value}, {**good, extra: value}):
        for candidate in reader.read(record, 1):
            if isinstance(candidate, PreferencePair):
                check(candidate)
            else:
                assert isinstance(candidate, Reason)


if __name__ == "__main__":
    asked, first = int(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 1
    print(dict(run(first, asked)))
