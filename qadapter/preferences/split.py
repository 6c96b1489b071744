"""A training, a held-out and a judge's set without a common prompt, the same for the same pairs on every machine.

Everything is decided by digests: a pair's place in the order by a seeded sha256 of its text, the side of a prompt by
one of the prompt. 16 bytes of each are kept per pair, so that millions of pairs can be divided without being held
(`sorting.py` keeps their texts on disk). Two texts would have to agree in 128 bits to be taken for duplicates.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from qadapter.errors import QAdapterError
from qadapter.preferences.pair import LabelledReply, PreferencePair, prompt_digest

DIGEST_BYTES = 16
_DIGEST = np.dtype(f"S{DIGEST_BYTES}")
Digests = npt.NDArray[np.bytes_]

TRAIN, HELDOUT, JUDGE, CROSSING = range(4)
"""Where a pair goes; `CROSSING` is nowhere: a training pair whose prompt is in the given held-out side."""


class Row(NamedTuple):
    """A pair as it is divided.

    Attributes:
        order: decides its place; equal for equal pairs only.
        prompt: decides its side; equal for equal prompts only.
        text: the pair as a line of `train.jsonl`, without the line end.
    """

    order: bytes
    prompt: bytes
    text: bytes

    @classmethod
    def of(cls, pair: PreferencePair, seed: int) -> Row:
        """The row of a pair."""
        row = pair.to_row()
        line = json.dumps(row, ensure_ascii=False)
        # Margin and votes are no part of what makes two pairs equal.
        text = line if len(row) == 3 else json.dumps(pair.to_trl(), ensure_ascii=False)
        return cls(_draw(seed, text), _draw(seed, pair.prompt_digest), line.encode())

    @classmethod
    def of_single(cls, reply: LabelledReply, seed: int) -> Row:
        """The row of a single reply with its label, as a line of `single.jsonl`."""
        text = json.dumps(reply.to_row(), ensure_ascii=False)
        return cls(_draw(seed, text), _draw(seed, prompt_digest(reply.prompt)), text.encode())


class Drawn:
    """The digests of one side's pairs, 32 bytes for each."""

    def __init__(self) -> None:
        self._orders, self._prompts = bytearray(), bytearray()

    def __len__(self) -> int:
        return len(self._orders) // DIGEST_BYTES

    def add(self, row: Row) -> None:
        """Count a pair."""
        self._orders += row.order
        self._prompts += row.prompt

    def distinct_prompts(self) -> Digests:
        """The prompt of each distinct pair, in no particular order."""
        _, first = np.unique(np.frombuffer(self._orders, _DIGEST), return_index=True)
        return np.frombuffer(self._prompts, _DIGEST)[first]


@dataclass(frozen=True, slots=True)
class Division:
    """Which prompts go where.

    Attributes:
        heldout, judge: their prompts, sorted.
        given: whether the held-out side was given, so that training pairs with its prompts are dropped.
        duplicates, cross_split_pairs, cross_split_prompts: see `Split`.
        train_pairs, heldout_pairs: distinct pairs of either side before the limits.
    """

    heldout: Digests
    judge: Digests
    given: bool
    duplicates: int
    cross_split_pairs: int
    cross_split_prompts: int
    train_pairs: int
    heldout_pairs: int

    def places(self, prompts: Digests) -> npt.NDArray[np.int8]:
        """`TRAIN`, `HELDOUT`, `JUDGE` or `CROSSING` for each pair of the (training) data, by its prompt."""
        places = np.where(among(prompts, self.judge), JUDGE, TRAIN)
        return np.where(among(prompts, self.heldout), CROSSING if self.given else HELDOUT, places).astype(np.int8)


def divide(
    pairs: Drawn,
    *,
    heldout: float | int | None = 0.1,
    heldout_pairs: Drawn | None = None,
    judge_pairs: int = 0,
    needs_pairs: bool = True,
) -> Division:
    """Decide which prompts are held out and which are the judge's. Arguments and errors are those of `split_pairs`.

    With `needs_pairs` off, there may be no training pair: the source has single replies.
    """
    prompts = pairs.distinct_prompts()
    duplicates = len(pairs) - len(prompts)
    held_count = 0
    if heldout_pairs is None:
        held = _draw_prompts(np.unique(prompts), heldout)
    else:
        given = heldout_pairs.distinct_prompts()
        duplicates += len(heldout_pairs) - len(given)
        held, held_count = np.unique(given), len(given)
    across = among(prompts, held)
    train = prompts[~across]
    if not len(train) and needs_pairs:
        raise QAdapterError(
            f"No training pair is left: all {len(pairs)} usable pairs have prompts that are held out too. "
            "Give training data with other prompts."
        )
    crossing = 0 if heldout_pairs is None else int(across.sum())
    judge, apart = _apart(train, judge_pairs)
    return Division(
        heldout=held,
        judge=judge,
        given=heldout_pairs is not None,
        duplicates=duplicates,
        cross_split_pairs=crossing,
        cross_split_prompts=len(np.unique(prompts[across])) if crossing else 0,
        train_pairs=len(train) - apart,
        heldout_pairs=held_count if heldout_pairs is not None else int(across.sum()),
    )


def among(prompts: Digests, some: Digests) -> npt.NDArray[np.bool_]:
    """Which of the prompts are among some that are sorted."""
    if not len(some):
        return np.zeros(len(prompts), bool)
    at = np.minimum(np.searchsorted(some, prompts), len(some) - 1)
    return np.asarray(some[at] == prompts)


ENOUGH_HELDOUT = 20
"""Prompts: with fewer an accuracy tells nothing, for it is a multiple of a twentieth or more."""


@dataclass(frozen=True, slots=True)
class Split:
    """Sets of pairs without a common prompt, in an order that depends on the pairs and the seed only.

    Attributes:
        train, heldout: the pairs kept.
        duplicates: pairs removed because an equal pair is kept on the same side.
        cross_split_pairs: training pairs removed because their prompt is held out.
        cross_split_prompts: distinct prompts among them.
        cut_train, cut_heldout: pairs removed by the two limits.
        judge: pairs kept from every policy, to train a judge of their answers on.
    """

    train: list[PreferencePair]
    heldout: list[PreferencePair]
    duplicates: int
    cross_split_pairs: int
    cross_split_prompts: int
    cut_train: int
    cut_heldout: int
    judge: list[PreferencePair] = field(default_factory=list)


def split_pairs(
    pairs: Sequence[PreferencePair],
    *,
    heldout: float | int | None = 0.1,
    heldout_pairs: Sequence[PreferencePair] | None = None,
    seed: int = 0,
    max_train_pairs: int | None = None,
    max_heldout_pairs: int | None = None,
    judge_pairs: int = 0,
) -> Split:
    """Divides pairs by prompt, so that no prompt is on both sides. The order of `pairs` has no influence.

    If `heldout` is a share, a prompt's side depends on its text, the seed and `heldout` alone: rows that arrive later
    never move a prompt from one side to the other.

    Args:
        pairs: all pairs, or only the training side's if `heldout_pairs` is given.
        heldout: below 1 a share of the prompts (each is drawn on its own, so the count is near the share, and at least
            one on each side), from 1 on a whole number of prompts. 0 holds nothing out. None: a tenth, but of few
            prompts so many that there are `ENOUGH_HELDOUT`, at most a third.
        heldout_pairs: a held-out side that is given; training pairs with one of its prompts are removed.
        seed: decides the split, the order and what the limits cut.
        max_train_pairs, max_heldout_pairs: keep at most so many pairs a side.
        judge_pairs: set so many pairs apart from training, whole prompts, so it can be a few more; before the limits.

    Raises:
        QAdapterError: `heldout`, a limit or `judge_pairs` is out of range, or a side is left empty.
    """
    check_limits(max_train_pairs=max_train_pairs, max_heldout_pairs=max_heldout_pairs)
    every, drawn = _distinct(pairs, seed)
    held_given, held_drawn = _distinct(heldout_pairs, seed) if heldout_pairs is not None else ([], None)
    division = divide(drawn, heldout=heldout, heldout_pairs=held_drawn, judge_pairs=judge_pairs)
    sides: list[list[PreferencePair]] = [[], [pair for _, pair in held_given], [], []]
    places = division.places(np.array([row.prompt for row, _ in every], _DIGEST))
    for (_, pair), place in zip(every, places.tolist(), strict=True):
        sides[place].append(pair)
    return Split(
        train=sides[TRAIN][:max_train_pairs],
        heldout=sides[HELDOUT][:max_heldout_pairs],
        duplicates=division.duplicates,
        cross_split_pairs=division.cross_split_pairs,
        cross_split_prompts=division.cross_split_prompts,
        cut_train=cut(division.train_pairs, max_train_pairs),
        cut_heldout=cut(division.heldout_pairs, max_heldout_pairs),
        judge=sides[JUDGE],
    )


def cut(pairs: int, limit: int | None) -> int:
    """How many pairs a limit leaves out."""
    return 0 if limit is None else max(0, pairs - limit)


def check_limits(**limits: int | None) -> None:
    """Refuse limits below 1."""
    for name, limit in limits.items():
        if limit is not None and limit < 1:
            raise QAdapterError(f"{name} is {limit}; a number from 1 on, or none for no limit, was expected.")


def _draw_prompts(ranked: Digests, heldout: float | int | None) -> Digests:
    """The prompts to hold out: those whose seeded hash is smallest."""
    if heldout is None:
        drawn = _draw_prompts(ranked, 0.1)
        return ranked[: max(len(drawn), min(ENOUGH_HELDOUT, len(ranked) // 3))]
    if isinstance(heldout, bool) or not 0 <= heldout < 2**53 or (heldout >= 1 and heldout != int(heldout)):
        raise QAdapterError(f"heldout is {heldout}; a share below 1 or a whole number of prompts was expected.")
    if heldout == 0:
        return ranked[:0]
    if heldout < 1:
        # Of a float's 53 digits none lies beyond the first 128 bits, but for shares that hold nothing out anyway.
        below = int(heldout * 2.0**256) >> 128
        count = int(np.searchsorted(ranked, np.array(below.to_bytes(DIGEST_BYTES, "big"), _DIGEST)))
        count = max(1, min(count, len(ranked) - 1))
    else:
        count = int(heldout)
    if count >= len(ranked):
        raise QAdapterError(
            f"heldout is {heldout}, but the data has only {len(ranked)} distinct prompts, and training needs at least "
            "one. Hold out less or give more data."
        )
    return ranked[:count]


def _apart(train: Digests, count: int) -> tuple[Digests, int]:
    """The prompts of at least `count` training pairs, those whose seeded hash is largest, and how many pairs they have.

    The hash is of the prompt alone, so data sets that share their prompts (DSP's domains) set the same ones apart.
    """
    if count < 0:
        raise QAdapterError(f"judge_pairs is {count}; a number from 0 (no judge) on was expected.")
    ranked, pairs_of = np.unique(train, return_counts=True)
    if count == 0:
        return ranked[:0], 0
    so_far = np.cumsum(pairs_of[::-1])[:-1]
    needed = int(np.searchsorted(so_far, count)) + 1
    if needed > len(so_far):
        raise QAdapterError(
            f"judge_pairs is {count}, but only {len(train)} pairs on {len(ranked)} prompts are not held out, and "
            "training needs at least one prompt. Set fewer apart or give more data."
        )
    return ranked[len(ranked) - needed :], int(so_far[needed - 1])


def _draw(seed: int, text: str) -> bytes:
    """128 bits that look random, the same on every machine: the first half of a sha256."""
    return hashlib.sha256(f"{seed}:{text}".encode()).digest()[:DIGEST_BYTES]


def _distinct(pairs: Iterable[PreferencePair], seed: int) -> tuple[list[tuple[Row, PreferencePair]], Drawn]:
    """Pairs without exact duplicates, in an order that the seed and the texts decide; and the digests of all."""
    drawn = Drawn()
    found: dict[bytes, tuple[Row, PreferencePair]] = {}
    for pair in pairs:
        row = Row.of(pair, seed)
        drawn.add(row)
        # Equal texts may differ in margin or votes: which of them stays must not depend on the order of reading.
        if row.order not in found or row.text < found[row.order][0].text:
            found[row.order] = (row, pair)
    return [found[order] for order in sorted(found)], drawn
