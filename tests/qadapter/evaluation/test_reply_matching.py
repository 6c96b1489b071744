from __future__ import annotations

import json

import pytest

from qadapter.errors import QAdapterError
from qadapter.evaluation.benchmarks.items import read_items
from qadapter.evaluation.benchmarks.reply_matching.build import write_reply_matching


def conversations(n: int) -> list[tuple[str, str]]:
    return [(f"prompt {i}", f"{i:03d}" + "x" * i) for i in range(n)]


def test_choices_are_the_own_reply_and_the_nearest_in_length(tmp_path) -> None:
    """Reply i has length 3 + i, so the three nearest to i are among i-3 … i+3, in sum of distances 1 + 1 + 2."""
    file = tmp_path / "new" / "matching.jsonl"
    summary = write_reply_matching(conversations(40), file, seed=1)
    assert summary.items == 40
    items = read_items(file, ["prompt", "choices", "answer"])
    replies = dict(conversations(40))
    for item in items:
        right = item["choices"][item["answer"]]
        assert right == replies[item["prompt"]]
        assert len(set(item["choices"])) == 4
        others = [abs(len(c) - len(right)) for c in item["choices"] if c != right]
        index = int(right[:3])
        assert sum(others) == (4 if 0 < index < 39 else 6)
    places = [item["answer"] for item in items]
    assert {places.count(place) for place in range(4)} <= set(range(3, 20))


def test_the_seed_decides_and_the_number_is_kept(tmp_path) -> None:
    def run(seed: int) -> str:
        write_reply_matching(conversations(30), tmp_path / "m.jsonl", seed=seed, max_items=10, choices=3)
        return (tmp_path / "m.jsonl").read_text()

    assert run(1) == run(1)
    assert run(1) != run(2)
    assert len(run(1).splitlines()) == 10
    assert all(len(json.loads(line)["choices"]) == 3 for line in run(1).splitlines())


def test_what_cannot_be_asked_is_left_out_and_counted(tmp_path) -> None:
    user = {"role": "user", "content": "a question"}
    rows = [
        ([user], "the reply"),
        ("A second question", "another reply"),
        ("A third", "a third reply"),
        ([user, {"role": "assistant", "content": "x"}, user], "of several turns"),
        ("a question", "the same prompt again"),
        ("A fourth", "the reply"),
        ("A fifth", "  "),
        ("A sixth", "y" * 101),
    ]
    summary = write_reply_matching(rows, tmp_path / "m.jsonl", seed=0, choices=3, max_chars=100)
    assert (summary.items, summary.multi_turn, summary.repeated, summary.over_long) == (3, 1, 3, 1)
    with pytest.raises(QAdapterError, match=r"at least 4 different .* found 3 \(1 of several turns, 1 too long, 3 rep"):
        write_reply_matching(rows, tmp_path / "m.jsonl", seed=0, choices=4, max_chars=100)
    with pytest.raises(QAdapterError, match="at least 2"):
        write_reply_matching(rows, tmp_path / "m.jsonl", seed=0, choices=1)
