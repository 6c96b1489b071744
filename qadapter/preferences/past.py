"""The training pairs of a preference together with those of earlier ones: all of them, or a share of each."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

from qadapter.errors import QAdapterError
from qadapter.files.artifacts import write_json

_FULL = 2**64


def mix_pairs(new: Path, old: Sequence[Path], out: Path, *, share: float, seed: int) -> None:
    """Write the new pairs and a share of each earlier preference's, the earlier ones first.

    Args:
        new: prepared pairs, one per line.
        old: the same of each earlier preference.
        out: gets `train.jsonl` and `summary.json`: pairs, prompts, sha256, how many are `new_pairs` and `old_pairs`.
        share: of each earlier preference's pairs, from 0 to 1. A pair's draw depends on its text and the seed alone, so
            that what is drawn once is drawn in each later mix.
        seed: of the draw.

    Raises:
        QAdapterError: no pair is left.
    """
    drawn = [line for file in old for line in _lines(file) if _draw(line, seed) < share]
    fresh = _lines(new)
    if not drawn and not fresh:
        raise QAdapterError(f"{new} has no pair, and neither has any earlier preference; give pairs to train on.")
    text = "".join(f"{line}\n" for line in [*drawn, *fresh])
    (out / "train.jsonl").write_text(text, encoding="utf-8")
    summary = {
        "train_pairs": len(drawn) + len(fresh),
        "train_prompts": len({json.dumps(json.loads(line)["prompt"]) for line in [*drawn, *fresh]}),
        "train_sha256": hashlib.sha256(text.encode()).hexdigest(),
        "new_pairs": len(fresh),
        "old_pairs": len(drawn),
    }
    write_json(out / "summary.json", summary)


def _lines(file: Path) -> list[str]:
    # Not `splitlines`: it also cuts at the line separators that a JSON string may hold.
    return [line for line in file.read_text(encoding="utf-8").split("\n") if line.strip()]


def _draw(line: str, seed: int) -> float:
    """A number in [0, 1) for a pair: the same in every run."""
    return int.from_bytes(hashlib.sha256(f"past {seed}\n{line}".encode()).digest()[:8]) / _FULL
