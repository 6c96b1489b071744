"""Preparation: the sums, the split, the files written, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import json
import logging
import os
import re
import unicodedata
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qadapter.errors import QAdapterError
from qadapter.preferences import prepare as preparation
from qadapter.preferences import progress, sides, sorting
from qadapter.preferences.pair import SINGLE, Message, PreferencePair, load_pairs
from qadapter.preferences.prepare import PreparationSummary, prepare
from qadapter.preferences.records import Reason
from qadapter.preferences.split import split_pairs
from qadapter.preferences.stream import first_usable_pair, parse_files
from tests.support.heard import Heard


def pair(prompt: str, chosen: str = "yes", rejected: str = "no") -> PreferencePair:
    return PreferencePair((Message(role="user", content=prompt),), chosen, rejected)


def lines(file: Path, *rows: Any) -> Path:
    text = "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text, encoding="utf-8")
    return file


def rows(count: int, start: int = 0) -> list[dict[str, Any]]:
    return [dict(pair(f"question {i}").to_trl()) for i in range(start, start + count)]


def digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


# ------------------------------------------------------------------------------------------------ sums and files


def test_every_candidate_is_accounted_for(tmp_path: Path) -> None:
    """10 good rows, 2 of them again, 1 empty reply, 1 broken line, 1 pair of equal replies: 15 read, 12 used, 3 not.

    `heldout=3` prompts: 3 pairs held out, 7 to train, 2 duplicates removed.
    """
    bad = [pair("q", "", "no").to_trl(), "{broken", pair("q", "same", "same").to_trl()]
    file = lines(tmp_path / "in.jsonl", *rows(10), *bad, *rows(2))
    summary = prepare([file], tmp_path / "out", heldout=3)
    assert summary == PreparationSummary(
        read=15,
        used=12,
        quarantined={
            Reason.BROKEN_JSON.value: 1,
            Reason.IDENTICAL_REPLIES.value: 1,
            Reason.EMPTY_REPLY.value: 1,
        },
        duplicates=2,
        cross_split_pairs=0,
        cross_split_prompts=0,
        cut_train=0,
        cut_heldout=0,
        train_pairs=7,
        train_prompts=7,
        heldout_pairs=3,
        heldout_prompts=3,
        train_sha256=digest(tmp_path / "out" / "train.jsonl"),
        heldout_sha256=digest(tmp_path / "out" / "heldout.jsonl"),
        formats={"in.jsonl": "trl-conversational"},
        incomplete_files=[],
    )
    assert PreparationSummary.load(tmp_path / "out" / "summary.json") == summary
    train, held = (load_pairs(tmp_path / "out" / name) for name in ("train.jsonl", "heldout.jsonl"))
    assert len(train) == 7
    assert len(held) == 3
    assert {row.prompt[0]["content"] for row in train + held} == {f"question {i}" for i in range(10)}


def test_quarantine_has_file_line_and_reason_and_no_content(tmp_path: Path) -> None:
    one = lines(tmp_path / "one" / "a.jsonl", *rows(3), pair("secret", "", "words").to_trl())
    two = lines(tmp_path / "two" / "a.jsonl", "{secret", *rows(3, 3))
    prepare([two, one], tmp_path / "out")
    text = (tmp_path / "out" / "quarantine.jsonl").read_text()
    assert [json.loads(line) for line in text.splitlines()] == [
        {"file": "one/a.jsonl", "line": 4, "reason": "empty reply"},
        {"file": "two/a.jsonl", "line": 1, "reason": "broken JSON"},
    ]
    assert "secret" not in text
    assert set(PreparationSummary.load(tmp_path / "out" / "summary.json").formats) == {"one/a.jsonl", "two/a.jsonl"}


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = lines(tmp_path / "whole.jsonl", *rows(5))
    damaged = tmp_path / "damaged.json"
    damaged.write_text(json.dumps(rows(5, 5))[:-9])
    summary = prepare([whole, damaged], tmp_path / "out")
    assert summary.incomplete_files == ["damaged.json"]
    assert (summary.read, summary.used) == (10, 9)


@pytest.mark.parametrize("field", ["read", "used", "duplicates", "cross_split_pairs", "cut_train", "train_pairs"])
def test_a_sum_that_does_not_add_up_raises(tmp_path: Path, field: str) -> None:
    summary = prepare([lines(tmp_path / "in.jsonl", *rows(5))], tmp_path / "out")
    summary.check()
    with pytest.raises(RuntimeError, match="does not add up"):
        replace(summary, **{field: getattr(summary, field) + 1}).check()


def test_a_lost_pair_raises_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The number of lines written is what is summed, so a writer that drops one is found out."""
    write, dropped = sides.Output._write, []

    def all_but_one(output: Any, line: bytes) -> None:
        write(output, line) if dropped else dropped.append(line)

    monkeypatch.setattr(sides.Output, "_write", all_but_one)
    with pytest.raises(RuntimeError, match="does not add up"):
        prepare([lines(tmp_path / "in.jsonl", *rows(5))], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(output: Any, line: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(sides.Output, "_write", full)
    with pytest.raises(QAdapterError, match="No space left on device"):
        prepare([lines(tmp_path / "in.jsonl", *rows(5))], tmp_path / "out")
    assert list((tmp_path / "out").iterdir()) == []


@pytest.mark.slow
def test_rows_sorted_on_disk_are_divided_as_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Buckets written every 500 bytes give the same bytes as ones that never leave the memory, and are removed."""
    file = lines(tmp_path / "in.jsonl", *four_each(30), *rows(20), *four_each(5), "{")
    options: dict[str, Any] = {"heldout": 7, "judge_pairs": 9, "max_train_pairs": 60, "max_heldout_pairs": 20}
    summary = prepare([file], tmp_path / "memory", **options)
    monkeypatch.setattr(sorting, "MEMORY_BYTES", 500)
    assert prepare([file], tmp_path / "disk", **options) == summary
    written = [name for name in preparation.OUTPUTS if name != SINGLE]
    for name in written:
        assert (tmp_path / "disk" / name).read_bytes() == (tmp_path / "memory" / name).read_bytes()
    assert sorted(file.name for file in (tmp_path / "disk").iterdir()) == sorted(written)
    with pytest.raises(QAdapterError, match="No training pair is left"):
        prepare([file], tmp_path / "refused", heldout_files=[file])
    assert not (tmp_path / "refused").exists()


def test_an_empty_or_broken_shard_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Three rows of one shard are used; the empty, the broken and the hostile one are a rejection each."""
    good = lines(tmp_path / "good.jsonl", *rows(3))
    (empty := tmp_path / "empty.jsonl").touch()
    (broken := tmp_path / "broken.parquet").write_bytes(b"PAR1 and no more")
    (packed := tmp_path / "packed.gz").write_bytes(gzip.compress(b'[{"a": [' + b"[]," * 300_000)[:-9])
    summary = prepare([empty, good, broken, packed], tmp_path / "out", heldout=1)
    assert (summary.read, summary.used) == (6, 3)
    assert summary.quarantined == {Reason.EMPTY_FILE: 1, Reason.BREAKS_OFF: 1, Reason.BUDGET: 1}
    assert summary.incomplete_files == ["broken.parquet", "empty.jsonl", "packed.gz"]
    assert summary.formats == {
        "broken.parquet": "none",
        "empty.jsonl": "none",
        "good.jsonl": "trl-conversational",
        "packed.gz": "none",
    }
    assert "empty.jsonl is empty; it is set aside" in caplog.text
    assert first_usable_pair([empty, good]) == pair("question 0")
    with pytest.raises(QAdapterError, match="is empty"):
        prepare([empty], tmp_path / "none")


def test_a_file_name_that_is_not_utf_8(tmp_path: Path) -> None:
    file = Path(os.fsdecode(os.fsencode(tmp_path) + b"/na\xefve.jsonl"))
    lines(file, *rows(3), "{")
    summary = prepare([file], tmp_path / "out", heldout=1)
    assert list(summary.formats) == ["na\\xefve.jsonl"]
    quarantine = (tmp_path / "out" / "quarantine.jsonl").read_text(encoding="utf-8")
    assert json.loads(quarantine)["file"] == "na\\xefve.jsonl"
    file.write_bytes(b"")
    with pytest.raises(QAdapterError) as caught:
        prepare([file], tmp_path / "none")
    str(caught.value).encode()


def test_a_long_reading_says_how_far_it_is(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four equal files that are read in one piece each: a quarter, a half, three quarters and all of the bytes."""
    monkeypatch.setattr(progress, "EVERY_SECONDS", 0.0)
    monkeypatch.setattr(progress, "_BYTES", 1)
    files = [lines(tmp_path / f"{i}.jsonl", *rows(300, 1000 + 300 * i)) for i in range(4)]
    size, heard = sum(file.stat().st_size for file in files), Heard()
    with caplog.at_level(logging.INFO), heard.listening():
        prepare(files, tmp_path / "out")
    assert heard.told[0] == f"reading preferences: megabyte 0 of {size}"
    assert heard.told[1:6] == [*(pytest.approx(size * part / 4, abs=1) for part in (1, 2, 3, 4)), "end"]
    told = [
        re.fullmatch(r"([\d,]+) rows \((\d+)%\), [\d,]+ rows/s, about \d+ s left", line) for line in caplog.messages
    ]
    assert [(found[1], int(found[2])) for found in told if found] == [
        ("256", 25),
        ("512", 50),
        ("768", 75),
        ("1,024", 100),
    ]


# ------------------------------------------------------------------------------------------------ split


def test_no_prompt_is_on_both_sides_in_any_case_or_spacing(tmp_path: Path) -> None:
    pairs = [pair(f"Question {i}" if j % 2 else f"question  {i} ", f"answer {j}") for i in range(40) for j in range(3)]
    for seed in range(5):
        split = split_pairs(pairs, heldout=0.5, seed=seed)
        train, held = ({row.prompt_digest for row in side} for side in (split.train, split.heldout))
        assert len(train) + len(held) == 40
        assert not train & held
        assert len(split.train) == 3 * len(train)


def test_order_of_files_and_rows_has_no_influence(tmp_path: Path) -> None:
    files = [lines(tmp_path / f"{i}.jsonl", *rows(20, 20 * i)) for i in range(3)]
    again = lines(tmp_path / "again" / "all.jsonl", *reversed(rows(60)))
    first, second, third = (
        prepare(order, tmp_path / name, max_train_pairs=30)
        for name, order in {"a": files, "b": files[::-1], "c": [again]}.items()
    )
    assert first == second == replace(third, formats=first.formats)
    for name in ("train.jsonl", "heldout.jsonl", "quarantine.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_another_seed_gives_another_split_and_another_order() -> None:
    pairs = [pair(f"question {i}") for i in range(100)]
    first, again, other = (split_pairs(pairs, seed=seed) for seed in (0, 0, 1))
    assert first == again
    assert {row.prompt_digest for row in first.heldout} != {row.prompt_digest for row in other.heldout}
    assert [row.prompt_digest for row in first.train[:10]] != [row.prompt_digest for row in other.train[:10]]


def test_a_share_never_moves_a_prompt_when_rows_arrive() -> None:
    """1,000 prompts at 0.2 each: 200 expected, standard deviation √(1000·0.2·0.8) = 12.6; four of them are 51."""
    old, new = [pair(f"question {i}") for i in range(500)], [pair(f"question {i}") for i in range(1000)]
    before, after = (split_pairs(pairs, heldout=0.2) for pairs in (old, new))
    assert {row.prompt_digest for row in before.heldout} < {row.prompt_digest for row in after.heldout}
    assert {row.prompt_digest for row in before.train} < {row.prompt_digest for row in after.train}
    assert abs(len(after.heldout) - 200) <= 51


def test_a_number_is_of_prompts_and_nought_holds_nothing_out() -> None:
    pairs = [pair(f"question {i}", f"answer {j}") for i in range(10) for j in range(4)]
    split = split_pairs(pairs, heldout=3)
    assert len(split.heldout) == 3 * 4
    assert len(split.train) == 7 * 4
    assert split_pairs(pairs, heldout=3.0) == split  # configs may hold either
    assert split_pairs(pairs, heldout=0).heldout == split_pairs(pairs, heldout=0.0).heldout == []


def test_a_small_share_still_has_both_sides() -> None:
    pairs = [pair("one"), pair("two")]
    for share in (0.001, 0.999):
        split = split_pairs(pairs, heldout=share)
        assert (len(split.train), len(split.heldout)) == (1, 1)


@pytest.mark.parametrize("heldout", [-1, -0.1, 1.5, float("nan"), float("inf"), True, 10, 11.0])
def test_impossible_shares_are_refused(heldout: float) -> None:
    with pytest.raises(QAdapterError, match="heldout is"):
        split_pairs([pair(f"question {i}") for i in range(10)], heldout=heldout)


def test_one_prompt_cannot_be_split() -> None:
    with pytest.raises(QAdapterError, match="only 1 distinct prompts"):
        split_pairs([pair("one", str(i)) for i in range(5)])


def test_held_out_files_take_their_prompts_from_training(tmp_path: Path) -> None:
    """Training has prompts 0 to 19, held out are 15 to 24: 5 prompts are removed from training.

    Row 16 is twice in training: one duplicate, and once across. 16 is also twice held out: another duplicate.
    """
    train = lines(tmp_path / "train.jsonl", *rows(20), *rows(1, 16), "{")
    held = lines(tmp_path / "test.jsonl", *rows(10, 15), *rows(1, 16))
    summary = prepare([train], tmp_path / "out", heldout_files=[held], heldout=0.9)
    assert (summary.read, summary.used, summary.duplicates) == (22 + 11, 21 + 11, 2)
    assert (summary.cross_split_pairs, summary.cross_split_prompts) == (5, 5)
    assert (summary.train_pairs, summary.heldout_pairs) == (15, 10)
    assert {row.prompt[0]["content"] for row in load_pairs(tmp_path / "out" / "heldout.jsonl")} == {
        f"question {i}" for i in range(15, 25)
    }


def test_equal_training_and_held_out_files_leave_no_training(tmp_path: Path) -> None:
    file = lines(tmp_path / "in.jsonl", *rows(5))
    with pytest.raises(QAdapterError, match="No training pair is left: all 5 usable pairs"):
        prepare([file], tmp_path / "out", heldout_files=[file])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "written",
    [
        unicodedata.normalize("NFD", "Où est le café de l'Hôtel ?"),
        "OÙ  EST\u00a0LE CAFÉ DE L'HÔTEL\n?",
        "\ufeffOù est le ca\u00adfé de\u200b l'Hôtel ?\u200e",
    ],
    ids=["accents as characters of their own", "case and white space", "characters without a glyph"],
)
def test_a_held_out_prompt_written_otherwise_is_not_trained_on(written: str, tmp_path: Path) -> None:
    held = lines(tmp_path / "held.jsonl", pair("Où est le café de l'Hôtel ?").to_trl())
    file = lines(tmp_path / "in.jsonl", pair(written).to_trl(), pair("Ou est le cafe de l'Hotel ?").to_trl())
    summary = prepare([file], tmp_path / "out", heldout_files=[held])
    assert (summary.cross_split_pairs, summary.train_pairs) == (1, 1)
    assert load_pairs(tmp_path / "out" / "train.jsonl") == [pair("Ou est le cafe de l'Hotel ?")]


def test_limits_cut_and_are_counted(tmp_path: Path) -> None:
    file = lines(tmp_path / "in.jsonl", *rows(50))
    summary = prepare([file], tmp_path / "out", heldout=20, max_train_pairs=25, max_heldout_pairs=8)
    assert (summary.train_pairs, summary.cut_train, summary.heldout_pairs, summary.cut_heldout) == (25, 5, 8, 12)
    whole = split_pairs([pair(f"question {i}") for i in range(50)], heldout=20)
    assert load_pairs(tmp_path / "out" / "train.jsonl") == whole.train[:25]
    with pytest.raises(QAdapterError, match="max_train_pairs is 0; a number from 1 on"):
        prepare([file], tmp_path / "out", max_train_pairs=0)
    with pytest.raises(QAdapterError, match="max_heldout_pairs is -3; a number from 1 on"):
        prepare([file], tmp_path / "out", max_heldout_pairs=-3)


# ------------------------------------------------------------------------------------------------ the judge's part


def four_each(count: int) -> list[dict[str, Any]]:
    """Prompts with four pairs each, as DSP has."""
    return [dict(pair(f"question {i}", f"answer {j}").to_trl()) for i in range(count) for j in range(4)]


def test_pairs_for_a_judge_have_prompts_of_their_own(tmp_path: Path) -> None:
    """20 prompts of 4 pairs, 5 held out, 10 pairs asked for: whole prompts, so 3 of them and 12 pairs; 12 are left."""
    file = lines(tmp_path / "in.jsonl", *four_each(20), "{broken")
    summary = prepare([file], tmp_path / "out", heldout=5, judge_pairs=10)
    sides = {name: load_pairs(tmp_path / "out" / f"{name}.jsonl") for name in ("train", "heldout", "judge")}
    assert {name: len(side) for name, side in sides.items()} == {"train": 48, "heldout": 20, "judge": 12}
    prompts = {name: {row.prompt_digest for row in side} for name, side in sides.items()}
    assert len(set.union(*prompts.values())) == sum(map(len, prompts.values())) == 20
    assert (summary.judge_pairs, summary.judge_prompts) == (12, 3)
    assert summary.judge_sha256 == digest(tmp_path / "out" / "judge.jsonl")
    assert summary.read == 81 == summary.used + 1
    assert summary.used == summary.train_pairs + summary.heldout_pairs + summary.judge_pairs
    assert PreparationSummary.load(tmp_path / "out" / "summary.json") == summary
    with pytest.raises(RuntimeError, match="does not add up"):
        replace(summary, judge_pairs=11).check()


def test_without_a_judge_nothing_is_different(tmp_path: Path) -> None:
    """The bytes of every file, against digests taken before there was a judge's part."""
    prepare([lines(tmp_path / "in.jsonl", *four_each(10), "{")], tmp_path / "out", heldout=0.3, max_train_pairs=20)
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "heldout.jsonl",
        "quarantine.jsonl",
        "summary.json",
        "train.jsonl",
    ]
    assert {file.name: digest(file)[:16] for file in sorted((tmp_path / "out").iterdir())} == {
        "heldout.jsonl": "93147167f8bc0e89",
        "quarantine.jsonl": "c651e6c7d134eb49",
        "summary.json": "2dcdf064860ca70d",
        "train.jsonl": "3e39a04d4db8e693",
    }


def test_held_out_prompts_do_not_depend_on_the_judge(tmp_path: Path) -> None:
    pairs = [pair(f"question {i}") for i in range(60)]
    without, with_judge = split_pairs(pairs, heldout=0.3), split_pairs(pairs, heldout=0.3, judge_pairs=7)
    assert with_judge.heldout == without.heldout
    assert len(with_judge.judge) == 7
    assert [one for one in without.train if one not in with_judge.judge] == with_judge.train


def test_domains_that_share_their_prompts_share_the_judges() -> None:
    """One prompt has lost three of its pairs in one domain; the others are set apart in the same order."""
    first = [pair(f"question {i}", f"a {j}") for i in range(40) for j in range(4)]
    second = [pair(f"question {i}", f"b {j}") for i in range(40) for j in range(4 if i else 1)]
    prompts = [
        {row.prompt_digest for row in split_pairs(some, heldout=10, judge_pairs=24).judge} for some in (first, second)
    ]
    assert len(prompts[0]) == 6
    assert prompts[0] <= prompts[1]
    assert len(prompts[1]) <= 7


@pytest.mark.parametrize("count", [-1, 37, 1000])
def test_impossible_numbers_of_judges_pairs_are_refused(tmp_path: Path, count: int) -> None:
    """10 prompts of 4 pairs, one held out: at most 8 of the others, 32 pairs, leave a prompt to train on."""
    file = lines(tmp_path / "in.jsonl", *four_each(10))
    with pytest.raises(QAdapterError, match=f"judge_pairs is {count}"):
        prepare([file], tmp_path / "out", heldout=1, judge_pairs=count)
    assert not (tmp_path / "out").exists()
    assert prepare([file], tmp_path / "out", heldout=1, judge_pairs=32).train_pairs == 4


# ------------------------------------------------------------------------------------------------ refusals


def test_no_usable_pair_counts_the_reasons(tmp_path: Path) -> None:
    rejected = [pair("q", "", "no").to_trl(), pair("q", "", "no").to_trl(), "{broken"]
    file, good = lines(tmp_path / "in.jsonl", *rejected), lines(tmp_path / "good.jsonl", *rows(3))
    expected = (
        r"No usable preference pair in .*in.jsonl: 3 read, all of them quarantined \(broken JSON: 1; empty reply: 2\)"
    )
    for call in (
        lambda: prepare([file], tmp_path / "out"),
        lambda: prepare([good], tmp_path / "out", heldout_files=[file]),
        lambda: first_usable_pair([file]),
    ):
        with pytest.raises(QAdapterError, match=expected):
            call()
    assert not (tmp_path / "out").exists()


def test_no_files_and_unknown_files_are_refused(tmp_path: Path) -> None:
    odd, good = lines(tmp_path / "odd.jsonl", {"a": 1}), lines(tmp_path / "good.jsonl", *rows(5))
    for call in (
        lambda files: prepare(files, tmp_path / "out"),
        first_usable_pair,
        lambda files: prepare([good], tmp_path / "out", heldout_files=files),
    ):
        with pytest.raises(QAdapterError, match="No preference file was given"):
            call([])
        with pytest.raises(QAdapterError, match=r"odd.jsonl has records of an unknown format"):
            call([good, odd])
    assert not (tmp_path / "out").exists()


def test_first_usable_pair_reads_no_further(tmp_path: Path) -> None:
    bad, good = lines(tmp_path / "bad.jsonl", pair("q", "", "no").to_trl()), lines(tmp_path / "good.jsonl", *rows(2))
    assert first_usable_pair([bad, good]) == pair("question 0")
    with pytest.raises(QAdapterError, match="over-long: 2"):
        first_usable_pair([good], max_chars=3)


def test_load_pairs_refuses_other_files(tmp_path: Path) -> None:
    for file in (
        tmp_path / "missing.jsonl",
        lines(tmp_path / "a.jsonl", "{"),
        lines(tmp_path / "b.jsonl", {"prompt": 1}),
    ):
        with pytest.raises(QAdapterError, match="cannot be read as prepared pairs"):
            load_pairs(file)


# ------------------------------------------------------------------------------------------------ real data and garbage


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "domain", "read", "quarantined", "duplicates", "prompts"),
    [
        ("hh-rlhf/harmless-base.jsonl", None, 1850, 4, 0, 1844),
        ("hh-rlhf/helpful.text-score.json", None, 1880, 3, 0, 1877),
        # Equal answers in two other styles give equal pairs: those are the duplicates.
        ("dsp/domain_specific_preference.json", "academy", 2120, 33, 2, 528),
        ("dsp/domain_specific_preference.json", "business", 2120, 30, 5, 528),
        ("dsp/domain_specific_preference.json", "entertainment", 2120, 20, 15, 528),
        ("dsp/domain_specific_preference.json", "literature", 2120, 20, 15, 528),
    ],
)
def test_real_data(
    shared_data: Path,
    tmp_path: Path,
    name: str,
    domain: str | None,
    read: int,
    quarantined: int,
    duplicates: int,
    prompts: int,
) -> None:
    summary = prepare([shared_data / name], tmp_path, domain=domain)
    assert (summary.read, sum(summary.quarantined.values()), summary.duplicates) == (read, quarantined, duplicates)
    assert summary.used == read - quarantined
    assert summary.train_pairs + summary.heldout_pairs == read - quarantined - duplicates
    assert summary.train_prompts + summary.heldout_prompts == prompts
    assert abs(summary.heldout_prompts - 0.1 * prompts) < 4 * (prompts * 0.1 * 0.9) ** 0.5
    first = first_usable_pair([shared_data / name], domain)
    assert first in load_pairs(tmp_path / "train.jsonl") + load_pairs(tmp_path / "heldout.jsonl")


def test_real_domains_share_their_split(shared_data: Path, tmp_path: Path) -> None:
    """A query held out for one domain is held out for every one: no domain's training sees another's test queries."""
    file = shared_data / "dsp" / "domain_specific_preference.json"
    held: dict[str, set[str]] = {}
    for domain in ("academy", "business"):
        prepare([file], tmp_path / domain, domain=domain)
        held[domain] = {row.prompt_digest for row in load_pairs(tmp_path / domain / "heldout.jsonl")}
    assert len(held["academy"]) > 40
    assert held["academy"] == held["business"]


short = st.sampled_from(["", "a", "b", "A", "  a", "ü", "\ud800", "x" * 60])
row: st.SearchStrategy[Any] = st.fixed_dictionaries(
    {"prompt": short, "chosen": short, "rejected": short}
) | st.sampled_from([1, None, {}])


@pytest.mark.slow
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    train=st.lists(row, min_size=1, max_size=25),
    held=st.none() | st.lists(row, min_size=1, max_size=10),
    heldout=st.sampled_from([0, 0.3, 1, 2]),
    limit=st.none() | st.integers(1, 5),
    judge=st.integers(0, 3),
)
def test_sums_hold_for_any_rows(
    tmp_path: Path, train: list[Any], held: Any, heldout: float, limit: int | None, judge: int
) -> None:
    files = [lines(tmp_path / "train.jsonl", *train)]
    held_files = None if held is None else [lines(tmp_path / "held.jsonl", *held)]
    try:
        summary = prepare(
            files,
            tmp_path / "out",
            heldout=heldout,
            heldout_files=held_files,
            max_train_pairs=limit,
            max_heldout_pairs=limit,
            max_chars=50,
            judge_pairs=judge,
        )
    except QAdapterError:
        return
    quarantine = (tmp_path / "out" / "quarantine.jsonl").read_text().splitlines()
    assert summary.read == len(train) + len(held or [])
    assert summary.read == summary.used + len(quarantine)
    assert Counter(json.loads(line)["reason"] for line in quarantine) == summary.quarantined
    kept_train, kept_held = (load_pairs(tmp_path / "out" / f"{side}.jsonl") for side in ("train", "heldout"))
    removed = summary.duplicates + summary.cross_split_pairs + summary.cut_train + summary.cut_heldout
    kept_judge = load_pairs(tmp_path / "out" / "judge.jsonl") if judge else []
    assert summary.used == len(kept_train) + len(kept_held) + len(kept_judge) + removed
    assert len(kept_judge) >= judge
    prompts = [{item.prompt_digest for item in side} for side in (kept_train, kept_held, kept_judge)]
    assert len(set.union(*prompts)) == sum(map(len, prompts))
    texts = [json.dumps(item.to_trl()) for item in kept_train + kept_held + kept_judge]
    assert len(set(texts)) == len(texts)
    assert parse_files(files, max_chars=50).read == len(train)
