"""What a re-training reads: every pair, or the new ones and a sample of the old; and a held-out side that stays put."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import write_json
from qadapter.preferences.building import Choices
from qadapter.preferences.ledger import read
from qadapter.preferences.pair import PreferencePair
from qadapter.preferences.prepare import parse_files
from qadapter.preferences.split import heldout_side, split_pairs


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
        heldout, heldout_files, seed, max_train_pairs, max_heldout_pairs, domain, max_chars, choices: as in
            `qadapter.preferences.prepare.prepare`.

    Raises:
        QAdapterError: no training pair is left.
    """
    pairs = _pairs(ledger)
    fresh = unlearnt(ledger, learnt)
    held = (
        parse_files(heldout_files, domain=domain, max_chars=max_chars, choices=choices).pairs if heldout_files else None
    )
    split = split_pairs(
        pairs,
        heldout=heldout,
        heldout_pairs=held,
        seed=seed,
        max_train_pairs=max_train_pairs,
        max_heldout_pairs=max_heldout_pairs,
    )
    train = [pair for pair in split.train if rows == "all" or _text(pair) in fresh or _drawn(pair, seed, old_share)]
    new = [pair for pair in train if _text(pair) in fresh]
    summary: dict[str, int | str] = {"fresh_pairs": len(new), "old_pairs": len(train) - len(new)}
    (out / "fresh.jsonl").write_text(_lines(new), encoding="utf-8")
    for side, chosen in {"train": train, "heldout": split.heldout}.items():
        summary |= _write_side(out, side, chosen)
    write_json(out / "summary.json", summary)


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
    held = heldout_side(
        parse_files(files, domain=domain, max_chars=max_chars, choices=choices).pairs, seed, max_heldout_pairs
    )
    if not held:
        raise QAdapterError(f"No held-out pair of {', '.join(map(str, files))} can be used. Give others.")
    write_json(out / "summary.json", _write_side(out, "heldout", held))


def _write_side(out: Path, side: str, pairs: Sequence[PreferencePair]) -> dict[str, int | str]:
    """Write a side's file; its part of the summary."""
    text = _lines(pairs)
    (out / f"{side}.jsonl").write_text(text, encoding="utf-8")
    return {
        f"{side}_pairs": len(pairs),
        f"{side}_prompts": len({pair.prompt_digest for pair in pairs}),
        f"{side}_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }


def _lines(pairs: Sequence[PreferencePair]) -> str:
    return "".join(json.dumps(pair.to_row(), ensure_ascii=False) + "\n" for pair in pairs)


def unlearnt(ledger: Path, learnt: Path | None) -> set[str]:
    """The usable pairs of a ledger that another one does not have, as texts."""
    known = {_text(pair) for pair in _pairs(learnt)} if learnt else set()
    return {_text(pair) for pair in _pairs(ledger)} - known


def _pairs(ledger: Path) -> list[PreferencePair]:
    return [pair for entry in read(ledger) for pair in entry.pairs]


def _text(pair: PreferencePair) -> str:
    return json.dumps(pair.to_trl(), ensure_ascii=False)


def _drawn(pair: PreferencePair, seed: int, share: float) -> bool:
    return int(hashlib.sha256(f"{seed}:{_text(pair)}".encode()).hexdigest(), 16) < share * 2**256
