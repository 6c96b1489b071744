"""Results of batches are kept: a killed run goes on, processes share the work, and the numbers stay the same."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qadapter.errors import QAdapterError
from qadapter.progress.kept import computed, keeping, leads
from qadapter.progress.reports import listening

SIZES = [4, 4, 3]


class Counting:
    """Stands for a model: its results depend on the batch, and on torch's random state if it samples."""

    def __init__(self, sampled: bool = False, killed_at: int | None = None) -> None:
        self.sampled, self.killed_at = sampled, killed_at
        self.batches: list[int] = []

    def __call__(self, place: int) -> list[float | None]:
        if place == self.killed_at:
            raise KeyboardInterrupt
        self.batches.append(place)
        return [float(torch.rand(())) if self.sampled else place / 3, None, float("-inf")]

    def run(self, scratch: Path | None, of: str = "tokens", work: str = "scoring") -> list[Any]:
        """All batches twice: of two models, say, with the same items."""
        torch.manual_seed(7)
        with keeping(scratch):
            return [repr(self.calls(of, work)) for _ in range(2)]

    def calls(self, of: str = "tokens", work: str = "scoring") -> list[Any]:
        """All batches once."""
        return computed(work, "pair", SIZES, self, lambda place: [of, place], sampled=self.sampled)


@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("killed_at", [0, 2])
def test_a_killed_run_goes_on(tmp_path: Path, sampled: bool, killed_at: int) -> None:
    whole = Counting(sampled).run(None)
    with pytest.raises(KeyboardInterrupt):
        Counting(sampled, killed_at).run(tmp_path)
    rest = Counting(sampled)
    assert rest.run(tmp_path) == whole
    assert rest.batches == [*range(killed_at, 3), 0, 1, 2], "the second call's batches are others"
    again = Counting(sampled)
    assert again.run(tmp_path) == whole
    assert again.batches == []


@pytest.mark.parametrize(
    "harm",
    [
        lambda text: text[: len(text) // 2],  # a kill while the last line was written
        lambda text: text[:-30] + "\0" * 30,  # a power cut
        lambda text: text.replace("0.333", "0.334"),  # a flipped bit
    ],
    ids=["cut", "zeroed", "flipped"],
)
def test_damaged_lines_are_computed_again(tmp_path: Path, harm: Callable[[str], str]) -> None:
    whole = Counting().run(tmp_path)
    (file,) = tmp_path.rglob("*.jsonl")
    damaged = harm(file.read_text())
    assert damaged != file.read_text()
    file.write_text(damaged)
    rest = Counting()
    assert rest.run(tmp_path) == whole
    assert 0 < len(rest.batches) < 6
    last = Counting()
    assert last.run(tmp_path) == whole
    assert last.batches == [], "what was appended behind a cut line can be read"


def test_other_items_and_other_work_are_not_mixed_up(tmp_path: Path) -> None:
    Counting().run(tmp_path)
    for change in ({"of": "other tokens"}, {"work": "answering"}):
        other = Counting()
        other.run(tmp_path, **change)
        assert len(other.batches) == 6


def test_batches_of_the_same_items_are_draws_of_their_own(tmp_path: Path) -> None:
    """Four replies to one prompt in batches of two: each is drawn, as without a scratch folder."""

    def drawn(scratch: Path | None) -> list[list[float]]:
        torch.manual_seed(7)
        with keeping(scratch), listening(listener := Heard()):
            found = computed(
                "sampling", "reply", [2, 2], lambda _: torch.rand(2).tolist(), lambda _: [1, 1], sampled=True
            )
        assert listener.told[0] == ("sampling", "reply", 4, 0)
        return found

    torch.manual_seed(7)
    whole = [torch.rand(2).tolist(), torch.rand(2).tolist()]
    assert whole[0] != whole[1]
    assert drawn(None) == drawn(tmp_path) == whole


@pytest.mark.parametrize("sampled", [False, True])
def test_processes_share_the_batches(tmp_path: Path, sampled: bool) -> None:
    """Three of them, here as threads: each computes its share, all have all results; sampling is one process's."""
    workers = [Counting(sampled) for _ in range(3)]
    results: list[Any] = [None] * 3
    leading: list[Any] = [None] * 3

    def work(rank: int) -> None:
        with keeping(tmp_path, (rank, 3)):
            leading[rank] = leads()
            results[rank] = repr([workers[rank].calls() for _ in range(2)])

    threads = [threading.Thread(target=work, args=(rank,)) for rank in (2, 1, 0)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert results[0] == results[1] == results[2]
    assert leading == [True, False, False]
    if sampled:
        assert [worker.batches for worker in workers] == [[0, 1, 2, 0, 1, 2], [], []]
    else:
        assert [worker.batches for worker in workers] == [[0, 0], [1, 1], [2, 2]]
        assert results[0] == repr([Counting().calls() for _ in range(2)])


class Heard:
    """A listener that counts."""

    def __init__(self) -> None:
        self.told: list[Any] = []

    def begin(self, work: str, unit: str, total: int, done: int) -> None:
        self.told.append((work, unit, total, done))

    def at(self, done: int) -> None:
        self.told.append(done)

    def end(self) -> None:
        self.told.append("end")

    def row(self, row: Any) -> None:
        raise AssertionError(row)


def test_reports_count_kept_items_as_done(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        Counting(killed_at=1).run(tmp_path)
    heard = Heard()
    with listening(heard):
        Counting().run(tmp_path)
        Counting().run(None)
    resumed = [("scoring", "pair", 11, 4), 8, 11, "end"]
    anew = [("scoring", "pair", 11, 0), 4, 8, 11, "end"]
    assert heard.told == [*resumed, *anew, *anew, *anew]


@pytest.mark.parametrize("result", [math.nan, [1.0, [0.5, math.nan]], [(math.nan, True)]])
@pytest.mark.parametrize("kept", [False, True])
def test_a_result_that_is_no_number_is_refused(tmp_path: Path, result: Any, kept: bool) -> None:
    """Every comparison with NaN is false: an accuracy of it would be a plausible number."""
    with keeping(tmp_path if kept else None), pytest.raises(QAdapterError, match="scoring: a result is NaN"):
        computed("scoring", "pair", [2], lambda _: result, lambda _: None)
    assert not any(file.stat().st_size for file in tmp_path.rglob("*.jsonl"))
