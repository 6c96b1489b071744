"""The ledger of a growing source, the mixture drawn from it, and the toy deliveries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qadapter.errors import QAdapterError
from qadapter.preferences import ledger, pairing, sorting
from qadapter.preferences.building import Choices
from qadapter.preferences.ledger import REFUSED_FILE, UNREAD_FILE, Changes
from qadapter.preferences.mixture import unlearnt, write_heldout, write_mixture
from qadapter.preferences.pair import load_pairs
from qadapter.preferences.records import Reason
from qadapter.preferences.split import split_pairs
from qadapter.preferences.stream import parse_files
from qadapter.toyworld.drops import write_drop


def record(n: int, chosen: str = "yes") -> dict[str, str]:
    return {"prompt": f"question {n} ?", "chosen": f"{chosen} {n}", "rejected": f"no {n}"}


def write(file: Path, rows: list[Any]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def update(
    folder: Path, out: Path, previous: Path | None = None, rules: str = "r", choices: Choices | None = None
) -> Changes:
    out.mkdir()
    files = sorted(folder.glob("*.jsonl"))
    return ledger.update(files, previous, out, domain=None, max_chars=1000, rules=rules, choices=choices)


def mixture(of: Path, out: Path, **changes: Any) -> dict[str, Any]:
    out.mkdir()
    settings: dict[str, Any] = {
        "learnt": None,
        "rows": "all",
        "old_share": 0.0,
        "heldout": 0.25,
        "heldout_files": None,
        "domain": None,
        "seed": 0,
        "max_train_pairs": None,
        "max_heldout_pairs": None,
        "max_chars": 1000,
    }
    write_mixture(of, out, **{**settings, **changes})
    return dict(json.loads((out / "summary.json").read_text()))


def test_only_new_and_changed_records_are_validated(tmp_path: Path) -> None:
    """Ten records; then one is changed, one removed, two added in another file, one of them broken."""
    folder = tmp_path / "in"
    write(folder / "a.jsonl", [record(n) for n in range(10)])
    first = update(folder, tmp_path / "1")
    assert (first.new, first.changed, first.unchanged, first.removed, first.validated) == (10, 0, 0, 0, 10)
    assert first.fresh_pairs == 10

    rows = [record(n) for n in range(9)]  # the last one is gone
    rows[4] = record(4, "certainly")
    write(folder / "a.jsonl", rows)
    write(folder / "b.jsonl", [record(20), {"prompt": "p", "chosen": "same", "rejected": "same"}])
    second = update(folder, tmp_path / "2", tmp_path / "1")
    assert (second.new, second.changed, second.unchanged, second.removed, second.validated) == (2, 1, 8, 1, 3)
    assert second.fresh_pairs == 2
    assert second.fresh_quarantined == {Reason.IDENTICAL_REPLIES.value: 1}
    entries = list(ledger.read(tmp_path / "2"))
    assert [(e.file, e.line) for e in entries if e.fresh] == [("a.jsonl", 5), ("b.jsonl", 1), ("b.jsonl", 2)]

    third = update(folder, tmp_path / "3", tmp_path / "2")
    assert (third.new, third.changed, third.unchanged, third.validated) == (0, 0, 11, 0)
    assert third.quarantined == {Reason.IDENTICAL_REPLIES.value: 1}
    assert third.fresh_quarantined == {}


def test_an_inserted_line_makes_nothing_else_new(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write(folder / "a.jsonl", [record(n) for n in range(5)])
    update(folder, tmp_path / "1")
    write(folder / "a.jsonl", [record(99), *(record(n) for n in range(5))])
    changes = update(folder, tmp_path / "2", tmp_path / "1")
    assert (changes.new, changes.changed, changes.unchanged, changes.removed) == (1, 0, 5, 0)


def test_other_rules_validate_everything_again(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write(folder / "a.jsonl", [record(n) for n in range(5)])
    update(folder, tmp_path / "1")
    assert update(folder, tmp_path / "2", tmp_path / "1", rules="other").validated == 5


@pytest.mark.parametrize("memory", [pairing.MEMORY_BYTES, 0], ids=["in memory", "on disk"])
def test_of_unpaired_rows_only_what_was_not_there_is_new(
    memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row that stays alone is reported once. A new row whose file is read first gives its pair at an earlier one."""
    monkeypatch.setattr(pairing, "MEMORY_BYTES", memory)
    folder, alone = tmp_path / "in", Reason.NO_PARTNER.value

    def row(n: int, label: bool) -> dict[str, Any]:
        return {"prompt": f"question {n} ?", "completion": f"{'yes' if label else 'no'} {n}", "label": label}

    def looked(out: str, previous: str | None = None) -> Changes:
        before = tmp_path / previous if previous else None
        return update(folder, tmp_path / out, before, choices=Choices(pairing="all"))

    write(folder / "b.jsonl", [row(1, True), row(1, False), row(2, True), row(3, True)])
    first = looked("1")
    assert (first.new, first.fresh_pairs, first.fresh_quarantined) == (4, 1, {alone: 2})
    again = looked("2", "1")
    assert (again.unchanged, again.fresh_pairs, again.fresh_quarantined) == (4, 0, {})
    assert again.quarantined == {alone: 2}

    write(folder / "a.jsonl", [row(2, False), row(4, True)])
    more = looked("3", "2")
    assert (more.new, more.fresh_pairs, more.fresh_quarantined) == (2, 1, {alone: 1})
    assert more.quarantined == {alone: 2}
    assert unlearnt(tmp_path / "3", tmp_path / "2") == 1
    (folder / "a.jsonl").unlink()
    fewer = looked("4", "3")
    assert (fewer.removed, fewer.fresh_pairs, fewer.fresh_quarantined) == (2, 0, {alone: 1}), "2 is alone again"


PROMPTS = ("Which town is the capital of France?", "How is a loaf of bread baked?", "Who wrote the tale of Genji?")
LATER = {"prompt": "What is a compiler good for?", "chosen": "It translates.", "rejected": "Nothing."}


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": prompt, "chosen": f"{prompt} Well.", "rejected": f"{prompt} No."} for prompt in PROMPTS],
        [{"prompt": f"USER: {prompt} ASSISTANT:", "chosen": "Well.", "rejected": "No."} for prompt in PROMPTS],
    ],
    ids=["replies that repeat the prompt", "prompts that are transcripts"],
)
def test_a_delivery_that_changes_how_all_are_read_reads_all_again(rows: list[Any], tmp_path: Path) -> None:
    """A growing source gives what the same files give at once, whatever was decided from its first records before."""
    folder = tmp_path / "in"
    write(folder / "a.jsonl", rows)
    update(folder, tmp_path / "1")
    write(folder / "a.jsonl", [*rows, LATER])
    changes = update(folder, tmp_path / "2", tmp_path / "1")
    assert (changes.new, changes.changed, changes.removed) == (1, 3, 0)
    update(folder, tmp_path / "at once")
    grown, at_once = ([entry.outcome for entry in ledger.read(tmp_path / name)] for name in ("2", "at once"))
    assert grown == at_once


def test_a_file_of_no_known_format_does_not_stop_the_others(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write(folder / "a.jsonl", [record(n) for n in range(5)])
    update(folder, tmp_path / "1")
    broken = write_drop(folder, "broken")
    changes = update(folder, tmp_path / "2", tmp_path / "1")
    assert (changes.new, changes.unchanged, changes.fresh_pairs) == (1, 5, 0)
    assert changes.fresh_quarantined == {REFUSED_FILE: 1}
    assert "no JSON object" in changes.refused_files[broken.name]
    assert json.loads((tmp_path / "2" / "quarantine.jsonl").read_text()) == {
        "file": broken.name,
        "line": 1,
        "reason": REFUSED_FILE,
    }


def test_a_file_that_is_not_read_is_quarantined_by_its_name(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    files = [write(folder / "a.jsonl", [record(n) for n in range(5)])]
    options: dict[str, Any] = {"domain": None, "max_chars": 1000, "rules": "r"}
    for out in ("1", "2", "3", "4"):
        (tmp_path / out).mkdir()
    first = ledger.update(files, None, tmp_path / "1", unread={"b/week3.xlsx": 12}, **options)
    assert (first.new, first.fresh_pairs, first.fresh_quarantined) == (6, 5, {UNREAD_FILE: 1})
    assert first.refused_files["b/week3.xlsx"].startswith("its name ends in none of .json, .jsonl, ")
    assert json.loads((tmp_path / "1" / "quarantine.jsonl").read_text())["file"] == "b/week3.xlsx"
    same = ledger.update(files, tmp_path / "1", tmp_path / "2", unread={"b/week3.xlsx": 12}, **options)
    assert (same.new, same.unchanged, same.quarantined, same.fresh_quarantined) == (0, 6, {UNREAD_FILE: 1}, {})
    grown = ledger.update(files, tmp_path / "2", tmp_path / "3", unread={"b/week3.xlsx": 13}, **options)
    assert (grown.changed, grown.unchanged, grown.fresh_quarantined) == (1, 5, {UNREAD_FILE: 1})
    alone = ledger.update([], tmp_path / "3", tmp_path / "4", unread={"b/week3.xlsx": 13}, **options)
    assert (alone.removed, alone.unchanged, alone.fresh_pairs) == (5, 1, 0)


def test_the_mixture_is_everything_or_what_is_new_and_a_sample(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    write(folder / "a.jsonl", [record(n) for n in range(200)])
    update(folder, tmp_path / "1")
    first = mixture(tmp_path / "1", tmp_path / "m1")
    assert first["train_pairs"] + first["heldout_pairs"] == 200
    assert (first["fresh_pairs"], first["old_pairs"]) == (first["train_pairs"], 0)

    write(folder / "b.jsonl", [record(n) for n in range(200, 240)])
    update(folder, tmp_path / "2", tmp_path / "1")
    everything = mixture(tmp_path / "2", tmp_path / "m2", learnt=tmp_path / "1")
    assert everything["old_pairs"] == first["train_pairs"], "a prompt never changes sides"
    new = mixture(tmp_path / "2", tmp_path / "m3", learnt=tmp_path / "1", rows="new", old_share=0.2)
    assert new["fresh_pairs"] == everything["fresh_pairs"]
    # a binomial count, p 0.2: within four standard deviations of its mean
    mean = 0.2 * everything["old_pairs"]
    assert abs(new["old_pairs"] - mean) < 4 * (mean * 0.8) ** 0.5
    assert mixture(tmp_path / "2", tmp_path / "m4", learnt=tmp_path / "1", rows="new")["old_pairs"] == 0
    sides = {side: load_pairs(tmp_path / "m3" / f"{side}.jsonl") for side in ("train", "heldout")}
    assert new["heldout_pairs"] == len(sides["heldout"]) == everything["heldout_pairs"]
    assert not {p.prompt_digest for p in sides["train"]} & {p.prompt_digest for p in sides["heldout"]}


@pytest.mark.slow
def test_a_mixture_is_what_the_split_of_all_its_pairs_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pairs in the same order as from memory, with limits and held-out files; the same from disk."""
    folder = tmp_path / "in"
    write(folder / "a.jsonl", [record(n) for n in range(60)])
    update(folder, tmp_path / "1")
    write(folder / "b.jsonl", [record(n) for n in range(50, 90)])
    update(folder, tmp_path / "2", tmp_path / "1")
    held = write(tmp_path / "held.jsonl", [record(n) for n in range(80, 95)])
    every = [pair for entry in ledger.read(tmp_path / "2") for pair in entry.pairs]
    assert len(every) == 100
    old = {str(pair) for entry in ledger.read(tmp_path / "1") for pair in entry.pairs}
    given = parse_files([held]).pairs
    for number, files in enumerate((None, [held])):
        expected = split_pairs(
            every, heldout=0.25, heldout_pairs=given if files else None, seed=3, max_train_pairs=40, max_heldout_pairs=9
        )
        settings: dict[str, Any] = {"heldout_files": files, "seed": 3, "max_train_pairs": 40, "max_heldout_pairs": 9}
        out = tmp_path / f"m{number}"
        mixture(tmp_path / "2", out, learnt=tmp_path / "1", **settings)
        assert load_pairs(out / "train.jsonl") == expected.train
        assert load_pairs(str(out / "heldout.jsonl")) == expected.heldout
        assert load_pairs(out / "fresh.jsonl") == [pair for pair in expected.train if str(pair) not in old]
        with monkeypatch.context() as patch:
            patch.setattr(sorting, "MEMORY_BYTES", 500)
            mixture(tmp_path / "2", tmp_path / f"d{number}", learnt=tmp_path / "1", **settings)
        for file in sorted(out.iterdir()):
            assert (tmp_path / f"d{number}" / file.name).read_bytes() == file.read_bytes()
    (tmp_path / "alone").mkdir()
    write_heldout([held], tmp_path / "alone", domain=None, seed=3, max_heldout_pairs=9, max_chars=1000)
    assert (tmp_path / "alone" / "heldout.jsonl").read_bytes() == (tmp_path / "m1" / "heldout.jsonl").read_bytes()


def test_a_limit_is_of_what_is_trained_on_and_the_new_pairs_come_first(tmp_path: Path) -> None:
    """The champion's ledger has all of a delivery: what a limit left out would never be new again."""
    folder = tmp_path / "in"
    write(folder / "a.jsonl", [record(n) for n in range(200)])
    update(folder, tmp_path / "1")
    write(folder / "b.jsonl", [record(n) for n in range(200, 240)])
    update(folder, tmp_path / "2", tmp_path / "1")
    settings: dict[str, Any] = {"learnt": tmp_path / "1", "rows": "new", "old_share": 0.5}
    fresh = mixture(tmp_path / "2", tmp_path / "m", **settings)["fresh_pairs"]
    assert fresh > 20
    for limit, expected in ((fresh + 5, (fresh, 5)), (fresh, (fresh, 0)), (fresh - 3, (fresh - 3, 0)), (10_000, None)):
        found = mixture(tmp_path / "2", tmp_path / f"m{limit}", max_train_pairs=limit, **settings)
        if expected is None:
            assert found["fresh_pairs"] == fresh
            assert found["old_pairs"] > 5
        else:
            assert (found["fresh_pairs"], found["old_pairs"]) == expected
            assert found["train_pairs"] == sum(expected)


def test_data_of_a_rejected_candidate_are_still_new(tmp_path: Path) -> None:
    """The champion knows the first ledger; a second delivery was rejected, and now there is a third."""
    folder = tmp_path / "in"
    for number, rows in enumerate((range(20), range(20, 30), range(30, 35)), start=1):
        write(folder / f"{number}.jsonl", [record(n) for n in rows])
        update(folder, tmp_path / str(number), tmp_path / str(number - 1) if number > 1 else None)
    found = mixture(tmp_path / "3", tmp_path / "m", learnt=tmp_path / "1", rows="new", heldout=0)
    assert (found["fresh_pairs"], found["old_pairs"]) == (15, 0)
    assert unlearnt(tmp_path / "3", tmp_path / "1") == 15
    assert unlearnt(tmp_path / "1", tmp_path / "3") == 0
    assert unlearnt(tmp_path / "3", None) == 35


def test_toy_deliveries_are_parts_of_one_whole(tmp_path: Path) -> None:
    files = [write_drop(tmp_path, "good", part) for part in (1, 2)]
    rows = [json.loads(line) for file in files for line in file.read_text().splitlines()]
    assert len(rows) == 160, "80 harmful requests in two wordings"
    assert len({row["chosen"].split("Assistant")[0] for row in rows}) == 160
    flipped = json.loads(write_drop(tmp_path, "flipped", 1).read_text().splitlines()[0])
    good = json.loads(files[0].read_text().splitlines()[0])
    assert (flipped["chosen"], flipped["rejected"]) == (good["rejected"], good["chosen"])
    with pytest.raises(QAdapterError, match="part is 3"):
        write_drop(tmp_path, "good", 3)
