"""Every format and every reason with hand-written records, the real files by their counts, and garbage."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qadapter.errors import QAdapterError
from qadapter.preferences import text_records
from qadapter.preferences.building import Context
from qadapter.preferences.formats import BY_NAME, FORMATS
from qadapter.preferences.pair import Message, PreferencePair
from qadapter.preferences.reader import Accepted, Reader, Rejected
from qadapter.preferences.reading import detect_format, read_pairs
from qadapter.preferences.records import Reason
from qadapter.preferences.turns import END_TOKENS


def user(content: str) -> Message:
    return Message(role="user", content=content)


def assistant(content: str) -> Message:
    return Message(role="assistant", content=content)


def hh(*turns: str) -> str:
    return "".join(f"\n\n{('Human', 'Assistant')[i % 2]}: {turn}" for i, turn in enumerate(turns))


def lines(file: Path, *rows: Any) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def outcomes(file: Path, **options: Any) -> list[tuple[int, Any]]:
    return [
        (item.line, item.pair if isinstance(item, Accepted) else item.reason) for item in read_pairs(file, **options)
    ]


def parse_record(record: Any, name: str, *, domain: str | None = None) -> list[PreferencePair | Reason]:
    """The candidates of one record, read in a given layout without a choice."""
    row = BY_NAME[name]
    return Reader(name, Context(domain=domain), row.parse, row).read(record)


def only(record: Any, name: str, domain: str | None = None) -> PreferencePair | Reason:
    (candidate,) = parse_record(record, name, domain=domain)
    return candidate


# ------------------------------------------------------------------------------------------------ good records

PAIR = PreferencePair((user("Why?"),), "Because.", "No.")
LONGER = PreferencePair((user("Hi"), assistant("Hello"), user("Why?")), "Because.", "No.")
WITH_SYSTEM = PreferencePair((Message(role="system", content="Be kind."), user("Why?")), "Because.", "No.")

GOOD: list[tuple[str, dict[str, Any], PreferencePair]] = [
    ("hh-dialogues", {"chosen": hh("Why?", "Because."), "rejected": hh("Why?", "No.")}, PAIR),
    (
        "hh-dialogues",
        {"chosen": hh("Hi", "Hello", "Why?", "Because."), "rejected": hh("Hi", "Hello", "Why?", "No.")},
        LONGER,
    ),
    # Windows line ends, and no blank lines before the first turn
    ("hh-dialogues", {"chosen": "Human: Why?\r\n\r\nAssistant: Because.", "rejected": hh("Why?", "No.")}, PAIR),
    ("text-score", {"text": [hh("Why?", "No."), hh("Why?", "Because.")], "score": [-1, 0.5]}, PAIR),
    ("dsp", {"query": " Why? ", "responses": {"academy": "Because.", "normal": "No."}}, PAIR),
    ("trl-conversational", LONGER.to_trl(), LONGER),
    ("trl-conversational", WITH_SYSTEM.to_trl(), WITH_SYSTEM),
    # UltraFeedback binarized: the prompt as a string and again in both dialogues
    (
        "trl-conversational",
        {
            "prompt": "Why?",
            "chosen": [user("Why?"), assistant("Because.")],
            "rejected": [user("Why?"), assistant("No.")],
        },
        PAIR,
    ),
    ("trl-conversational", {**PAIR.to_trl(), "prompt": "Why?"}, PAIR),
    (
        "trl-conversational-implicit",
        {"chosen": [*LONGER.prompt, assistant("Because.")], "rejected": [*LONGER.prompt, assistant("No.")]},
        LONGER,
    ),
    ("trl-plain", {"prompt": "Why?", "chosen": " Because.", "rejected": " No."}, PAIR),
    # A prompt string that is an HH dialogue waiting for its reply (rm-static and its kin)
    (
        "trl-plain",
        {"prompt": hh("Hi", "Hello", "Why?") + "\n\nAssistant:", "chosen": " Because.", "rejected": " No."},
        LONGER,
    ),
    ("trl-plain-implicit", {"chosen": "Why? Because.", "rejected": "Why? No."}, PAIR),
]


@pytest.mark.parametrize(("file_format", "record", "pair"), GOOD)
def test_every_format_is_detected_and_parsed(
    tmp_path: Path, file_format: str, record: dict[str, Any], pair: PreferencePair
) -> None:
    file = lines(tmp_path / "a.jsonl", record)
    domain = "academy" if file_format == "dsp" else None
    assert detect_format(file, domain=domain) == file_format
    assert outcomes(file, domain=domain) == [(1, pair)]


def test_dsp_gives_a_pair_for_every_other_style() -> None:
    """Five styles, wanted one of them: 5 − 1 = 4 pairs, its response always the chosen one."""
    record = {"query": "Why?", "responses": {style: f"as {style}" for style in ("a", "b", "c", "d", "e")}}
    pairs = parse_record(record, "dsp", domain="c")
    assert pairs == [PreferencePair((user("Why?"),), "as c", f"as {style}") for style in ("a", "b", "d", "e")]


def test_text_score_gives_every_pair_of_dialogues() -> None:
    """Scores 1, 3, 1, 2 of four dialogues: 4·3/2 = 6 candidates, of which the tie has no order."""
    record = {"text": [hh("Q", name) for name in "abcd"], "score": [1, 3, 1, 2]}
    found = [
        (pair.chosen, pair.rejected) if isinstance(pair, PreferencePair) else pair
        for pair in parse_record(record, "text-score")
    ]
    assert found == [("b", "a"), Reason.NO_PREFERENCE, ("d", "a"), ("b", "c"), ("b", "d"), ("d", "c")]


def test_a_reply_in_two_assistant_turns_is_one_reply() -> None:
    record = {"chosen": hh("Q", "one") + "\n\nAssistant: two", "rejected": hh("Q", "three")}
    assert only(record, "hh-dialogues") == PreferencePair((user("Q"),), "one\n\ntwo", "three")


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("The sky is blue", "The sky is black", ("The sky is", "blue", "black")),  # never "The sky is bl"
        ("The sky is", "The sky is blue", ("The sky", "is", "is blue")),
        ("Q:\nfour words", "Q:\nfive", ("Q:", "four words", "five")),
        ("no common word", "now nothing", Reason.DIFFERENT_PROMPTS),
        ("one", "one two", Reason.DIFFERENT_PROMPTS),
    ],
)
def test_implicit_plain_prompt_ends_at_a_word(chosen: str, rejected: str, expected: Any) -> None:
    found = only({"chosen": chosen, "rejected": rejected}, "trl-plain-implicit")
    if isinstance(found, PreferencePair):
        assert (found.prompt[0]["content"], found.chosen, found.rejected) == expected
    else:
        assert found is expected


# ------------------------------------------------------------------------------------------------ bad records

BAD: list[tuple[str, Any, Reason]] = [
    ("hh-dialogues", ["a list"], Reason.NOT_AN_OBJECT),
    ("hh-dialogues", {"chosen": hh("Q", "A")}, Reason.WRONG_FIELDS),
    ("hh-dialogues", {"chosen": 3, "rejected": hh("Q", "A")}, Reason.WRONG_FIELDS),
    ("hh-dialogues", {"chosen": hh("Q", "A"), "rejected": "no turns at all"}, Reason.NOT_A_DIALOGUE),
    ("hh-dialogues", {"chosen": hh("Q", "A", "ends with the user"), "rejected": hh("Q", "A")}, Reason.NOT_A_DIALOGUE),
    ("hh-dialogues", {"chosen": "\n\nAssistant: A", "rejected": "\n\nAssistant: B"}, Reason.NOT_A_DIALOGUE),
    ("hh-dialogues", {"chosen": "Note." + hh("Q", "A"), "rejected": "Note." + hh("Q", "B")}, Reason.NOT_A_DIALOGUE),
    ("hh-dialogues", {"chosen": hh("Q", ""), "rejected": hh("Q", "A")}, Reason.EMPTY_REPLY),
    ("hh-dialogues", {"chosen": hh("", "A"), "rejected": hh("", "B")}, Reason.EMPTY_PROMPT),
    ("hh-dialogues", {"chosen": hh("Q", "A", " ", "B"), "rejected": hh("Q", "A", " ", "C")}, Reason.EMPTY_PROMPT),
    ("hh-dialogues", {"chosen": hh("Q", "A"), "rejected": hh("R", "B")}, Reason.DIFFERENT_PROMPTS),
    ("hh-dialogues", {"chosen": hh("Q", "A", "R", "B"), "rejected": hh("Q", "C")}, Reason.DIFFERENT_PROMPTS),
    ("hh-dialogues", {"chosen": hh("Q", "A "), "rejected": hh("Q", "A")}, Reason.IDENTICAL_REPLIES),
    ("hh-dialogues", {"chosen": hh("Q", "\ud800"), "rejected": hh("Q", "A")}, Reason.NOT_UNICODE),
    ("text-score", {"text": [hh("Q", "A")], "score": [1]}, Reason.WRONG_FIELDS),
    ("text-score", {"text": [hh("Q", "A"), hh("Q", "B")], "score": [1]}, Reason.WRONG_FIELDS),
    ("text-score", {"text": [hh("Q", "A"), hh("Q", "B")], "score": ["A", "B"]}, Reason.NO_PREFERENCE),
    ("text-score", {"text": [hh("Q", "A"), hh("Q", "B")], "score": [True, False]}, Reason.NO_PREFERENCE),
    ("text-score", {"text": [hh("Q", "A"), 7], "score": [1, 0]}, Reason.WRONG_FIELDS),
    ("text-score", {"text": [hh("Q", "A"), hh("Q", "B")]}, Reason.NO_PREFERENCE),
    ("text-score", {"text": [hh("Q", "A"), hh("Q", "B")], "score": [1, None]}, Reason.NO_PREFERENCE),
    ("text-score", {"text": [hh("Q", "A"), hh("Q", "B")], "score": [0.5, 0.5]}, Reason.NO_PREFERENCE),
    ("text-score", {"text": [hh("Q", "A"), hh("Q", "B")], "score": [float("nan"), 0]}, Reason.NO_PREFERENCE),
    ("text-score", {"text": [hh("Q", "A"), hh("Q", "B")], "score": [10**400, 0]}, Reason.NO_PREFERENCE),
    ("text-score", {"text": ["x"] * 65, "score": [0] * 65}, Reason.TOO_LONG),
    ("dsp", {"query": "Q", "responses": "none"}, Reason.WRONG_FIELDS),
    ("dsp", {"query": 5, "responses": {"academy": "A", "normal": "B"}}, Reason.WRONG_FIELDS),
    ("dsp", {"query": "Q", "responses": {"academy": "A", "normal": ["B"]}}, Reason.WRONG_FIELDS),
    ("dsp", {"query": "Q", "responses": {"business": "A", "normal": "B"}}, Reason.NO_DOMAIN_RESPONSE),
    ("dsp", {"query": "Q", "responses": {"academy": "A", "normal": None}}, Reason.NO_DOMAIN_RESPONSE),
    ("dsp", {"query": "", "responses": {"academy": "A", "normal": "B"}}, Reason.EMPTY_PROMPT),
    ("dsp", {"query": "Q", "responses": {"academy": "A", "normal": "\n"}}, Reason.EMPTY_REPLY),
    ("dsp", {"query": "Q", "responses": {"academy": "A", "normal": "A"}}, Reason.IDENTICAL_REPLIES),
    ("text-score", {"text": [hh("Q", "A"), hh("Q", "B")], "score": [[1], [0]]}, Reason.WRONG_FIELDS),
    ("trl-conversational", {**PAIR.to_trl(), "chosen": 7}, Reason.WRONG_FIELDS),
    ("trl-conversational", {**PAIR.to_trl(), "chosen": [{"role": "judge", "content": "A"}]}, Reason.WRONG_FIELDS),
    ("trl-conversational", {**PAIR.to_trl(), "chosen": [{"role": "tool", "content": "A"}]}, Reason.NOT_TEXT),
    ("trl-conversational", {**PAIR.to_trl(), "chosen": [{"role": "assistant"}]}, Reason.WRONG_FIELDS),
    ("trl-conversational", {**PAIR.to_trl(), "prompt": [["user", "Q"]]}, Reason.WRONG_FIELDS),
    ("trl-conversational", {**PAIR.to_trl(), "prompt": []}, Reason.NOT_A_DIALOGUE),
    ("trl-conversational", {**PAIR.to_trl(), "chosen": []}, Reason.NOT_A_DIALOGUE),
    ("trl-conversational", {**PAIR.to_trl(), "chosen": [assistant("")]}, Reason.EMPTY_REPLY),
    (
        "trl-conversational-implicit",
        {"chosen": [user("Q"), assistant("A")], "rejected": [user("R"), assistant("B")]},
        Reason.DIFFERENT_PROMPTS,
    ),
    (
        "trl-conversational-implicit",
        {"chosen": [user("Q"), {"role": "system", "content": "S"}, assistant("A")], "rejected": [user("Q")]},
        Reason.NOT_A_DIALOGUE,
    ),
    ("trl-plain", {"chosen": "A", "rejected": "B"}, Reason.WRONG_FIELDS),
    ("trl-plain", {"prompt": " ", "chosen": "A", "rejected": "B"}, Reason.EMPTY_PROMPT),
    ("trl-plain", {"prompt": "Q", "chosen": "A", "rejected": ""}, Reason.EMPTY_REPLY),
    ("trl-plain", {"prompt": "Q", "chosen": "A", "rejected": "A"}, Reason.IDENTICAL_REPLIES),
    ("trl-plain-implicit", {"chosen": "", "rejected": "A"}, Reason.EMPTY_REPLY),
    ("trl-plain-implicit", {"chosen": "Q A", "rejected": "Q A"}, Reason.IDENTICAL_REPLIES),
    ("trl-plain-implicit", {"chosen": "Why? It is hot", "rejected": "Why? It is cold"}, Reason.UNCLEAR_PROMPT),
]


@pytest.mark.parametrize(("file_format", "record", "reason"), BAD)
def test_bad_records_have_their_reason(file_format: str, record: Any, reason: Reason) -> None:
    assert only(record, file_format, "academy" if file_format == "dsp" else None) is reason


def test_every_reason_has_a_test() -> None:
    of_files = {Reason.BROKEN_JSON, Reason.BREAKS_OFF, Reason.BROKEN_ROW, Reason.EQUAL_COLUMNS, Reason.BUDGET}
    of_files |= {Reason.EMPTY_FILE}  # test_containers.py, test_prepare.py
    of_choices = {Reason.WEAK_PREFERENCE, Reason.NO_PARTNER}  # test_pairing.py
    assert {reason for _, _, reason in BAD} | of_files | of_choices == set(Reason)


def test_reasons_can_be_names_of_metrics() -> None:
    """MLflow refuses other characters, and a run must not die of the name of a bad record."""
    assert all(re.fullmatch(r"[\w .:/-]+", reason.value, re.ASCII) for reason in Reason)


def test_dsp_counts_one_rejection_for_every_candidate() -> None:
    """Four candidates; an empty wanted response spoils all four, an empty other one only its own."""
    responses = {style: f"as {style}" for style in ("academy", "business", "entertainment", "literature", "normal")}
    spoiled = parse_record({"query": "Q", "responses": {**responses, "academy": ""}}, "dsp", domain="academy")
    assert spoiled == [Reason.EMPTY_REPLY] * 4
    one = parse_record({"query": "Q", "responses": {**responses, "normal": ""}}, "dsp", domain="academy")
    assert [isinstance(candidate, PreferencePair) for candidate in one] == [True, True, True, False]


def test_over_long_counts_prompt_and_longer_reply(tmp_path: Path) -> None:
    """Prompt 4 characters, replies 8 and 3: 4 + 8 = 12."""
    file = lines(tmp_path / "a.jsonl", PAIR.to_trl())
    assert outcomes(file, max_chars=12) == [(1, PAIR)]
    assert outcomes(file, max_chars=11) == [(1, Reason.TOO_LONG)]


# ------------------------------------------------------------------------------------------------ files


def test_broken_lines_are_rejected_where_they_stand(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    good = json.dumps(PAIR.to_trl()).encode()
    content = [
        b"\xef\xbb\xbf" + good,
        b"",
        b'{"broken": ',
        good + b"\r",
        b"[1, 2]",
        b'"text"',
        b"[" * 100_000,
        b'{"n": ' + b"1" * 5000 + b"}",
        good.replace(b"Because.", b"\xff\xfe"),
        good,
    ]
    file.write_bytes(b"\n".join(content))
    assert outcomes(file) == [
        (1, PAIR),
        (3, Reason.BROKEN_JSON),
        (4, PAIR),
        (5, Reason.NOT_AN_OBJECT),
        (6, Reason.NOT_AN_OBJECT),
        (7, Reason.BROKEN_JSON),
        (8, Reason.BROKEN_JSON),
        (9, Reason.NOT_UNICODE),
        (10, PAIR),
    ]


def test_a_line_that_would_fill_the_memory_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_records, "MAX_RECORD_BYTES", 200)
    file = tmp_path / "a.jsonl"
    good = json.dumps(PAIR.to_trl()).encode()
    file.write_bytes(good + b"\n" + b"x" * 1001 + b"\n" + good + b"\n" + b"y" * 300)
    assert len(good) < 200
    assert outcomes(file) == [(1, PAIR), (2, Reason.TOO_LONG), (3, PAIR), (4, Reason.TOO_LONG)]


@pytest.mark.parametrize("start", ["", "\ufeff", " \r\n"])
def test_json_lists_count_records(tmp_path: Path, start: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(start + json.dumps([PAIR.to_trl(), 3, LONGER.to_trl()], indent=1), encoding="utf-8")
    assert outcomes(file) == [(1, PAIR), (2, Reason.NOT_AN_OBJECT), (3, LONGER)]


@pytest.mark.parametrize("end", [2, 40, 4])
def test_a_list_that_breaks_off_keeps_what_is_whole(tmp_path: Path, end: int) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps([PAIR.to_trl(), LONGER.to_trl()])[:-end], encoding="utf-8")
    assert outcomes(file) == [(1, PAIR), (2, Reason.BREAKS_OFF)]


def test_an_unclosed_list_or_text_after_it_is_damage(tmp_path: Path) -> None:
    file, whole = tmp_path / "a.json", json.dumps([PAIR.to_trl()])
    for text in (whole[:-1], whole + " x", whole + "\n" + whole):
        file.write_text(text, encoding="utf-8")
        assert outcomes(file) == [(1, PAIR), (2, Reason.BREAKS_OFF)]


@pytest.mark.parametrize("as_list", [False, True])
def test_gzip_is_recognised_by_content_and_may_be_truncated(tmp_path: Path, as_list: bool) -> None:
    rows = [{**PAIR.to_trl(), "id": f"{i * 7919 % 10007}"} for i in range(3000)]
    text = json.dumps(rows) if as_list else "".join(json.dumps(row) + "\n" for row in rows)
    packed = gzip.compress(text.encode())
    file = tmp_path / "no-suffix-at-all"
    file.write_bytes(packed)
    assert [line for line, _ in outcomes(file)] == list(range(1, 3001))
    file.write_bytes(packed[: len(packed) // 2])
    found = outcomes(file)
    *whole, last = found
    assert 100 < len(whole) < 3000
    assert all(pair == PAIR for _, pair in whole)
    assert last == (len(whole) + 1, Reason.BREAKS_OFF)
    file.write_bytes(packed[:20])
    with pytest.raises(QAdapterError):
        read_pairs(file)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["parquet", "file", "stream"])
def test_columnar_files(tmp_path: Path, kind: str) -> None:
    """DSP in Arrow: a style that a record lacks is null there, and no candidate."""
    rows: list[dict[str, Any]] = [
        {"query": "Q", "responses": {"academy": "A", "business": None, "normal": "N"}},
        {"query": None, "responses": {"academy": "A", "business": "B", "normal": "N"}},
    ]
    table = pa.Table.from_pylist(rows * 400)
    file = tmp_path / "data"
    if kind == "parquet":
        pa.parquet.write_table(table, file)
    else:
        with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(str(file), table.schema) as writer:
            writer.write_table(table, max_chunksize=300)
    found = outcomes(file, domain="academy")
    pair = PreferencePair((user("Q"),), "A", "N")
    assert found[:3] == [(1, pair), (2, Reason.WRONG_FIELDS), (2, Reason.WRONG_FIELDS)]
    assert found == [(line + 2 * i, what) for i in range(400) for line, what in found[:3]]
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    if kind == "stream":
        assert outcomes(file, domain="academy")[-1][1] is Reason.BREAKS_OFF
    else:  # these two keep their index at the end
        with pytest.raises(QAdapterError, match="is damaged or breaks off"):
            read_pairs(file, domain="academy")


def test_most_records_decide_the_format(tmp_path: Path) -> None:
    dialogue = {"chosen": hh("Why?", "Because."), "rejected": hh("Why?", "No.")}
    file = lines(tmp_path / "a.jsonl", {"chosen": "", "rejected": ""}, 5, {"other": 1}, dialogue, dialogue)
    assert detect_format(file) == "hh-dialogues"
    assert outcomes(file) == [
        (1, Reason.NOT_A_DIALOGUE),
        (2, Reason.NOT_AN_OBJECT),
        (3, Reason.WRONG_FIELDS),
        (4, PAIR),
        (5, PAIR),
    ]


# ------------------------------------------------------------------------------------------------ refusals


def test_an_unknown_format_shows_fields_but_no_content(tmp_path: Path) -> None:
    file = lines(tmp_path / "odd.jsonl", {"question": "secret words", "answer": ["more"], "k" * 50: 1})
    with pytest.raises(QAdapterError) as caught:
        detect_format(file)
    message = str(caught.value)
    assert "odd.jsonl" in message
    assert "question: str, answer: list" in message
    assert "secret" not in message
    assert "more" not in message
    assert "k" * 31 not in message
    assert all(row.name in message for row in FORMATS)
    assert "set `fields`" in message


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b"[]", "is empty"),
        (b"hello\nworld\n", "no JSON object among its first 2 records"),
        (b"PK\x03\x04 a zip", "damaged or breaks off"),
        (b"PAR1 but not Parquet", "damaged or breaks off"),
    ],
)
def test_files_without_records_are_refused(tmp_path: Path, content: bytes, words: str) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(QAdapterError, match=words):
        read_pairs(file)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(QAdapterError, match="cannot be read: No such file"):
        read_pairs(tmp_path / "missing.jsonl")
    with pytest.raises(QAdapterError, match="cannot be read: Is a directory"):
        detect_format(tmp_path)


def test_domain_must_fit_the_data(tmp_path: Path) -> None:
    dsp = lines(tmp_path / "dsp.jsonl", {"query": "Q", "responses": {"academy": "A", "normal": "N"}})
    with pytest.raises(QAdapterError, match=r"no domain was given. Its domains are academy, normal"):
        read_pairs(dsp)
    with pytest.raises(QAdapterError, match=r"no domain 'acadmy' in it. Its domains are academy, normal"):
        read_pairs(dsp, domain="acadmy")
    with pytest.raises(QAdapterError, match="does not support `domain: academy`"):
        read_pairs(lines(tmp_path / "trl.jsonl", PAIR.to_trl()), domain="academy")


# ------------------------------------------------------------------------------------------------ real data


@pytest.mark.parametrize(
    ("name", "domain", "file_format", "counts"),
    [
        ("hh-rlhf/harmless-base.jsonl", None, "hh-dialogues", {"used": 1846, Reason.EMPTY_REPLY: 4}),
        (
            "hh-rlhf/helpful.text-score.json",
            None,
            "text-score",
            {"used": 1877, Reason.EMPTY_REPLY: 2, Reason.EMPTY_PROMPT: 1},
        ),
        *(
            (
                "dsp/domain_specific_preference.json",
                domain,
                "dsp",
                {"used": 2120 - identical - 1, Reason.IDENTICAL_REPLIES: identical, Reason.EMPTY_REPLY: 1},
            )
            for domain, identical in {"academy": 32, "business": 29, "entertainment": 19, "literature": 19}.items()
        ),
    ],
)
def test_real_files(shared_data: Path, name: str, domain: str | None, file_format: str, counts: dict) -> None:
    """1,850 and 1,880 pairs; 530 queries of five styles, 530·4 = 2,120 candidate pairs a domain."""
    file = shared_data / name
    assert detect_format(file, domain=domain) == file_format
    parsed = list(read_pairs(file, domain=domain))
    assert Counter("used" if isinstance(item, Accepted) else item.reason for item in parsed) == counts
    assert len(parsed) == {"hh-dialogues": 1850, "text-score": 1880, "dsp": 2120}[file_format]
    assert max(item.line for item in parsed) == (530 if file_format == "dsp" else len(parsed))
    # every turn has text and the speakers alternate, so any chat template takes them
    for item in parsed:
        if isinstance(item, Accepted):
            assert [turn["role"] for turn in item.pair.prompt] == (["user", "assistant"] * 99)[: len(item.pair.prompt)]
            assert item.pair.prompt[-1]["role"] == "user"
            assert all("\n\nHuman:" not in turn["content"] for turn in item.pair.prompt)


@pytest.mark.parametrize(
    ("name", "words"), [("gsm8k.jsonl", "unknown format"), ("bbh/navigate.json", "is one JSON object")]
)
def test_real_benchmarks_are_no_preferences(shared_data: Path, name: str, words: str) -> None:
    with pytest.raises(QAdapterError, match=words):
        detect_format(shared_data / "benchmarks" / name)


# ------------------------------------------------------------------------------------------------ garbage, round trips

anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(), max_size=30),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=12,
)
field = anything | st.sampled_from([hh("Q", "A"), hh("Q", "B", "C", "D"), [user("Q"), assistant("A")], [1.0, 0.0]])
record_like = st.dictionaries(
    st.sampled_from(["prompt", "chosen", "rejected", "text", "score", "query", "responses", "role"]), field
)
fast = settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.mark.slow
@fast
@given(
    record=record_like | anything,
    file_format=st.sampled_from([row.name for row in FORMATS if not row.choose]),
    domain=st.sampled_from([None, "a", ""]),
)
def test_any_record_gives_pairs_or_reasons(record: Any, file_format: str, domain: str | None) -> None:
    candidates = parse_record(record, file_format, domain=domain)
    assert candidates
    for candidate in candidates:
        if isinstance(candidate, PreferencePair):
            json.dumps(candidate.to_trl(), ensure_ascii=False).encode()
            assert candidate.chosen.strip() != candidate.rejected.strip()
            assert candidate.prompt[-1]["role"] == "user"
        else:
            assert isinstance(candidate, Reason)


@pytest.mark.slow
@fast
@given(
    data=st.binary(max_size=300)
    | st.lists(record_like, max_size=5).map(lambda rows: "\n".join(map(json.dumps, rows)).encode())
    | st.lists(record_like, max_size=5).map(lambda rows: json.dumps(rows).encode()),
    packed=st.booleans(),
    magic=st.sampled_from(
        [b"", b"PAR1", b"ARROW1", b"\xff\xff\xff\xff", b"\x1f\x8b", b"[{", b"\xef\xbb\xbf", b"\xff\xfe"]
    ),
    cut=st.integers(0, 20),
    domain=st.sampled_from([None, "", "a"]),
)
def test_any_bytes_are_read_or_refused(
    tmp_path: Path, data: bytes, packed: bool, magic: bytes, cut: int, domain: str | None
) -> None:
    file = tmp_path / "garbage"
    data = magic + data
    data = gzip.compress(data) if packed else data
    file.write_bytes(data[: len(data) - cut])
    try:
        parsed = list(read_pairs(file, domain=domain, max_chars=50))
    except QAdapterError:
        return
    assert parsed
    assert all(isinstance(item, Accepted | Rejected) and item.line >= 1 for item in parsed)


content = (
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=30)
    .map(str.strip)
    .filter(lambda text: text and "\r\n" not in text)  # which is read as \n
)


@st.composite
def pairs(draw: st.DrawFn) -> PreferencePair:
    turns = draw(st.integers(0, 2)) * 2 + 1
    prompt = [(user, assistant)[i % 2](draw(content)) for i in range(turns)]
    if draw(st.booleans()):
        prompt.insert(0, Message(role="system", content=draw(content)))
    chosen, rejected = draw(st.tuples(content, content).filter(lambda replies: replies[0] != replies[1]))
    return PreferencePair(tuple(prompt), chosen, rejected)


@pytest.mark.slow
@fast
@given(pair=pairs())
def test_pairs_survive_the_way_through_a_file(tmp_path: Path, pair: PreferencePair) -> None:
    explicit, row = tmp_path / "explicit.jsonl", pair.to_trl()
    lines(explicit, row)
    assert outcomes(explicit) == [(1, pair)]
    assert PreferencePair.from_trl(json.loads(explicit.read_text())) == pair
    implicit = lines(
        tmp_path / "implicit.jsonl",
        {"chosen": row["prompt"] + row["chosen"], "rejected": row["prompt"] + row["rejected"]},
    )
    assert outcomes(implicit) == [(1, pair)]


@pytest.mark.slow
@fast
@given(pair=pairs())
def test_dialogues_survive_the_way_through_hh(tmp_path: Path, pair: PreferencePair) -> None:
    """For prompts without a system turn and texts that hold no turn marks or Windows line ends of their own."""
    prompt = [turn["content"] for turn in pair.prompt if turn["role"] != "system"]
    texts = [*prompt, pair.chosen, pair.rejected]
    if any("Human:" in text or "Assistant:" in text or "\r" in text or text.endswith(END_TOKENS) for text in texts):
        return
    file = lines(tmp_path / "hh.jsonl", {"chosen": hh(*prompt, pair.chosen), "rejected": hh(*prompt, pair.rejected)})
    expected = PreferencePair(
        tuple(turn for turn in pair.prompt if turn["role"] != "system"), pair.chosen, pair.rejected
    )
    assert outcomes(file) == [(1, expected)]
