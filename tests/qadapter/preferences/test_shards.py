"""Files of one data set are read as one: the vote for a layout, parts that disagree, unpaired rows across files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qadapter.errors import QAdapterError
from qadapter.preferences import ledger, pairing
from qadapter.preferences.building import Choices
from qadapter.preferences.mixture import unlearnt
from qadapter.preferences.pair import PreferencePair, load_pairs, load_single
from qadapter.preferences.prepare import prepare
from qadapter.preferences.reader import Accepted
from qadapter.preferences.records import Reason
from qadapter.preferences.shards import Findings
from qadapter.preferences.stream import check_usable, parse_files, stream_files


def lines(file: Path, rows: list[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def hh(number: int) -> dict[str, str]:
    return {
        s: f"\n\nHuman: Question {number}?\n\nAssistant: {reply}" for s, reply in (("chosen", "A"), ("rejected", "B"))
    }


def bare(number: int) -> dict[str, str]:
    return {side: f"Question {number}? {reply}" for side, reply in (("chosen", "A"), ("rejected", "B"))}


def plain(number: int) -> dict[str, str]:
    return {"prompt": f"Question {number}?", "chosen": "A", "rejected": "B"}


@pytest.mark.parametrize(
    "names",
    [
        ("a.jsonl", "b.jsonl", "c.jsonl"),
        ("train-00000-of-00003.jsonl", "train-00001-of-00003.jsonl", "train-00002-of-00003.jsonl"),
    ],
)
def test_a_part_that_looks_like_another_layout_is_outvoted_and_named(
    tmp_path: Path, names: tuple[str, ...], caplog: pytest.LogCaptureFixture
) -> None:
    """Two files of HH dialogues, and one whose first records have no marks: those are no bare texts."""
    files = [lines(tmp_path / name, [hh(10 * place + n) for n in range(10)]) for place, name in enumerate(names[:2])]
    files.append(lines(tmp_path / names[2], [*(bare(n) for n in range(6)), *(hh(100 + n) for n in range(3))]))
    assert parse_files(files[2:]).formats == {files[2]: "trl-plain-implicit"}, "alone it is taken for another layout"
    summary = prepare(files, tmp_path / "out")
    assert set(summary.formats.values()) == {"hh-dialogues"}
    assert (summary.read, summary.used) == (29, 23)
    assert summary.quarantined == {Reason.NOT_A_DIALOGUE: 6}
    assert summary.odd_files == {names[2]: "trl-plain-implicit"}
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["odd_files"] == summary.odd_files
    assert f"{names[2]} disagrees with the other files of its data set" in caplog.text


def test_parts_by_name_have_one_layout_whatever_their_columns(tmp_path: Path) -> None:
    """A part of another data set is quarantined as a whole; the same records in a file of their own name are read."""
    part = [lines(tmp_path / f"train-0000{n}-of-00003.jsonl", [plain(10 * n + k) for k in range(10)]) for n in range(2)]
    rows = [{"question": f"q {n}", "chosen": "A", "rejected": "B"} for n in range(4)]
    odd = lines(tmp_path / "train-00002-of-00003.jsonl", rows)
    found = parse_files([*part, odd])
    assert (len(found.pairs), {item.file for item in found.rejected}, found.findings.odd) == (20, {odd}, {odd: "orca"})
    other = lines(tmp_path / "orca.jsonl", rows)
    found = parse_files([*part, other])
    assert (len(found.pairs), found.formats[other], found.findings.odd) == (24, "orca", {})


def test_files_of_several_folders_vote_apart(tmp_path: Path) -> None:
    """Equal columns in two folders are two data sets; optional columns and a system text make no odd part."""
    first = lines(tmp_path / "hh" / "train.jsonl", [hh(n) for n in range(4)])
    second = lines(tmp_path / "plain" / "train.jsonl", [bare(n) for n in range(9)])
    third = lines(tmp_path / "hh" / "more.jsonl", [{**hh(9), "id": 1}])
    found = parse_files([first, second, third])
    assert list(found.formats.values()) == ["hh-dialogues", "trl-plain-implicit", "hh-dialogues"]
    assert (len(found.pairs), found.findings.odd) == (14, {})


# ---- unpaired rows


def row(prompt: str, completion: str, label: bool) -> dict[str, Any]:
    return {"prompt": prompt, "completion": completion, "label": label}


def unpaired(folder: Path) -> list[Path]:
    """Three parts; rows of one prompt lie in different ones. One part has a column more."""
    rows = [row(f"q {n % 40}", f"reply {n}", n % 3 == 0) for n in range(200)] + [row("alone", "x", True)]
    parts = [rows[:70], [{**one, "source": "s"} for one in rows[70:140]], rows[140:]]
    return [lines(folder / f"part-{place}.jsonl", part) for place, part in enumerate(parts)]


def shown(pair: PreferencePair) -> tuple[str, str, str]:
    return pair.prompt[0]["content"], pair.chosen, pair.rejected


def outcome(files: list[Path], how: Any) -> tuple[set[tuple[str, str, str]], list[tuple[str, int]]]:
    items = list(stream_files(files, Findings(), choices=Choices(pairing=how)))
    pairs = [shown(item.pair) for item in items if isinstance(item, Accepted)]
    assert len(pairs) == len(set(pairs))
    return set(pairs), [(item.file.name, item.line) for item in items if not isinstance(item, Accepted)]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["all", "first"])
def test_unpaired_rows_find_partners_in_other_files(tmp_path: Path, how: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every fifth row has the same prompt; a third is good. All pairs are what one file would give, on disk as well."""
    files = unpaired(tmp_path)
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    by_prompt = {r["prompt"]: [x for x in rows if x["prompt"] == r["prompt"]] for r in rows}
    expected = set()
    for prompt, some in by_prompt.items():
        good, bad = ([x["completion"] for x in some if x["label"] is label] for label in (True, False))
        if how == "first":
            good, bad = good[:1], bad[:1]
        expected |= {(prompt, g, b) for g in good for b in bad}
    pairs, alone = outcome(files, how)
    assert pairs == expected
    assert ("part-2.jsonl", 61) in alone
    for limit in (1, 20_000):
        monkeypatch.setattr(pairing, "MEMORY_BYTES", limit)
        assert outcome(files, how) == (pairs, alone)


def test_a_prompt_with_very_many_replies_has_a_limit(tmp_path: Path) -> None:
    """65 good replies to one prompt: the last one is over-long; 64 pairs with the bad one."""
    file = lines(tmp_path / "rows.jsonl", [row("q", f"{n}", True) for n in range(65)] + [row("q", "bad", False)])
    found = parse_files([file], choices=Choices(pairing="all"))
    assert (len(found.pairs), [item.reason for item in found.rejected]) == (64, [Reason.TOO_LONG])


def test_single_replies_are_kept_for_a_method_that_takes_them(tmp_path: Path) -> None:
    """All rows with a training prompt are written beside the pairs, once each; with `none` there are no pairs."""
    files = unpaired(tmp_path / "in")
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    lines(files[2], [*(json.loads(line) for line in files[2].read_text().splitlines()), rows[-1]])  # one row twice
    summary = prepare(files, tmp_path / "all", heldout=7, choices=Choices(pairing="all"))
    held = {pair.prompt[0]["content"] for pair in load_pairs(tmp_path / "all" / "heldout.jsonl")}
    kept = load_single(tmp_path / "all" / "train.jsonl")
    expected = sorted((r["prompt"], r["completion"], r["label"]) for r in rows if r["prompt"] not in held)
    assert sorted((one.prompt[0]["content"], one.reply, one.good) for one in kept) == expected
    assert (summary.single_rows, summary.labels) == (len(kept), {"bad": 133, "good": 69})
    prompts = sorted({r["prompt"] for r in rows})[:5]
    given = lines(tmp_path / "held.jsonl", [{"prompt": p, "chosen": "A", "rejected": "B"} for p in prompts])
    summary = prepare(files, tmp_path / "none", heldout_files=[given], choices=Choices(pairing="none"))
    assert (summary.read, summary.used, summary.train_pairs, summary.heldout_pairs) == (5, 5, 0, 5)
    kept = load_single(tmp_path / "none" / "train.jsonl")
    assert summary.single_rows == len(kept) == len([r for r in rows if r["prompt"] not in prompts])
    assert load_single(lines(tmp_path / "none" / "other" / "train.jsonl", [])) == []
    for options in ({}, {"heldout_files": [given], "judge_pairs": 3}):
        with pytest.raises(QAdapterError, match="no pair to hold out or to train a judge on"):
            prepare(files, tmp_path / "refused", choices=Choices(pairing="none"), **options)  # type: ignore[arg-type]
    check_usable(files, choices=Choices(pairing="none"))
    with pytest.raises(QAdapterError, match="No usable preference pair"):
        check_usable([lines(tmp_path / "bad.jsonl", [row("q", "", True)])], choices=Choices(pairing="none"))


def test_single_replies_are_cleaned_as_those_of_pairs(tmp_path: Path) -> None:
    """The token that ends a turn is no part of a reply, and a row with nothing else is empty."""
    rows = [row("q", "yes</s>", True), row("q", "no<|im_end|>", False), row("p", "<|im_end|>", True)]
    file = lines(tmp_path / "rows.jsonl", rows)
    held = lines(tmp_path / "held.jsonl", [{"prompt": "h", "chosen": "A", "rejected": "B"}])
    none = Choices(pairing="none")
    summary = prepare([file], tmp_path / "out", heldout_files=[held], choices=none)
    assert {one.reply for one in load_single(tmp_path / "out" / "train.jsonl")} == {"yes", "no"}
    assert (summary.single_rows, summary.quarantined) == (2, {"empty reply": 1})


def test_single_replies_refuse_what_has_no_effect_on_them(tmp_path: Path) -> None:
    file = lines(tmp_path / "rows.jsonl", [row("q", "yes", True), row("q", "no", False)])
    held = lines(tmp_path / "held.jsonl", [{"prompt": "Q ", "chosen": "A", "rejected": "B"}])
    none = Choices(pairing="none")
    with pytest.raises(QAdapterError, match="No training row is left: all usable single replies have prompts"):
        prepare([file], tmp_path / "out", heldout_files=[held], choices=none)
    assert not list((tmp_path / "out").iterdir())
    with pytest.raises(QAdapterError, match="max_train_pairs has no pair to limit"):
        prepare([file], tmp_path / "out", heldout_files=[held], max_train_pairs=1, choices=none)
    with pytest.raises(QAdapterError, match=r"\(kto\) has no margins, for which `min_margin: 1` means nothing"):
        parse_files([file], choices=Choices(pairing="all", min_margin=1))


@pytest.mark.slow
def test_a_growing_source_of_unpaired_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The partner may come with a later delivery; what is known only at the end stands behind the records."""
    files = unpaired(tmp_path / "in")
    options: dict[str, Any] = {"domain": None, "max_chars": 100, "rules": "r", "choices": Choices(pairing="all")}
    for name, count, limit in (("1", 2, None), ("2", 3, None), ("disk", 3, 1)):
        (tmp_path / name).mkdir()
        if limit:
            monkeypatch.setattr(pairing, "MEMORY_BYTES", limit)
        changes = ledger.update(files[:count], tmp_path / "1" if count == 3 else None, tmp_path / name, **options)
        pairs, alone = outcome(files[:count], "all")
        assert {shown(pair) for entry in ledger.read(tmp_path / name) for pair in entry.pairs} == pairs
        assert sum(changes.quarantined.values()) == len(alone)
        assert (changes.new, changes.unchanged) == ((140, 0) if count == 2 else (61, 140))
    assert unlearnt(tmp_path / "2", tmp_path / "disk") == 0
    assert unlearnt(tmp_path / "2", tmp_path / "1") == len(pairs) - len(outcome(files[:2], "all")[0])


def test_ties_are_counted_in_the_summary(tmp_path: Path) -> None:
    """Margins 2, 0 and −1 beside decisions, and a judgement that is a tie in a file of its own."""
    turns = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": reply}] for reply in "ab"]
    rows = [{"chosen": turns[0], "rejected": turns[1], "score_chosen": 3 + m, "score_rejected": 3} for m in (2, 0, -1)]
    for number, one in enumerate(rows):
        one["chosen"] = [{"role": "user", "content": "q"}, {"role": "assistant", "content": f"a{number}"}]
    arena = [
        {"conversation_a": turns[0], "conversation_b": turns[1], "winner": winner} for winner in ("tie", "model_a")
    ]
    files = [lines(tmp_path / "a.jsonl", rows), lines(tmp_path / "b.jsonl", arena)]
    summary = prepare(files, tmp_path / "out", heldout=0)
    assert summary.ties == {"equal scores": 1, "left out": 1, "scores against the decision": 1}
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["ties"] == summary.ties
