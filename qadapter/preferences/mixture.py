"""What a re-training reads: every pair, or the new ones and a sample of the old; and a held-out side that stays put.

The pairs of a ledger are divided as those of a fixed data set are: by digests, with the texts on disk (`sorting.py`).
48 bytes per pair are held.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import numpy as np

from qadapter.files.artifacts import write_json
from qadapter.preferences.building import Choices
from qadapter.preferences.ledger import read
from qadapter.preferences.sides import Output, Side
from qadapter.preferences.sorting import SortedRows
from qadapter.preferences.split import (
    CROSSING,
    DIGEST_BYTES,
    HELDOUT,
    TRAIN,
    Digests,
    Row,
    check_limits,
    divide,
)

_DIGEST = np.dtype(f"S{DIGEST_BYTES}")


def write_mixture(
    ledger: Path,
    out: Path,
    *,
    learnt: Path | None,
    rows: Literal["all", "new"],
    old_share: float,
    heldout: float,
    heldout_files: Sequence[Path] | None,
    domain: str | None,
    seed: int,
    max_train_pairs: int | None,
    max_heldout_pairs: int | None,
    max_chars: int,
    choices: Choices | None = None,
) -> None:
    """Split the usable pairs of a ledger by prompt and choose the training pairs.

    Args:
        ledger: folder that `ledger.update` wrote.
        out: gets `train.jsonl`, `heldout.jsonl` (one pair per line), `fresh.jsonl` (the new ones among the training
            pairs) and `summary.json`: pairs, prompts and sha256 of either side, and how many of the training pairs are
            `fresh_pairs` and `old_pairs`.
        learnt: ledger of what the policy that is trained on has learnt; None: nothing. What is not in it is fresh, also
            if an earlier training read it whose policy was rejected.
        rows: `all` trains on everything; `new` on the fresh pairs and a sample of the others.
        old_share: share of the other pairs in that sample. A pair's draw depends on its text and the seed alone.
        max_train_pairs: train on at most so many pairs; where the others are a sample, on the fresh ones first.
        heldout, heldout_files, seed, max_heldout_pairs, domain, max_chars, choices: as in
            `qadapter.preferences.prepare.prepare`.

    Raises:
        QAdapterError: no training pair is left.
    """
    check_limits(max_train_pairs=max_train_pairs, max_heldout_pairs=max_heldout_pairs)
    known = _identities(learnt, seed)
    with ExitStack() as stack:
        pairs = SortedRows(out / ".rows-train")
        stack.callback(pairs.close)
        for row in _rows(ledger, seed):
            pairs.add(row)
        held = Side(heldout_files, out / ".rows-heldout") if heldout_files else None
        if held:
            stack.callback(held.close)
            held.read(seed, domain=domain, max_chars=max_chars, choices=choices)
        division = divide(pairs.drawn, heldout=heldout, heldout_pairs=held.rows.drawn if held else None)
        train, fresh, kept = (
            stack.enter_context(Output(out / f"{name}.jsonl", limit))
            for name, limit in (("train", None), ("fresh", None), ("heldout", max_heldout_pairs))
        )

        def placed() -> Iterator[tuple[Row, int, bool]]:
            """Each pair, its side, and whether it is new."""
            for bucket in pairs.buckets():
                places = division.places(np.array([row.prompt for row in bucket], _DIGEST))
                new = ~np.isin(np.array([row.order for row in bucket], _DIGEST), known)
                yield from zip(bucket, places.tolist(), new.tolist(), strict=True)

        left = old_left = max_train_pairs or len(pairs.drawn)
        if rows == "new" and max_train_pairs:  # the new ones come first: a later run does not count them as new
            old_left = max(0, left - sum(is_new and place == TRAIN for _, place, is_new in placed()))
        for row, place, is_new in placed():
            if place == HELDOUT:
                kept.add(row)
            elif place == TRAIN and left:
                if rows == "new" and not is_new:
                    if not (old_left and _drawn(row, old_share)):
                        continue
                    old_left -= 1
                left -= 1
                train.add(row)
                if is_new:
                    fresh.add(row)
            else:
                assert place in (TRAIN, CROSSING)  # beyond the limit, or with a held-out prompt
        for bucket in held.rows.buckets() if held else ():
            for row in bucket:
                kept.add(row)
        summary: dict[str, int | str] = {"fresh_pairs": fresh.lines, "old_pairs": train.lines - fresh.lines}
        write_json(out / "summary.json", summary | _about("train", train) | _about("heldout", kept))


def write_heldout(
    files: Sequence[Path],
    out: Path,
    *,
    domain: str | None,
    seed: int,
    max_heldout_pairs: int | None,
    max_chars: int,
    choices: Choices | None = None,
) -> None:
    """The held-out side of `write_mixture` alone, where it has files of its own: nothing else need be there.

    Args:
        files: the held-out files.
        out: gets the same `heldout.jsonl`, and of `summary.json` what is about it.
        domain, seed, max_heldout_pairs, max_chars, choices: as there.

    Raises:
        QAdapterError: the files have no usable pair.
    """
    check_limits(max_heldout_pairs=max_heldout_pairs)
    held = Side(files, out / ".rows-heldout")
    try:
        held.read(seed, domain=domain, max_chars=max_chars, choices=choices)
        with Output(out / "heldout.jsonl", max_heldout_pairs) as kept:
            for bucket in held.rows.buckets():
                for row in bucket:
                    kept.add(row)
            write_json(out / "summary.json", _about("heldout", kept))
    finally:
        held.close()


def _about(side: str, output: Output) -> dict[str, int | str]:
    """A side's part of the summary."""
    return {
        f"{side}_pairs": output.lines,
        f"{side}_prompts": output.prompts(),
        f"{side}_sha256": output.sha256(),
    }


def unlearnt(ledger: Path, learnt: Path | None) -> int:
    """How many distinct usable pairs a ledger has that another one does not have."""
    return len(np.setdiff1d(_identities(ledger, 0), _identities(learnt, 0)))


def _rows(ledger: Path, seed: int) -> Iterator[Row]:
    return (Row.of(pair, seed) for entry in read(ledger) for pair in entry.pairs)


def _identities(ledger: Path | None, seed: int) -> Digests:
    """What tells the pairs of a ledger apart, 16 bytes for each; none for no ledger."""
    return np.unique(np.frombuffer(b"".join(row.order for row in _rows(ledger, seed)) if ledger else b"", _DIGEST))


def _drawn(row: Row, share: float) -> bool:
    """Whether an old pair is in the sample: its order is a hash of its text and the seed, uniform in 128 bits."""
    return int.from_bytes(row.order) < share * 2.0**128
