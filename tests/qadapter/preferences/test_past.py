"""Pairs of earlier preferences beside new ones: all of them, a share that stays the same, none."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import read_json
from qadapter.preferences.pair import load_pairs
from qadapter.preferences.past import mix_pairs
from tests.support.tiny_toy import pair, write_pairs


def written(folder: Path, name: str, count: int) -> Path:
    """Pairs on `count` prompts."""
    return write_pairs(folder / f"{name}.jsonl", [pair(f"{name} {i} ?", "yes .", "no .") for i in range(count)])


def mixed(folder: Path, new: Path, old: list[Path], share: float, seed: int = 0) -> list[str]:
    """The prompts of a mix, in order."""
    folder.mkdir()
    mix_pairs(new, old, folder, share=share, seed=seed)
    return [one.prompt[-1]["content"] for one in load_pairs(folder / "train.jsonl")]


def test_shares_of_earlier_pairs(tmp_path: Path) -> None:
    """All at 1, none at 0, about a quarter of 400 at .25; the new pairs are always whole, and last."""
    new, old = written(tmp_path, "new", 5), [written(tmp_path, "a", 400), written(tmp_path, "b", 3)]
    ours = [f"new {i} ?" for i in range(5)]
    assert mixed(tmp_path / "none", new, old, 0.0) == ours
    whole = mixed(tmp_path / "all", new, old, 1.0)
    assert whole == [*(f"a {i} ?" for i in range(400)), *(f"b {i} ?" for i in range(3)), *ours]
    some = mixed(tmp_path / "some", new, old, 0.25)
    assert some[-5:] == ours
    assert 75 <= sum(prompt.startswith("a ") for prompt in some) <= 125  # 100 ± 3 · √(400 · ¼ · ¾)
    summary = read_json(tmp_path / "some" / "summary.json")
    assert summary["train_pairs"] == len(some) == summary["old_pairs"] + 5
    assert summary["train_prompts"] == len(some)
    text = (tmp_path / "some" / "train.jsonl").read_bytes()
    assert summary["train_sha256"] == hashlib.sha256(text).hexdigest()


def test_a_draw_is_the_same_in_every_mix(tmp_path: Path) -> None:
    """What a pair's text and the seed decide does not change with what else is mixed in."""
    new, old, other = written(tmp_path, "new", 2), written(tmp_path, "a", 60), written(tmp_path, "b", 60)
    alone = mixed(tmp_path / "1", new, [old], 0.5)
    together = mixed(tmp_path / "2", new, [old, other], 0.5)
    assert [prompt for prompt in together if prompt.startswith("a ")] == alone[:-2]
    assert mixed(tmp_path / "3", new, [old], 0.5, seed=1) != alone


def test_nothing_to_train_on_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(QAdapterError, match="give pairs to train on"):
        mix_pairs(tmp_path / "empty.jsonl", [written(tmp_path, "a", 2)], tmp_path, share=0.0, seed=0)
