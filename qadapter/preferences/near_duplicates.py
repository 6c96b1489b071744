"""Prompts that are nearly the same, by MinHash over runs of five characters.

Two prompts are near-duplicates if the Jaccard similarity of their sets of 5-character runs (lower case, white space
collapsed, first 4,000 characters) is estimated at 0.8 or more. The estimate is the share of equal minima among 48 hash
functions (standard error 0.06 at 0.8); candidates are found by 12 bands of 4 minima (a pair of similarity 0.8 is missed
once in 500).
Broder, On the resemblance and containment of documents, 1997; Leskovec et al., Mining of Massive Datasets, chapter 3.
"""

from __future__ import annotations

import heapq
import itertools
import re

import numpy as np
import numpy.typing as npt

RUN, FUNCTIONS, BANDS = 5, 48, 12
LEAST_SIMILARITY = 0.8
MOST_PROMPTS = 100_000
"""Where there are more, those with the smallest digests are compared, and the shares are lower bounds."""

_MOST_CHARACTERS = 4000
_MOST_IN_BUCKET = 64
_MULTIPLIERS, _OFFSETS = (
    np.random.default_rng(seed).integers(1, 2**63, FUNCTIONS, dtype=np.uint64) | np.uint64(1) for seed in (0, 1)
)
_POWERS = np.array([1_000_003**place % 2**61 for place in range(RUN)], dtype=np.uint64)

Signature = npt.NDArray[np.uint32]


def signature(text: str) -> Signature:
    """The minima of a text: uint32 [48]."""
    plain = re.sub(r"\s+", " ", text[:_MOST_CHARACTERS].lower().strip()).ljust(RUN)
    characters = np.frombuffer(plain.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.uint64)
    runs = np.unique(np.lib.stride_tricks.sliding_window_view(characters, RUN) @ _POWERS)
    mixed = runs ^ (runs >> np.uint64(29))
    return ((mixed[:, None] * _MULTIPLIERS + _OFFSETS) >> np.uint64(32)).min(axis=0).astype(np.uint32)


class NearDuplicates:
    """Collects distinct prompts with their side and counts those that nearly repeat another one."""

    def __init__(self) -> None:
        self._kept: list[tuple[int, bytes, bool, Signature]] = []
        self._known: set[bytes] = set()

    def add(self, digest: bytes, text: str, held_out: bool) -> None:
        """Add a prompt; a repeated one is ignored.

        Args:
            digest: decides whether it is in the sample.
            text: the prompt.
            held_out: whether it is on the held-out side.
        """
        rank = -int.from_bytes(digest[:8], "big")
        if digest in self._known or (len(self._kept) >= MOST_PROMPTS and rank <= self._kept[0][0]):
            return
        self._known.add(digest)
        entry = (rank, digest, held_out, signature(text))
        if len(self._kept) < MOST_PROMPTS:
            heapq.heappush(self._kept, entry)
        else:
            self._known.discard(heapq.heapreplace(self._kept, entry)[1])

    def counts(self) -> dict[str, int]:
        """`compared` prompts, of which `near_duplicates` nearly repeat another one, and `across` held-out ones nearly
        repeat one of training."""
        kept = sorted(self._kept, key=lambda entry: entry[:2])
        if not kept:
            return {"compared": 0, "near_duplicates": 0, "across": 0}
        signatures = np.stack([entry[3] for entry in kept])
        held = np.array([entry[2] for entry in kept])
        repeats, across = np.zeros(len(kept), bool), np.zeros(len(kept), bool)
        width = FUNCTIONS // BANDS
        for band in range(BANDS):
            columns = np.ascontiguousarray(signatures[:, band * width : (band + 1) * width])
            keys = columns.view(f"S{4 * width}").ravel()
            order = np.argsort(keys, kind="stable")
            bounds = np.flatnonzero(np.r_[True, keys[order][1:] != keys[order][:-1], True])
            for start, end in itertools.pairwise(bounds.tolist()):
                if end - start > 1:
                    _mark(order[start:end], signatures, held, repeats, across)
        return {"compared": len(kept), "near_duplicates": int(repeats.sum()), "across": int(across.sum())}


def _mark(
    members: npt.NDArray[np.intp],
    signatures: npt.NDArray[np.uint32],
    held: npt.NDArray[np.bool_],
    repeats: npt.NDArray[np.bool_],
    across: npt.NDArray[np.bool_],
) -> None:
    """Compare the prompts of one bucket: each with up to 64 of training and 64 held-out ones."""
    for side in (False, True):
        others = members[held[members] == side][:_MOST_IN_BUCKET]
        for other in others.tolist():
            alike = (signatures[members] == signatures[other]).mean(axis=1) >= LEAST_SIMILARITY
            alike &= members != other
            repeats[members[alike]] = True
            if not side:
                across[members[alike & held[members]]] = True
