"""The same records give the same pairs from a file, in Python and with the command, whatever their layout."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qadapter.command.parser import main
from qadapter.errors import QAdapterError
from qadapter.preferences.building import Choices
from qadapter.preferences.pair import PreferencePair
from qadapter.preferences.reader import Accepted
from qadapter.preferences.reading import read_pairs
from qadapter.preferences.recognition import recognise
from qadapter.preferences.records import Reason
from qadapter.preferences.stream import parse_files
from qadapter.training.encoded_pairs import encode_dataset
from tests.support.tiny_chat import byte_tokenizer

USER, GOOD, BAD = (
    {"role": "user", "content": "Why?"},
    {"role": "assistant", "content": "Because."},
    {"role": "assistant", "content": "No."},
)
PARTS = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]
ROWS: list[dict[str, Any]] = [
    {"chosen": "2+2=4", "rejected": "2+2=5"},
    {"chosen": "Why? Because.", "rejected": "Why? No."},
    {"chosen": "天空是什么颜色？蓝色。", "rejected": "天空是什么颜色？绿色。"},
    {"prompt": "Why?", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"prompt": [USER], "chosen": "Because.", "rejected": "No."},
    {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
    {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
    {"chosen": [{"role": "system", "content": ""}, USER, GOOD], "rejected": [USER, BAD]},
    {"chosen": [{"role": "system", "content": None}, USER, GOOD], "rejected": [USER, BAD]},
    {"prompt": [{"role": "user", "content": PARTS}], "chosen": [GOOD], "rejected": [BAD]},
    {"system": "Be kind.", "question": "Why?", "chosen": "Because.", "rejected": "No."},
    {"prompt": "Why?", "chosen": [USER, GOOD], "rejected": None},
]


def from_file(file: Path) -> list[Any]:
    return [item.pair if isinstance(item, Accepted) else item.reason for item in read_pairs(file)]


@pytest.mark.slow
@pytest.mark.parametrize("row", ROWS)
def test_file_python_and_command_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str], row: dict[str, Any]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n", encoding="utf-8")
    try:
        (found,) = from_file(file)
    except QAdapterError:
        found = None
    tokenizer = byte_tokenizer()
    code = main(["data", str(file)])
    shown = capsys.readouterr()
    if isinstance(found, PreferencePair):
        assert code == 0
        assert f"chosen: {found.chosen}" in shown.out
        assert all(turn["content"] in shown.out for turn in found.prompt)
        # the token ids say that prompt and replies are those of the file's pair
        ours, theirs = (encode_dataset(rows, tokenizer, 256) for rows in ([row], [found]))
        assert ours[0] == theirs[0]
    else:
        assert code == 2
        with pytest.raises(QAdapterError) as caught:
            encode_dataset([row], tokenizer, 256)
        if found is not None:
            assert found.value in str(caught.value)
            assert found.value in shown.err


def test_frames_and_datasets_are_read_like_lists() -> None:
    import pandas as pd
    from datasets import Dataset, DatasetDict

    rows = [
        {"prompt": "Why?", "chosen": "Because.", "rejected": "No.", "system": system} for system in (None, "Be kind.")
    ]
    tokenizer = byte_tokenizer()
    expected = list(encode_dataset(rows, tokenizer, 256))
    for data in (pd.DataFrame(rows), Dataset.from_list(rows), tuple(rows)):
        assert list(encode_dataset(data, tokenizer, 256)) == expected  # type: ignore[arg-type]
    messages = [{"chosen": [USER, GOOD], "rejected": [USER, BAD]}]
    frame = Dataset.from_list(messages).to_pandas()  # cells are numpy arrays of dictionaries
    assert list(encode_dataset(frame, tokenizer, 256)) == list(encode_dataset(messages, tokenizer, 256))
    with pytest.raises(QAdapterError, match="give one of its splits"):
        encode_dataset(DatasetDict({"train": Dataset.from_list(rows)}), tokenizer, 256)  # type: ignore[arg-type]


# ---- real rows in six layouts ----

TO_LAYOUT: dict[str, Callable[[PreferencePair], dict[str, Any]]] = {
    "trl-conversational": lambda pair: dict(pair.to_trl()),
    "trl-conversational-implicit": lambda pair: {
        "chosen": [*pair.prompt, {"role": "assistant", "content": pair.chosen}],
        "rejected": [*pair.prompt, {"role": "assistant", "content": pair.rejected}],
    },
    "openai-preference": lambda pair: {
        "input": {"messages": list(pair.prompt), "tools": []},
        "preferred_output": [{"role": "assistant", "content": [{"type": "text", "text": pair.chosen}]}],
        "non_preferred_output": [{"role": "assistant", "content": pair.rejected}],
    },
    "sharegpt-ranking": lambda pair: {
        "conversations": [
            {"from": "human" if turn["role"] == "user" else "gpt", "value": turn["content"]} for turn in pair.prompt
        ],
        "chosen": {"from": "gpt", "value": pair.chosen},
        "rejected": {"from": "gpt", "value": pair.rejected},
    },
    "chatbot-arena": lambda pair: {
        "conversation_a": [*pair.prompt, {"role": "assistant", "content": pair.rejected}],
        "conversation_b": [*pair.prompt, {"role": "assistant", "content": pair.chosen}],
        "winner": "model_b",
    },
    "transcript:chatml": lambda pair: {
        side: "".join(
            f"<|im_start|>{role}\n{words}<|im_end|>\n"
            for role, words in [*((t["role"], t["content"]) for t in pair.prompt), ("assistant", getattr(pair, side))]
        )
        for side in ("chosen", "rejected")
    },
    "nectar": lambda pair: {
        "prompt": "".join(
            f"\n\n{'Human' if turn['role'] == 'user' else 'Assistant'}: {turn['content']}" for turn in pair.prompt
        )
        + "\n\nAssistant: ",
        "answers": [{"answer": pair.rejected, "rank": 2.0}, {"answer": pair.chosen, "rank": 1.0}],
    },
}


@pytest.mark.parametrize("source", ["hh-rlhf/harmless-base.jsonl", "hh-rlhf/helpful.text-score.json"])
def test_real_rows_in_other_layouts_are_the_same_pairs(shared_data: Path, tmp_path: Path, source: str) -> None:
    """Five rows of several rounds of each source, rewritten into seven layouts."""
    real = [pair for pair in parse_files([shared_data / source]).pairs if len(pair.prompt) > 1][:5]
    assert len(real) == 5
    for name, rewrite in TO_LAYOUT.items():
        file = tmp_path / f"{name.replace(':', '-')}.jsonl"
        file.write_text("".join(json.dumps(rewrite(pair)) + "\n" for pair in real), encoding="utf-8")
        parsed = parse_files([file])
        assert parsed.formats == {file: name}
        assert parsed.pairs == real, name


# ---- what leaves a choice ----


def lines(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


KTO = [
    ("Why?", "Because.", True),
    ("Why?", "No.", False),
    ("Why?", "Never.", 0),
    ("When?", "Now.", 1),
    ("Why?", "So.", True),
]


@pytest.mark.parametrize(
    ("pairing", "expected", "alone"),
    [
        ("all", {("Because.", "No."), ("Because.", "Never."), ("So.", "No."), ("So.", "Never.")}, [4]),
        ("first", {("Because.", "No.")}, [3, 4, 5]),
    ],
)
def test_unpaired_rows_are_paired_by_prompt(tmp_path: Path, pairing: Any, expected: Any, alone: list[int]) -> None:
    """2 good and 2 bad replies to a prompt are 4 pairs, or 1 of the first ones; rows without a partner are counted."""
    file = lines(tmp_path / "kto.jsonl", *({"prompt": p, "completion": c, "label": label} for p, c, label in KTO))
    items = list(read_pairs(file, choices=Choices(pairing=pairing)))
    assert {(item.pair.chosen, item.pair.rejected) for item in items if isinstance(item, Accepted)} == expected
    left = [(item.line, item.reason) for item in items if not isinstance(item, Accepted)]
    assert left == [(line, Reason.NO_PARTNER) for line in alone]


def test_ranked_lists_give_all_pairs_or_neighbours(tmp_path: Path) -> None:
    """Four replies: 4·3/2 = 6 pairs, 3 of neighbours; a tie is counted and left out."""
    answers = [{"answer": name, "rank": rank} for name, rank in (("b", 2), ("a", 1), ("d", 4), ("c", 3))]
    file = lines(tmp_path / "nectar.jsonl", {"prompt": "Why?", "answers": answers})
    every = parse_files([file])
    assert {(p.chosen, p.rejected) for p in every.pairs} == {tuple(two) for two in ("ab", "ac", "ad", "bc", "bd", "cd")}
    near = parse_files([file], choices=Choices(ranking="neighbours"))
    assert [(p.chosen, p.rejected) for p in near.pairs] == [("a", "b"), ("b", "c"), ("c", "d")]
    lines(file, {"prompt": "Why?", "answers": [*answers, {"answer": "e", "rank": 4}]})
    tied = parse_files([file], choices=Choices(ranking="neighbours"))
    assert (tied.read, len(tied.pairs), [r.reason for r in tied.rejected]) == (4, 3, [Reason.NO_PREFERENCE])


def test_margins_are_kept_and_weak_pairs_dropped(tmp_path: Path) -> None:
    """Margins 3, 0.5, 0 and −2: the decision counts even against the scores, unless ties are dropped."""
    row = {"prompt": "Why?", "chosen": [USER, GOOD], "rejected": [USER, BAD]}
    rows = [{**row, "score_chosen": 5 + margin, "score_rejected": 5} for margin in (3, 0.5, 0, -2)]
    file = lines(tmp_path / "rows.jsonl", *rows)
    assert [pair.margin for pair in parse_files([file]).pairs] == [3, 0.5, 0, -2]
    assert [pair.margin for pair in parse_files([file], choices=Choices(ties="drop")).pairs] == [3, 0.5]
    strong = parse_files([file], choices=Choices(min_margin=1))
    assert [pair.margin for pair in strong.pairs] == [3]
    assert {item.reason for item in strong.rejected} == {Reason.WEAK_PREFERENCE}
    with pytest.raises(QAdapterError, match="has no margins"):
        parse_files([lines(tmp_path / "plain.jsonl", row)], choices=Choices(min_margin=1))


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"history": [["Hi", "Hello"]]}, "`history`, which would be ignored"),
        ({"context": "In Rome."}, "`context`"),
        ({"weight": 0.5}, "`weight`"),
        ({"notes_of_the_team": ["x"]}, "`notes_of_the_team`"),
        ({"domain": "academy"}, None),
        ({"weight": 1, "history": [], "chosen_model": "m", "helpfulness": 4}, None),
    ],
)
def test_fields_that_would_be_ignored_are_refused(tmp_path: Path, extra: dict[str, Any], words: str | None) -> None:
    file = lines(tmp_path / "rows.jsonl", {"prompt": "Why?", "chosen": "Because.", "rejected": "No.", **extra})
    if words is None:
        assert len(parse_files([file]).pairs) == 1
        return
    with pytest.raises(QAdapterError) as caught:
        parse_files([file])
    assert words in str(caught.value)
    # only a few have it: those are quarantined, the rest is read
    plain = {"prompt": "Why?", "chosen": "Because.", "rejected": "No."}
    parsed = parse_files([lines(file, plain, plain, {**plain, **extra})])
    assert (len(parsed.pairs), [(r.line, r.reason) for r in parsed.rejected]) == (2, [(3, Reason.WRONG_FIELDS)])


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"instruction": "Why?", "output": ["a", "b"]}, "old Alpaca ranking. Set `fields"),
        ({"query": "Why?", "response": "a", "rejected_response": "b"}, "query form. Set `fields"),
        (
            {"prompt": "p", "chosen": {"answer": "a"}, "rejected": {"answer": "b"}},
            "`chosen` and `rejected`. Set `fields`",
        ),
        (
            {"prompt": "p", "response_a": "x", "response_b": "y", "chosen": "response_b"},
            "no rejected one. Set `fields`",
        ),
        ({"messages": [USER, GOOD]}, "supervised fine-tuning"),
        ({"prompt": "Why?", "completions": ["a", "b"], "labels": [True, False]}, "stepwise supervision"),
        ({"chosen": {"0": "a", "1": "c"}, "rejected": {"0": "b", "1": "d"}}, "by columns"),
        ({"question": "q", "input": "i", "chosen": "a", "rejected": "b"}, "`input`, which would be ignored"),
        ({"prompt": "p", "chosen": "a", "rejected": "b", "chosen_messages": [USER]}, "`chosen_messages`"),
        (
            {"prompt": "[{'role': 'user'}\n {'role': 'x'}]", "chosen": "x", "rejected": "y"},
            "Write the data again as JSON",
        ),
        ({"data": {"x": 1}, "annotations": [{"result": []}]}, "export of Label Studio"),
    ],
)
def test_what_is_no_pairs_is_refused_with_the_way_out(tmp_path: Path, row: dict[str, Any], words: str) -> None:
    with pytest.raises(QAdapterError) as caught:
        recognise([row])
    assert words in str(caught.value)


def test_two_layouts_that_both_fit_are_an_error(tmp_path: Path) -> None:
    both = {
        **{"prompt": "Why?", "response_0": "Because.", "response_1": "No.", "better_response_id": 0},
        **{"response_2": "No.", "preference_strength": -1},
    }
    with pytest.raises(QAdapterError) as caught:
        parse_files([lines(tmp_path / "rows.jsonl", both)])
    assert all(f"\n  {name}: {{" in str(caught.value) for name in ("helpsteer2-preference", "pku-saferlhf"))
    assert "set `fields`" in str(caught.value)


def test_a_judgement_and_a_decision_must_agree(tmp_path: Path) -> None:
    row = {"prompt": "Why?", "pos_resp": "Because.", "neg_resp": "No.", "rejected": "No."}
    parsed = parse_files([lines(tmp_path / "r.jsonl", {**row, "chosen": "Because."}, {**row, "chosen": "No."})])
    assert (len(parsed.pairs), [item.reason for item in parsed.rejected]) == (1, [Reason.NO_PREFERENCE])


@pytest.mark.parametrize(("name", "value"), [("preferred", "x"), ("score", "x"), ("pairing", "all")])
def test_a_choice_that_selects_nothing_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    file = lines(tmp_path / "rows.jsonl", {"prompt": "Why?", "chosen": "Because.", "rejected": "No."})
    with pytest.raises(QAdapterError, match=rf"does not support `{name}: {value}`.*remove it"):
        parse_files([file], choices=Choices(**{name: value}))
